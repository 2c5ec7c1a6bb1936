"""The methods side by side: what each changes, where it comes from, what it needs, and how it ended up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokencredit.figure import Figure
from tokencredit.report.figures import shown
from tokencredit.report.section import Material, Section, scrolling, text

WIDTH, HEIGHT = 96, 14


def _interval(figure: Figure, low: float, high: float) -> str:
    """A dot on its interval, on the scale of its column."""

    def place(value: float) -> float:
        return 4 + (WIDTH - 8) * ((value - low) / (high - low) if high > low else 0.5)

    if not math.isfinite(figure.value):
        return ""
    bar = ""
    if math.isfinite(figure.low) and math.isfinite(figure.high):
        ends = f'x1="{place(figure.low):.1f}" x2="{place(figure.high):.1f}"'
        bar = f'<line {ends} y1="{HEIGHT / 2}" y2="{HEIGHT / 2}"/>'
    dot = f'<circle cx="{place(figure.value):.1f}" cy="{HEIGHT / 2}" r="3.5"/>'
    return (
        f'<svg class="interval" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' aria-hidden="true">{bar}{dot}</svg>'
    )


def _figure(method: Mapping[str, Any], name: str) -> Figure:
    """A figure of a method's summary; undefined where it has none of that name."""
    found = method.get("summary", {}).get(name)
    return Figure.from_json(found if isinstance(found, Mapping) else {"value": found})


def _cell(figure: Figure, scale: tuple[float, float], name: str) -> str:
    largest = max(map(abs, scale))
    form = ".3f" if largest < 10 else ".1f" if largest < 1000 else ".0f"
    return f'<td class="figure" data-name="{text(name)}">{_interval(figure, *scale)}{shown(figure, form)}</td>'


def _scales(methods: Mapping[str, Mapping[str, Any]], names: list[str]) -> dict[str, tuple[float, float]]:
    scales = {}
    for name in names:
        figures = [_figure(method, name) for method in methods.values()]
        values = [end for each in figures for end in (each.value, each.low, each.high) if math.isfinite(end)]
        scales[name] = (min(values, default=0.0), max(values, default=1.0))
    return scales


def _row(material: Material, name: str, names: list[str], scales: Mapping[str, tuple[float, float]]) -> str:
    method = material.methods[name]
    chains = dict.fromkeys(run.info["method"] for run in material.runs if run.info["method_name"] == name)
    changes = text(method["changes"]) if method.get("changes") else ""
    code = "".join(f"<details><summary>definition</summary><code>{text(chain)}</code></details>" for chain in chains)
    needs = text(", ".join(method["needs"]) or "nothing") if "needs" in method else "–"
    seeds = method.get("seeds") or sorted(run.info["seed"] for run in material.runs if run.info["method_name"] == name)
    label = f'<th scope="row"><span class="swatch" aria-hidden="true"></span>{text(material.label(name))}</th>'
    cells = [
        ("what it changes", f"<div>{changes}{code}</div>"),
        ("source", text(method.get("source") or "–")),
        ("fidelity", text(method.get("fidelity") or "–")),
        ("needs", needs),
        ("seeds", text(", ".join(map(str, seeds)))),
    ]
    described = "".join(f'<td data-name="{heading}">{value}</td>' for heading, value in cells)
    figures = "".join(_cell(_figure(method, each), scales[each], each) for each in names)
    return f'<tr class="c{material.colour(name)}">{label}{described}{figures}</tr>'


def build(material: Material) -> Section | None:
    """One row per method; the figures are those of the study, with their intervals."""
    methods = material.methods
    if not methods:
        return None
    names = list(dict.fromkeys(name for method in methods.values() for name in method.get("summary", {})))
    scales = _scales(methods, names)
    columns = ["method", "what it changes", "source", "fidelity", "needs", "seeds"]
    head = "".join(f"<th>{text(name)}</th>" for name in [*columns, *names])
    rows = "".join(_row(material, name, names, scales) for name in methods)
    note = (
        '<p class="note">Dots and bars: value and interval at the end of training, each column on its own scale.</p>'
        if names
        else ""
    )
    table = f'<table class="methods"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return Section("Methods", scrolling("Methods", table) + note)
