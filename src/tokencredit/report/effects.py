"""The token view of pivotality: completions with signed effects, their certainty, and the success probability along the
way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokencredit.report.section import Section, compact, text

MAX_TOKENS = 1200  # of a completion
READING = (
    " Point at a token for its interval and for what else could have been said, with the success rate of each. Below"
    " the text: the success probability after every token, with its band."
)


def effects_section(view: Sequence[Mapping[str, Any]], threshold: float = 0.0, note: str = "") -> Section:
    """The completions that were chosen; long ones are cut, and the page says so.

    A completion has prompt, correct, reason, tokens [T], role, value with low and high [T+1], pi [T], alternatives [T]
    of {text, num, correct, share}, proxies {name: [T]}, and before_after and replace with value, low, high and
    certainty [T]. Underlined are its `pivotal` {estimand: [T]}, where it has them, else effects of `threshold` or more.
    """
    note = note or (
        "Blue: the token raises the success probability; orange: it lowers it. The fainter, the less certain that there"
        f" is an effect of that sign. Underlined: its size is {threshold:g} or more, of that sign with probability over"
        " 0.8."
    )
    data = {"rows": [_cut(row) for row in view], "threshold": threshold}
    return Section("Tokens and their effects", f'<p class="note">{text(note + READING)}</p>', data, "effects.js")


def _cut(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: _first(value, MAX_TOKENS + (key in ("value", "low", "high"))) for key, value in row.items()}
    return compact({**shown, "success": row["correct"], "num_tokens": len(row["tokens"])})


def _first(value: Any, limit: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _first(item, limit) for key, item in value.items()}
    return value[:limit] if isinstance(value, list) else value
