"""What the terminal shows of the study of entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokencredit.progress import plain_table

MILLI = 1e3


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Every update, predicted and by fresh samples; then the figures of the whole study."""
    figures = result["figures"]
    updates = plain_table(
        "Change of mean token entropy by the next step, in thousandths of a nat, learning rate"
        f" {result['about']['lr']:g}",
        *(f">{name}" for name in ("update", "linear", "true, odd half", "quadratic", "true, whole")),
    )
    for k, update in enumerate(result["updates"], start=1):
        names = [update[name] for name in ("linear", "true", "quadratic", "true_whole")]
        updates.add_row(str(k), *(figures[name].text(".3g", MILLI) for name in names))
    whole = plain_table("Over all updates", "figure", "value (95 %, by prompt)", "unit")
    spread = f"relative_error_spread_{result['sub_batch']}"
    for name in ("slope", "r2", "relative_error_mean", spread, "precision_floor", "linear_range"):
        whole.add_row(name, figures[name].text(".4g"), figures[name].unit)
    return [updates, whole]
