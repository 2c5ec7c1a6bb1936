"""Sections of a gradient noise scale: the figures, and predicted variance over prompts and rollouts with what a budget
pays for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.figure import number
from tokencredit.report import figures as parts
from tokencredit.report.figures import shown
from tokencredit.report.section import Section, scrolling, text

WIDTH, HEIGHT, LEFT, TOP = 76, 34, 64, 26


def sections(result: Mapping[str, Any], directory: Path) -> list[Section]:
    """The figures and, where the noise was split, the map of shapes of a batch."""
    return [_figures(result), *([_map(result)] if result["grid"] else [])]


def _figures(result: Mapping[str, Any]) -> Section:
    facts = [
        ("Checkpoint", f"{result['checkpoint']} (step {result['step']})"),
        ("Method", result["method"]),
        (
            "Task",
            f"{result['task']}, temperature {result['temperature']:g}; {result['success']:.0%} of the rollouts succeed",
        ),
        ("Rollouts", f"{result['prompts']} prompts × {result['group']}, {result['prompts_counted']} prompts counted"),
        ("Gradients", f"sketched to {result['sketched']:,} numbers each" if result["sketched"] else "whole"),
        ("Seed", result["seed"]),
    ]
    rows = ((text(each.label), shown(each, ".3g"), text(each.unit)) for each in result["figures"].values())
    table = parts.table("Figures", ("", "value", "unit"), rows)
    note = (
        '<p class="note">Intervals: 95 %, jackknife over prompts; Fieller’s for ratios, without an upper end (∞) where'
        " the denominator may be 0. Estimates are not clamped.</p>"
    )
    body = parts.facts(facts) + parts.said(result) + table + note + parts.command(result)
    return Section("How noisy the gradient is", body)


def _map(result: Mapping[str, Any]) -> Section:
    """Shaded cells over prompts and rollouts, the line of equal cost through them and the best point on it."""
    cell = {(row["prompts"], row["group"]): row for row in result["grid"]}
    prompts, groups = (sorted({key[place] for key in cell}) for place in (0, 1))

    def at(p, k):
        return (
            LEFT + WIDTH * (_place(prompts, p) + 0.5),
            TOP + HEIGHT * (_place(groups, k) + 0.5),
        )

    width, height = LEFT + WIDTH * len(prompts), TOP + HEIGHT * len(groups) + 34
    shapes = [_cell(cell[p, k], *at(p, k)) for p in prompts for k in groups]
    shapes += [
        f'<text class="tick" x="{at(p, groups[0])[0]:.1f}" y="{TOP - 8}" text-anchor="middle">{p}</text>'
        for p in prompts
    ]
    shapes += [
        f'<text class="tick" x="{LEFT - 8}" y="{at(prompts[0], k)[1] + 4:.1f}" text-anchor="end">{k}</text>'
        for k in groups
    ]
    shapes += [f'<text class="tick" x="{LEFT}" y="{height - 12}">prompts across, rollouts of each down</text>']
    costs, choice, own = result["costs"], result["choice"], result["own_batch"]
    resolved, named = choice.get("resolved", True), result.get("reference", "the run's own batch")
    line = [at(p, k) for k, p in _affordable(costs, groups) if prompts[0] <= p <= prompts[-1]]
    shapes.append(f'<polyline class="cost" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>')
    marked = [(own, "own"), *([(choice, "best")] if resolved else [])]
    shapes += [_mark(at, each, prompts, groups, name) for each, name in marked]
    label = "Predicted variance over prompts and rollouts"
    drawing = (
        f'<svg class="heat" viewBox="0 0 {width} {height}" width="{width}" role="img"'
        f' aria-label="{label}">{"".join(shapes)}</svg>'
    )
    best = f" Thick circle: its least noisy batch, {choice['prompts']} × {choice['group']}." * resolved
    note = (
        f'<p class="note">Leave-one-out credit; {text(named)} (thin circle, {own["prompts"]} ×'
        f" {own['group']}) is 1. Line: what a budget of {costs['budget']:g} pays for at {costs['prompt']:g} per prompt"
        f" and {costs['rollout']:g} per rollout.{best} Point at a cell for its interval.</p>"
    )
    return Section("Predicted variance of the batch gradient", note + scrolling(label, drawing))


def _cell(row: Mapping[str, Any], x: float, y: float) -> str:
    """One cell, darker where there is less noise."""
    relative = row["relative"]
    shade = 0.0 if relative is None or relative <= 0 else min(max(0.4 - 0.12 * math.log2(relative), 0.0), 0.85)
    value, low, high, against = (number(row[name], ".3g") for name in ("variance", "low", "high", "relative"))
    said = f"{row['prompts']} prompts × {row['group']} rollouts: variance {value} [{low}, {high}], cost {row['cost']:g}"
    box = f'x="{x - WIDTH / 2:.1f}" y="{y - HEIGHT / 2:.1f}" width="{WIDTH}" height="{HEIGHT}"'
    return (
        f'<g><title>{text(said)}</title><rect {box} fill-opacity="{shade:.2f}"/>'
        f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{against}</text></g>'
    )


def _mark(at: Any, shape: Mapping[str, Any], prompts: Sequence[int], groups: Sequence[int], name: str) -> str:
    if not (prompts[0] <= shape["prompts"] <= prompts[-1] and groups[0] <= shape["group"] <= groups[-1]):
        return ""
    x, y = at(shape["prompts"], shape["group"])
    return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="15"/>'


def _affordable(costs: Mapping[str, float], groups: Sequence[int]) -> list[tuple[float, float]]:
    """(K, P) along the budget, a hundred points."""
    ends = math.log(groups[0]), math.log(groups[-1])
    ks = [math.exp(ends[0] + (ends[1] - ends[0]) * i / 99) for i in range(100)]
    return [(k, costs["budget"] / (costs["prompt"] + k * costs["rollout"])) for k in ks]


def _place(marks: Sequence[int], value: float) -> float:
    """Where a value is among the marks, logarithmic between two of them."""
    after = next((i for i, mark in enumerate(marks) if mark >= value), len(marks) - 1)
    if not after:
        return 0.0
    low, high = math.log(marks[after - 1]), math.log(marks[after])
    return after - 1 + (math.log(value) - low) / (high - low)
