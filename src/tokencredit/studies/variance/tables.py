"""What the terminal shows of the variance study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokencredit.figure import Figure, number
from tokencredit.progress import plain_table

COLUMNS = {"relative_variance": "noise", "truth_angle": "angle °", "ess": "ESS", "efficiency_ratio": "per token"}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """One table per checkpoint, a row per method."""
    return [_table(result["figures"], block, result["config"]["baseline"]) for block in result["checkpoints"]]


def _table(figures: Mapping[str, Figure], block: Mapping[str, Any], baseline: str) -> Table:
    shown = plain_table(
        f"{block['label']}, {block['num']['prompts']} prompts, 95 % intervals over prompts",
        *("=method", *(f">{name}" for name in COLUMNS.values())),
        caption=(
            f"noise: tr Cov / |mean|², prompts; angle: to the true policy gradient; ESS: rollouts of {baseline} that"
            f" one is worth, with bias; per token: signal per credited token, against {baseline}; –: not resolved"
        ),
        caption_justify="left",
    )
    for name, each in block["methods"].items():
        there = each["figures"]
        shown.add_row(name, *(figures[there[column]].text(".2g") if there else number(None) for column in COLUMNS))
    return shown
