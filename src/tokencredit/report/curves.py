"""Learning curves: one small plot per measure, one line per method, the study's interval over seeds as a band."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencredit.report.section import Material, Section, compact, text

# measure -> (what it is, unit of the vertical axis)
MEASURES = {
    "pass@1": ("a single sample is correct", "share of prompts"),
    "pass@8": ("at least one of eight samples is correct", "share of prompts"),
    "greedy": ("the most likely answer is correct", "share of prompts"),
    "entropy": ("mean entropy of the policy per token", "nats"),
    "length": ("mean length of a completion", "tokens"),
}


def series(material: Material, curves: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{method: curve} as the plot wants it; a curve is step, value, low, high, and one line per seed, any of which may
    be absent.
    """
    drawn = []
    for method, curve in curves.items():
        steps = curve.get("step", [])
        lines = [
            {"seed": str(seed), **(line if isinstance(line, Mapping) else {"step": steps, "value": line})}
            for seed, line in (curve.get("seeds") or {}).items()
        ]
        bounds = {key: curve.get(key) for key in ("value", "low", "high")}
        drawn.append(
            {
                "label": material.label(method),
                "colour": material.colour(method),
                "step": steps,
                **bounds,
                "lines": lines,
            }
        )
    order = {material.label(method): place for place, method in enumerate(material.methods)}
    return compact(sorted(drawn, key=lambda each: order.get(each["label"], len(order))), 5)


def build(material: Material) -> Section | None:
    """The plots of every measure that the study has."""
    curves = {name: curve for name, curve in material.curves.get("curves", {}).items() if curve}
    if not curves:
        return None
    names = [*(name for name in MEASURES if name in curves), *(name for name in curves if name not in MEASURES)]
    panels = []
    for name in names:
        meaning, unit = MEASURES.get(name, ("", ""))
        panels.append({"title": name, "meaning": meaning, "unit": unit, "series": series(material, curves[name])})
    interval = material.curves.get("interval", "interval over seeds, as computed by the study")
    body = (
        f'<p class="note">Line: the study’s estimate. Band: {text(interval)}. Thin lines: single seeds. '
        "Point at a plot, or focus it and use the arrow keys, to read the values.</p>"
    )
    return Section("Learning curves", body, {"panels": panels}, "curves.js")
