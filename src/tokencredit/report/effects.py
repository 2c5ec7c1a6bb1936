"""The token view of pivotality: completions with signed effects, their certainty, and the success probability along the
way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokencredit.report.section import Section, compact

MAX_TOKENS = 600  # of a completion


def effects_section(view: Sequence[Mapping[str, Any]], threshold: float) -> Section:
    """The completions that the study chose; long ones are cut, and the page says so."""
    rows = [_cut(row) for row in view]
    note = (
        '<p class="note">Blue: the token raises the success probability; orange: it lowers it. The fainter, the less'
        f" certain that there is an effect of that sign. Underlined: its size is {threshold:g} or more, of that sign"
        " with probability over 0.8. Point at a token for its interval and for what else could have been said, with"
        " the success rate of each. Below the text: the success probability after every token, with its band.</p>"
    )
    data = {"rows": rows, "threshold": threshold}
    return Section("Tokens and their effects", note, data, "effects.js")


def _cut(row: Mapping[str, Any]) -> dict[str, Any]:
    num = len(row["tokens"])
    shown = {key: _first(value, MAX_TOKENS + (key in ("value", "low", "high"))) for key, value in row.items()}
    return compact({**shown, "num_tokens": num})


def _first(value: Any, limit: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _first(item, limit) for key, item in value.items()}
    return value[:limit] if isinstance(value, list) else value
