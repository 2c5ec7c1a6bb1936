"""Training curves: what every optimizer step recorded, one line per run, also of a run that was never evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokencredit.report.figures import note
from tokencredit.report.section import Material, Section, compact
from tokencredit.runs import Run

MAX_POINTS = 400  # of a line
# figure of a step -> (title, what it is, unit of the vertical axis)
MEASURES = {
    "reward": ("reward", "mean over the rollouts that were sampled", "reward"),
    "pass_rate": ("pass rate", "rollouts that are a success", "share of rollouts"),
    "entropy": ("entropy", "mean over tokens, of the policy that sampled", "nats"),
    "length": ("length", "mean of a completion", "tokens"),
    "truncated": ("truncated", "completions cut at the limit", "share of rollouts"),
    "clip_low": ("clipped below", "ratio under the lower bound, credit negative", "share of tokens"),
    "clip_high": ("clipped above", "ratio over the upper bound, credit positive", "share of tokens"),
    "grad_norm": ("gradient norm", "before it is clipped", "norm"),
    "credited_share": ("credited", "tokens with credit", "share of tokens"),
    "kl": ("KL", "from the reference model", "nats"),
}


def _line(run: Run, name: str, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One run's figure over its steps, every n-th of them where there are many; None where it was not recorded."""
    there = [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
    if not any(math.isfinite(value) for _, value in there):
        return None
    kept = there[:: math.ceil(len(there) / MAX_POINTS)]
    kept += [there[-1]] * (kept[-1] != there[-1])
    return {"seed": str(run.info["seed"]), "step": [step for step, _ in kept], "value": [value for _, value in kept]}


def _values(lines: Mapping[str, list[dict[str, Any]]]) -> list[float]:
    return [value for some in lines.values() for line in some for value in line["value"]]


def build(material: Material) -> Section | None:
    """A plot for every figure that a run recorded; nothing where no run recorded any."""
    records = {run.path: run.metrics() for run in material.runs if run.kind == "training"}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in material.runs:
        for name in MEASURES:
            if line := _line(run, name, records.get(run.path, [])):
                found.setdefault(name, {}).setdefault(run.info["method_name"], []).append(line)
    if found.get("reward") == found.get("pass_rate"):
        found.pop("pass_rate", None)  # rewards that are verdicts: one plot says it
    zero = [name for name, lines in found.items() if not any(_values(lines))]
    panels = []
    for name in (name for name in MEASURES if name in found and name not in zero):
        title, meaning, unit = MEASURES[name]
        series = [
            {"label": material.label(method), "colour": material.colour(method), "step": [], "lines": compact(lines)}
            for method, lines in found[name].items()
        ]
        panels.append({"title": title, "meaning": meaning, "unit": unit, "series": series})
    if not found:
        return None
    thinned = max(len(each) for each in records.values()) > MAX_POINTS
    every = f" At most {MAX_POINTS} steps of a run are drawn, evenly spread." if thinned else ""
    nothing = (
        f" Zero at every step: {', '.join(MEASURES[name][0] for name in MEASURES if name in zero)}." if zero else ""
    )
    said = (
        f"One line per run, as its steps recorded them on the prompts that it trained on; no interval.{every}{nothing}"
    )
    return Section("Training curves", note(said), {"panels": panels}, "curves.js")
