"""What the terminal shows of a noise scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokencredit.figure import number
from tokencredit.progress import plain_table
from tokencredit.studies.noise_scale.question import RUNS


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The figures with their intervals and, where the noise was split, the grid."""
    return [_figures(result), *([_grid(result)] if result["grid"] else [])]


def _figures(result: Mapping[str, Any]) -> Table:
    shown = plain_table(
        f"Gradient noise of {result['method']} at {result['checkpoint']}, {result['prompts']} prompts x"
        f" {result['group']} rollouts, seed {result['seed']}",
        *("figure", ">value", ">95 %, by prompt", "unit"),
    )
    for figure in result["figures"].values():
        shown.add_row(figure.label, *figure.numbers(".3g"), figure.unit)
    return shown


def _grid(result: Mapping[str, Any]) -> Table:
    """Predicted variance by prompts and rollouts, that of the batch they are compared with being 1."""
    grid = result["grid"]
    groups, prompts = (sorted({row[name] for row in grid}) for name in ("group", "prompts"))
    shown = plain_table(
        f"Predicted variance with leave-one-out credit, {result.get('reference', RUNS)} = 1; prompts across, rollouts"
        " of each down",
        *(">", *(f">{each}" for each in prompts)),
    )
    cell = {(row["group"], row["prompts"]): row["relative"] for row in grid}
    for each in groups:
        shown.add_row(str(each), *(number(cell[each, some], ".2g") for some in prompts))
    return shown
