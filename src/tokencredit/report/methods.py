"""The methods side by side: what each changes, where it comes from, what it needs, and how it ended up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencredit.report.section import Material, Section, number, scrolling, text

WIDTH, HEIGHT = 96, 14


def _interval(figure: Mapping[str, Any], low: float, high: float) -> str:
    """A dot on its interval, on the scale of its column."""

    def place(value: float) -> float:
        return 4 + (WIDTH - 8) * ((value - low) / (high - low) if high > low else 0.5)

    value, ends = figure.get("value"), [figure.get("low"), figure.get("high")]
    if value is None:
        return ""
    bar = ""
    if None not in ends:
        bar = f'<line x1="{place(ends[0]):.1f}" x2="{place(ends[1]):.1f}" y1="{HEIGHT / 2}" y2="{HEIGHT / 2}"/>'
    dot = f'<circle cx="{place(value):.1f}" cy="{HEIGHT / 2}" r="3.5"/>'
    return (
        f'<svg class="interval" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' aria-hidden="true">{bar}{dot}</svg>'
    )


def _figure(figure: Any) -> dict[str, Any]:
    return dict(figure) if isinstance(figure, Mapping) else {"value": figure}


def _cell(figure: Mapping[str, Any], scale: tuple[float, float], name: str) -> str:
    largest = max(map(abs, scale))
    decimals = 3 if largest < 10 else 1 if largest < 1000 else 0
    shown = {key: number(figure.get(key), decimals) for key in ("value", "low", "high")}
    ends = "" if figure.get("low") is None else f'<span class="ends">[{shown["low"]}, {shown["high"]}]</span>'
    return (
        f'<td class="figure" data-name="{text(name)}">{_interval(figure, *scale)}<span>{shown["value"]}</span>'
        f" {ends}</td>"
    )


def _scales(methods: Mapping[str, Mapping[str, Any]], names: list[str]) -> dict[str, tuple[float, float]]:
    scales = {}
    for name in names:
        figures = [_figure(method.get("summary", {}).get(name)) for method in methods.values()]
        values = [figure[key] for figure in figures for key in ("value", "low", "high") if figure.get(key) is not None]
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
    figures = "".join(_cell(_figure(method.get("summary", {}).get(each)), scales[each], each) for each in names)
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
