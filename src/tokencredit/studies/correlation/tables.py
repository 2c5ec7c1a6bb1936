"""What the terminal shows of the correlation study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokencredit.figure import number
from tokencredit.progress import plain_table


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Share of the squared effects in the top tokens of every proxy, by estimand: exact where it is known, else from
    rollouts.
    """
    source = "exact" if result["exact"] else "sampled"
    blocks = {name: block["measures"]["captured"] for name, block in result[source].items()}
    shown = plain_table(
        "Share of the squared effects in the tokens that a proxy ranks highest, 95 % intervals over prompts",
        *("=proxy", *(f">{name}" for name in blocks)),
    )
    for proxy in dict.fromkeys(proxy for block in blocks.values() for proxy in block):
        named = (result["figures"].get(block.get(proxy)) for block in blocks.values())
        shown.add_row(proxy, *(number(None) if each is None else each.text(".2f") for each in named))
    return [shown]
