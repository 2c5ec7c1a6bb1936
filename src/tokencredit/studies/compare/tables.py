"""What the terminal shows of a comparison, and its table for a page of documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokencredit.figure import number
from tokencredit.progress import plain_table

HEADS = {
    "method": "method",
    "rate": "learning rate",
    "pass@1": "final pass@1",
    "d pass@1": "difference",
    "v pass@1": "verdict",
    "d area": "mean pass@1 over the budget, difference",
    "v area": "verdict",
    "budget_to": "{unit} to {reach}",
    "d budget_to": "difference",
    "v budget_to": "verdict",
    "seconds": "training seconds",
}


def tables(result: Mapping[str, Any]) -> list[Table | str]:
    """Final pass@1 with its verdict, and that on learning speed (mean pass@1 over the budget), for a terminal of 80
    columns.
    """
    shown = plain_table("", "=method", ">pass@1", ">difference", "verdict", "speed")
    for row in rows_of(result):
        value = row["pass@1"].split(" ")[0]
        shown.add_row(row["method"], value, row["d pass@1"], row["v pass@1"], row["v area"])
    told = f"Differences from {result['baseline']}, same seeds; verdicts after Holm."
    return [shown, f"In brackets: 95 %, over seeds and prompts. {told}"]


def rows_of(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row per method: its learning rate, final figures, and what differs from the baseline with the verdicts."""
    figures, found = result["figures"], []
    verdicts = {(row["method"], row["measure"]): row for row in result["verdicts"]}

    def told(name: str | None, sign: bool = False) -> str:
        figure = figures.get(name)
        return number(None) if figure is None else figure.text(sign=sign)

    for method in result["methods"]:
        row = {
            "method": method["name"],
            "rate": f"{method['learning_rate']:.3g}",
            "pass@1": told(method["figures"]["pass@1"]),
        }
        for measure in ("pass@1", "area", "budget_to"):
            verdict = verdicts.get((method["name"], measure))
            row[f"d {measure}"] = told(verdict["difference"], sign=True) if verdict else number(None)
            row[f"v {measure}"] = verdict["verdict"].replace(" at this budget", "") if verdict else number(None)
        row |= {"budget_to": told(method["figures"].get("budget_to")), "seconds": told(method["figures"]["seconds"])}
        row |= {name: told(method["figures"][name]) for name in ("area", "entropy", "length")}
        found.append(row)
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The table for a page of documentation, with the command that made it."""
    from tokencredit.studies.compare.verdicts import percent

    unit, reach = result["config"]["budget"]["unit"], percent(result["settings"]["reach"])
    heads = {key: head.format(unit=unit, reach=reach) for key, head in HEADS.items()}
    lines = [f"| {' | '.join(heads.values())} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(row[key] for key in heads)} |" for row in rows_of(result)]
    target = f"{result['target']['value']:.3f}"
    along, last = result["prompts"]["marks"], result["prompts"]["final"]
    note = (
        f"`{result['command']}`: {result['config']['budget']['amount']:,g} {unit} per run, seeds"
        f" {', '.join(map(str, result['seeds']))}, {last} held-out prompts ({along} along the way); 95 % intervals over"
        f" seeds and prompts, differences from {result['baseline']} by seed, verdicts after Holm; {reach} of the"
        f" baseline's final pass@1 is {target}."
    )
    return "\n".join([*lines, "", note])
