"""Sections of a comparison of methods: verdicts, differences from the baseline, curves over the budget, learning rates,
time.

Everything shown is a figure of the study's `result.json`; names of figures are resolved here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.figure import number
from tokencredit.report import figures as parts
from tokencredit.report.section import Section, compact, duration, scrolling, text

SIGNS = {"better": ("yes", "✓"), "worse": ("no", "✕")}
UNRESOLVED = ("open", "?")
MEASURES = ("pass@1", "area", "budget_to")
CURVES = {
    "pass@1": ("a sample is correct", "share of samples"),
    "entropy": ("mean entropy of the policy per token", "nats"),
    "length": ("mean length of a completion", "tokens"),
}
PHASES = (("generation", "c0"), ("scoring", "c1"), ("update", "c6"))


def sections(result: Mapping[str, Any], directory: Path) -> list[Section]:
    """All sections of the study."""
    built = [
        _about(result),
        _verdicts(result),
        _differences(result),
        _curves(result),
        _ends(result),
        _rates(result),
        _time(result),
    ]
    return [section for section in built if section]


def _named(result: Mapping[str, Any]) -> dict[str, str]:
    """What the measures of the verdicts are called."""
    to = f"{_unit(result)} to {_reach(result)} of {result['baseline']}’s final pass@1"
    return {"pass@1": "final pass@1", "area": "mean pass@1 over the budget", "budget_to": to}


def _reach(result: Mapping[str, Any]) -> str:
    return _percent(result["settings"]["reach"])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _unit(result: Mapping[str, Any]) -> str:
    return {"seconds": "training seconds"}.get(unit := result["config"]["budget"]["unit"], f"sampled {unit}")


def _figure(result: Mapping[str, Any], name: str | None, sign: bool = False) -> str:
    """A value and its interval, thousands without decimals."""
    return parts.shown(result["figures"].get(name), sign=sign)


def _about(result: Mapping[str, Any]) -> Section:
    budget, base = result["config"]["budget"], result["config"]["base"]
    facts = [
        ("Model and task", f"{base['model']} on {base['task']}"),
        (
            "Budget of a run",
            f"{budget['amount']:,g} {_unit(result)}, evaluated at every {_percent(1 / budget['marks'])} of it",
        ),
        ("Methods", f"{len(result['methods'])}, against {result['baseline']}"),
        ("Seeds", ", ".join(map(str, result["seeds"])) + ": the same prompts in the same order for every method"),
        ("Held-out prompts", f"{result['prompts']['final']} at the end, {result['prompts']['marks']} along the way"),
        ("Learning rates", _rates_told(result)),
        ("Time", f"{duration(result['wall'])}, {result['workers']} runs side by side"),
    ]
    failed = "".join(f"<li>{text(name)}: {text(why)}</li>" for name, why in result["failed"].items())
    notice = f'<div class="notice">Runs that failed and are in no figure:<ul>{failed}</ul></div>' if failed else ""
    return Section("What was compared", notice + parts.facts(facts) + parts.said(result) + parts.command(result))


def _rates_told(result: Mapping[str, Any]) -> str:
    rates, rate = result["config"]["rates"], result["config"]["base"]["learning_rate"]
    if len(rates) == 1:
        return f"{rates[0] * rate:g} for all, not checked"
    return f"chosen for every method from {', '.join(f'{each * rate:g}' for each in rates)}, on validation prompts"


def _verdicts(result: Mapping[str, Any]) -> Section:
    rows = {(row["method"], row["measure"]): row for row in result["verdicts"]}
    there = [measure for measure in MEASURES if any(measure == row["measure"] for row in result["verdicts"])]
    named = _named(result)
    table = []
    for method in result["methods"]:
        cells = [f"{method['learning_rate']:g}", _figure(result, method["figures"]["pass@1"])]
        for row in (rows.get((method["name"], measure)) for measure in there):
            cells.append(f"{_verdict(row)}<br>{_figure(result, row['difference'], sign=True)}" if row else "–")
        table.append((method["name"], method["changes"], cells))
    heads = ["learning rate", "final pass@1", *(f"{named[measure]}, difference" for measure in there)]
    note = (
        f'<p class="note">Differences from {text(result["baseline"])}, by seed; intervals: 95 %, over seeds and'
        " prompts, not corrected. A verdict is better or worse when the difference is not 0 at 5 % after Holm’s"
        " correction for all methods, measure by measure; else the budget does not tell: that is not a finding of no"
        " difference, and the order of rows is none either.</p>"
    )
    return Section("Verdicts", _table("Verdicts", heads, table) + note)


def _table(label: str, heads: Sequence[str], rows: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """A row per method, whose name says when pointed at what the method changes; cells are HTML."""
    head = "".join(f"<th>{text(name)}</th>" for name in ("method", *heads))
    body = "".join(
        '<tr><th scope="row"'
        f' title="{text(about)}">{text(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, about, cells in rows
    )
    return scrolling(label, f'<table class="compared"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')


def _verdict(row: Mapping[str, Any]) -> str:
    p, holm = (number(row[name], ".3f") for name in ("p", "holm"))
    kind, sign = SIGNS.get(row["verdict"], UNRESOLVED)
    word = row["verdict"].replace(" at this budget", "")
    return (
        f'<span class="verdict {kind}" title="p {p}, after Holm {holm}"><span aria-hidden="true">{sign}</span>'
        f" {text(word)}</span>"
    )


def _points(result: Mapping[str, Any], name: str, **more: Any) -> dict[str, Any]:
    return parts.point(result["figures"][name], **more)


def _differences(result: Mapping[str, Any]) -> Section | None:
    views = []
    for measure, label in _named(result).items():
        chosen = [row for row in result["verdicts"] if row["measure"] == measure]
        rows = [
            {
                "label": row["method"],
                "marks": [_points(result, row["difference"], colour=_shade(row), title=row["verdict"])],
            }
            for row in chosen
        ]
        if rows:
            better = "to the left: fewer" if measure == "budget_to" else "to the right: more"
            views.append(
                {
                    "label": label,
                    "x": f"{label}, difference from {result['baseline']}",
                    "rows": rows,
                    "zero": True,
                    "note": f"Better is {better}. Blue: better, orange: worse, grey: not resolved at this budget.",
                }
            )
    data = compact({"select": "Measure", "views": views})
    return Section("Differences from the baseline", "", data, "dots.js") if views else None


def _shade(row: Mapping[str, Any]) -> int:
    return {"better": 0, "worse": 1}.get(row["verdict"], 6)


def _curves(result: Mapping[str, Any]) -> Section:
    baseline, step, panels = result["baseline"], result["grid"], {}
    for measure, by_method in result["curves"].items():
        meaning, unit = CURVES.get(measure, ("at least one of the samples is correct", "share of prompts"))
        series = {
            method: _series(method, curve, step, 6 if method == baseline else 0) for method, curve in by_method.items()
        }
        shown = [[series[method], series[baseline]] for method in series if method != baseline] or [[series[baseline]]]
        panels[measure] = [
            {"title": pair[0]["label"], "meaning": "", "unit": unit, "x": _unit(result), "series": pair}
            for pair in shown
        ]
        panels[measure][0]["about"] = f"{meaning}, {unit}"
    body = (
        f'<p class="note">Each panel: one method (blue) beside {text(baseline)} (grey). Bands: 95 %, over seeds and'
        " prompts; thin lines: single seeds. Point at a panel, or focus it and use the arrow keys, to read the"
        " values.</p>"
    )
    return Section("Learning curves", body, compact(panels, 5), "multiples.js")


def _series(method: str, curve: Mapping[str, Any], step: Sequence[float], colour: int) -> dict[str, Any]:
    lines = [{"seed": seed, "step": step, "value": value} for seed, value in curve["seeds"].items()]
    return {
        "label": method,
        "colour": colour,
        "step": step,
        "lines": lines,
        **{key: curve[key] for key in ("value", "low", "high")},
    }


def _ends(result: Mapping[str, Any]) -> Section:
    """Where the runs are when the budget is spent."""
    names = [
        name for name in result["methods"][0]["figures"] if name.startswith("pass@") or name in ("entropy", "length")
    ]
    own = f"{_unit(result)} to {_reach(result)} of its own final pass@1"
    rows = []
    for method in result["methods"]:
        figures, num = method["figures"], len(method["seeds"])
        cells = [
            *(_figure(result, figures[name]) for name in names),
            _figure(result, figures["budget_to_own"]),
            *(f"{method[count]} of {num}" if method[count] else "none" for count in ("collapsed", "never")),
        ]
        rows.append((method["name"], method["changes"], cells))
    heads = [*names, own, "seeds that collapsed", "seeds never at the target"]
    target, start = number(result["target"]["value"], ".3f"), number(result["target"]["start"], ".3f")
    note = (
        f'<p class="note">Entropy in nats per token, length in tokens. A run collapses when its entropy falls under '
        f"{_percent(result['settings']['collapse'])} of the initial policy’s. The target is {target},"
        f" {_reach(result)} of "
        f"{text(result['baseline'])}’s final pass@1; the initial policy has {start}.</p>"
    )
    return Section("At the end of the budget", _table("At the end of the budget", heads, rows) + note)


def _rates(result: Mapping[str, Any]) -> Section | None:
    if not result["rates"]:
        return None
    rates = sorted({each["factor"] for found in result["rates"].values() for each in found})
    colours = {factor: (5, 0, 3, 1, 4, 7)[at % 6] for at, factor in enumerate(rates)}
    rows = [
        {
            "label": method,
            "marks": [
                _points(
                    result,
                    each["figure"],
                    colour=colours[each["factor"]],
                    ring=each["chosen"],
                    title=f"learning rate {each['learning_rate']:g}",
                )
                for each in found
            ],
        }
        for method, found in result["rates"].items()
    ]
    base = result["config"]["base"]["learning_rate"]
    legend = [{"label": f"{factor * base:g}", "colour": colours[factor]} for factor in rates]
    note = (
        "A ring marks the rate that was taken. Validation prompts are a fixed quarter of the test prompts, by a hash of"
        " the prompt; the final figures use none of them, and other seeds."
    )
    view = {
        "label": "validation",
        "x": "validation pass@1, second half of the budget",
        "rows": rows,
        "zero": False,
        "note": note,
        "legend": legend,
    }
    return Section("Learning rates", "", compact({"views": [view]}), "dots.js")


def _time(result: Mapping[str, Any]) -> Section:
    figures = result["figures"]
    longest = max(figures[method["figures"]["seconds"]].value for method in result["methods"])
    rows = []
    for method in result["methods"]:
        names = method["figures"]
        over = f"× {_figure(result, names['overhead'])}" if "overhead" in names else "–"
        cells = [
            _figure(result, names["seconds"]),
            over,
            _bar(result, names, longest),
            *(number(figures[names[unit]].value) for unit in ("rollouts", "tokens")),
        ]
        rows.append((method["name"], method["changes"], cells))
    heads = (
        "seconds of training",
        "over the baseline",
        "generation, scoring, update",
        "sampled rollouts",
        "sampled tokens",
    )
    legend = "".join(
        f'<span class="key {colour}"><span class="swatch"></span>{phase}</span>' for phase, colour in PHASES
    )
    note = (
        '<p class="note">Seconds of generation, scoring and updates, without evaluations, on a machine that the runs'
        " shared; over the baseline: per sampled rollout, by seed. Scoring holds what a method measures on its"
        " rollouts.</p>"
    )
    return Section(
        "Time and overhead", f'<div class="legend">{legend}</div>' + _table("Time and overhead", heads, rows) + note
    )


def _bar(result: Mapping[str, Any], names: Mapping[str, str], longest: float, width: int = 220) -> str:
    """The phases of a run's seconds, end to end."""
    drawn, at = [], 0.0
    for phase, colour in PHASES:
        long = width * result["figures"][names[f"seconds_{phase}"]].value / longest
        drawn.append(f'<g class="{colour}"><rect class="part" x="{at:.1f}" y="2" width="{long:.1f}" height="11"/></g>')
        at += long
    return f'<svg width="{width}" height="15" viewBox="0 0 {width} 15" aria-hidden="true">{"".join(drawn)}</svg>'
