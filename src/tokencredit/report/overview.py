"""What was run: task, model, methods, seeds, command, versions, time; and which runs did not end well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokencredit.report.section import Material, Section, duration, scrolling, text
from tokencredit.runs import Run


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _joined(values: Iterable[Any]) -> str:
    return text(", ".join(_distinct(values))) or "–"


def _seconds(run: Run) -> float:
    records = run.metrics() or run.evaluations()
    return float(records[-1].get("seconds") or 0) if records else 0.0


def _facts(material: Material, seconds: list[float]) -> list[tuple[str, str]]:
    runs = [run.info for run in material.runs]
    versions = {
        name: _distinct(info["versions"].get(name) for info in runs) for info in runs for name in info["versions"]
    }
    computers = _distinct(
        ", ".join(str(info["platform"].get(key)) for key in ("system", "cpus")) + " CPUs" for info in runs
    )
    started = sorted(_distinct(info["started"] for info in runs))
    each = " to ".join(dict.fromkeys([duration(min(seconds)), duration(max(seconds))]))
    spans = "" if len(runs) == 1 else f" for {len(runs)} runs, {each} each"
    return [
        ("Task", _joined(info["task"] for info in runs)),
        ("Model", _joined(info["model"] for info in runs)),
        ("Methods", text(", ".join(map(material.label, material.methods)))),
        ("Seeds", _joined(sorted(info["seed"] for info in runs))),
        ("Time", text(duration(sum(seconds)) + spans)),
        (
            "Started",
            text(started[0].replace("T", " ").replace("+00:00", " UTC") + ("" if len(started) == 1 else " and later")),
        ),
        ("Versions", text(", ".join(f"{name} {' / '.join(found)}" for name, found in versions.items() if found))),
        ("Computer", text("; ".join(computers))),
    ]


def _table(runs: list[Run], seconds: list[float]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("run", "method", "seed", "status", "steps", "time", "command"))
    rows = []
    for run, spent in zip(runs, seconds):
        info, records = run.info, run.metrics()
        steps = str(records[-1]["step"]) if records else "0"
        cells = (info["name"], info["method_name"], info["seed"], info["status"], steps, duration(spent))
        rows.append(
            "<tr>"
            + "".join(f"<td>{text(cell)}</td>" for cell in cells)
            + f"<td><code>{text(info['command'])}</code></td></tr>"
        )
    return scrolling("Runs", f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def _config(runs: list[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.info["config"])
    rows = []
    for name in names:
        values = _distinct(run.info["config"].get(name, "(absent)") for run in runs)
        rows.append(f"<tr><th scope='row'>{text(name)}</th><td>{text(' | '.join(values) or '–')}</td></tr>")
    return scrolling("Settings", f'<table class="config"><tbody>{"".join(rows)}</tbody></table>')


def build(material: Material) -> Section | None:
    """The header section; nothing without a run."""
    runs = material.runs
    if not runs:
        return None
    seconds = [_seconds(run) for run in runs]
    facts = "".join(
        f'<div class="{"wide" if len(value) > 80 else "fact"}"><dt>{name}</dt><dd>{value}</dd></div>'
        for name, value in _facts(material, seconds)
    )
    open_ended = [run for run in runs if run.status != "finished"]
    notice = ""
    if open_ended:
        which = ", ".join(f"{run.info['name']} ({run.status})" for run in open_ended)
        notice = f'<p class="notice">{len(open_ended)} of {len(runs)} runs did not finish: {text(which)}.</p>'
    details = f"<details><summary>Runs and commands</summary>{_table(runs, seconds)}</details>"
    settings = f"<details><summary>Settings</summary>{_config(runs)}</details>"
    return Section("What was run", f'{notice}<dl class="facts">{facts}</dl>{details}{settings}')
