"""Sections of a variance study: the bias-variance plane, the table, signal per credited token, and what sampling tokens
costs.

Everything shown is a figure of the study's `result.json`; names of figures are resolved here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.report import figures as parts
from tokencredit.report.figures import point, shown
from tokencredit.report.section import Section, compact, duration, text

COLUMNS = {
    "relative_variance": ("tr Cov / |mean|²", "prompts at which half of the squared batch gradient is noise"),
    "between_prompts": (
        "between prompts",
        "share of the variance that no further rollout of the same prompts takes away",
    ),
    "tokens_apart": (
        "tokens apart",
        "squared norms of the tokens’ terms over that of their sum: 1 if orthogonal, less if they add up",
    ),
    "truth_angle": ("angle to truth", "of the mean gradient to the true policy gradient, degrees"),
    "angle": ("angle to unweighted", "of the mean gradients, degrees"),
    "length": ("length", "of the mean gradient, against the unweighted one"),
    "mse_raw": ("MSE, own length", "of a batch against the true gradient, over its squared norm"),
    "mse": ("MSE, best length", "the same at the best learning rate"),
    "ess_variance": ("ESS, variance", "unweighted rollouts that one weighted rollout is worth, bias apart"),
    "ess": (
        "ESS",
        "the same for the mean squared error at the best length; ∞: no number of unweighted rollouts gets there",
    ),
    "efficiency_ratio": (
        "per token",
        "squared signal over second moment per credited token, against the unweighted gradient",
    ),
}
FAMILIES = {
    "unweighted": (6, ("dapo",)),
    "credit of the rollout": (5, ("grpo", "reinforce", "rloo", "dr_grpo", "otb", "reinforce_pp_baseline")),
    "shaped by entropy": (
        0,
        ("gtpo", "grpo_s", "entropy_advantage", "gtpo_geometric", "grpo_s_geometric", "gtpo_2025_08"),
    ),
    "selects tokens": (1, ("forking_tokens", "random_tokens", "oracle_positions")),
    "samples tokens": (4, ("token_sampling",)),
    "value of the token": (3, ("exact_value", "vineppo")),
}
OTHER = ("weighs tokens", 2)


def sections(result: Mapping[str, Any], directory: Path) -> list[Section]:
    """All sections of the study."""
    return [_about(result), _plane(result), _tables(result), _efficiency(result), _sampling(result)]


def _about(result: Mapping[str, Any]) -> Section:
    config, blocks = result["config"], result["checkpoints"]
    first = blocks[0]
    along = first["directions"]
    how = f"sketched along {along} directions, norms ± {100 / (2 * along) ** 0.5:.0f} %" if along else "whole"
    truth = {"exact": "from Q − V of every token, by prefix trees", "rloo": "from leave-one-out REINFORCE"}[
        first["truth"]
    ]
    facts = [
        ("Task", config["policy"]["task"]),
        ("Checkpoints", ", ".join(f"{b['label']} ({b['num']['success']:.0%} correct)" for b in blocks)),
        ("Rollouts", f"{config['prompts']} prompts × 2 groups × {config['group']}"),
        ("Unweighted", config["baseline"]),
        ("True policy gradient", truth),
        ("Gradients", f"{first['num']['parameters']:,} parameters, {how}"),
        ("Mean squared errors", f"at {config['batch']} prompts"),
        ("Seed", config["seed"]),
        ("Time", duration(sum(b["seconds"] for b in blocks))),
    ]
    note = (
        '<p class="note">Intervals: 95 %, jackknife over prompts. Differences named above hold after Holm’s adjustment'
        " over methods.</p>"
    )
    body = parts.facts(facts) + parts.said(result) + note + parts.command(result)
    return Section("Weighted gradients", body)


def _worlds(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Label -> the methods' block: checkpoints, then the enumerated world."""
    return {block["label"]: block["methods"] for block in result["checkpoints"]} | {
        "exact world": result["exact"]["methods"]
    }


def _tables(result: Mapping[str, Any]) -> Section:
    figures, heads = result["figures"], ("method", "tokens with weight, per group", *COLUMNS.values())
    body = []
    for label, methods in _worlds(result).items():
        rows = [
            [
                text(name),
                f"{each['tokens']:.3g}",
                *(shown(figures.get(each["figures"].get(column)), ".3g") for column in COLUMNS),
            ]
            for name, each in methods.items()
        ]
        told = _enumerated(result) if label == "exact world" else ""
        body.append(f"<h3>{text(label)}</h3>{told}{parts.table(label, heads, rows)}")
    return Section("Bias and variance of every method", "".join(body))


def _enumerated(result: Mapping[str, Any]) -> str:
    found = result["exact"]
    return (
        f'<p class="note">A small transformer whose {found["groups"]:,} groups of {found["group"]} completions are all'
        " enumerated: no sampling, no interval. Methods that draw tokens at random are left out.</p>"
    )


def _family(name: str) -> tuple[str, int]:
    return next(((family, colour) for family, (colour, names) in FAMILIES.items() if name in names), OTHER)


def _plane(result: Mapping[str, Any]) -> Section:
    """A point per method: relative variance across, angle up."""
    axes = {
        "truth_angle": "angle to the true policy gradient, degrees",
        "angle": f"angle to {result['config']['baseline']}, degrees",
    }
    worlds: dict[str, list[dict[str, Any]]] = {}
    for label, methods in _worlds(result).items():
        worlds[label] = [
            {"name": name, "colour": _family(name)[1]}
            | {column: point(result["figures"][each["figures"][column]]) for column in ("relative_variance", *axes)}
            for name, each in methods.items()
            if each["resolved"]
        ]
    worlds = {label: points for label, points in worlds.items() if points}
    legend = {family: colour for family, (colour, _) in FAMILIES.items()} | dict([OTHER])
    note = (
        '<p class="note">To the left: less noise. Down: less bias. The axis of variance is logarithmic; methods whose'
        " mean gradient is not resolved are left out.</p>"
    )
    data = compact({"worlds": worlds, "axes": axes, "legend": legend})
    return Section("Bias against variance", note, data, "variance_plane.js")


def _efficiency(result: Mapping[str, Any]) -> Section:
    bars = {}
    for label, methods in _worlds(result).items():
        named = [
            point(result["figures"][each["figures"]["efficiency_ratio"]], name=name)
            for name, each in methods.items()
            if each["resolved"]
        ]
        if known := [bar for bar in named if math.isfinite(bar["value"])]:
            bars[label] = sorted(known, key=lambda bar: -bar["value"])
    note = (
        f'<p class="note">Squared projection of the mean gradient on the true one, over E|gradient|², per token with'
        f" weight; "
        f"{text(result['config']['baseline'])} is 1. Tokens without weight cost nothing here.</p>"
    )
    return Section("Signal per credited token", note, compact({"bars": bars}), "bars.js")


def _sampling(result: Mapping[str, Any]) -> Section:
    """Cost and added variance over the fraction kept, a line per scheme, and whether draws agree with the formula."""
    worlds, rows, figures = {}, [], result["figures"]
    for block in result["checkpoints"]:
        found = block["sampling"]
        worlds[block["label"]] = {
            measure: [
                {"label": scheme, "colour": at, "points": [point(figures[name]) for name in curves[measure]]}
                for at, (scheme, curves) in enumerate(found["curves"].items())
            ]
            for measure in ("cost", "added")
        }
        rows += [
            [text(block["label"]), text(scheme), shown(figures[name], ".3g")] for scheme, name in found["drawn"].items()
        ]
    data = compact({"worlds": worlds, "fractions": result["checkpoints"][0]["sampling"]["fractions"]})
    note = (
        '<p class="note">Tokens kept at random and weighted by 1/q: no bias. Cost: tokens for a given variance; keeping'
        " all is 1. Theory’s optimum is q ∝ |credit| × gradient norm.</p>"
    )
    checks = parts.table("Drawn as well", ("", "drawn", "variance over the formula’s"), rows)
    body = f"{note}<details><summary>Drawn as well</summary>{checks}</details>"
    return Section("Sampling tokens", body, data, "variance_sampling.js")
