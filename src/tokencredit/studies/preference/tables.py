"""What the terminal shows of the preference study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokencredit.figure import number
from tokencredit.progress import plain_table


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The arms, and their differences."""
    return [_arms(result), _contrasts(result)]


def _arms(result: Mapping[str, Any]) -> Table:
    figures, config = result["figures"], result["config"]
    shown = plain_table(
        f"{config['rollouts']:,} rollouts each, {config['steps']} steps of {config['pairs']} pairs, {config['seeds']}"
        f" seeds; {result['prompts']} held-out prompts",
        *("=arm", ">pairs", ">rate", ">pass@1", ">entropy", ">length"),
    )
    base = result["base"]
    row = (figures[base["pass@1"]].text(), number(base["entropy"], ".3f"), number(base["length"], ".1f"))
    shown.add_row("(untrained)", "", "", *row)
    for arm in result["arms"]:
        own = {name: figures[key] for name, key in arm["figures"].items()}
        row = (own["pass@1"].text(), number(own["entropy"].value, ".3f"), number(own["length"].value, ".1f"))
        shown.add_row(arm["name"], number(own["pairs"].value, ",.0f"), f"{arm['rate']:g}", *row)
    return shown


def _contrasts(result: Mapping[str, Any]) -> Table:
    shown = plain_table("Differences of pass@1, paired by seed and prompt", "=arm", "=less", ">difference", "verdict")
    for each in result["contrasts"]:
        difference = result["figures"][each["difference"]].text(".3f", sign=True)
        shown.add_row(each["arm"], each["other"], difference, each["verdict"])
    return shown
