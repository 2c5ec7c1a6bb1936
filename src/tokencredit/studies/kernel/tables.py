"""What the terminal shows of the kernel study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokencredit.progress import plain_table

WORDS = {"r2_fresh": "the batch's part", "slope": "real / predicted", "r2_completions": "completions"}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """R² by learning rate, and the parts of a predicted change."""
    figures, rates = result["figures"], result["influence"]["rates"]
    columns = [name for name in WORDS if name in rates[0]]
    first = plain_table(
        "Real steps against the prediction, held-out log-probabilities",
        *(f">{name}" for name in ("of the rate", "R², 95 % by prompt", *(WORDS[name] for name in columns))),
    )
    for row in rates:
        rest = (figures[row[name]].numbers(".4f")[0] for name in columns)
        first.add_row(f"{row['factor']:g}", figures[row["r2"]].text(".4f"), *rest)
    if not result["shares"]:
        return [first]
    second = plain_table(
        "Who makes the predicted change of the tokens that send",
        "sender",
        "share of the squared change, 95 % by prompt",
    )
    for name, figure in result["shares"].items():
        if name.startswith("share/") and name.count("/") == 1:
            second.add_row(name.split("/")[1], figures[figure].text(".3f"))
    return [first, second]
