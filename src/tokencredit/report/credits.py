"""Completions under several kinds of credit: the same tokens, one line under the other, each kind with a scale of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokencredit.report.figures import note
from tokencredit.report.section import Section, text
from tokencredit.report.tokens import packed

MAX_TOKENS = 1200  # of a completion
READING = (
    "Blue: the token is made more likely; orange: less likely; the stronger, the more of it, each line on its own"
    " scale. Point at a token, or reach it with the arrow keys, for its numbers in all lines."
)


@dataclass(frozen=True)
class CreditKind:
    """One line: the column of the rows that it shows, what it is called, and what to know of it."""

    name: str
    label: str
    about: str = ""


def credits_section(
    title: str, rows: Sequence[Mapping[str, Any]], kinds: Sequence[CreditKind], said: str = ""
) -> Section:
    """The completions `rows`, each with a line per kind.

    rows   as `Run.tokens` gives them: prompt (text, or messages), tokens, reward, success, reason, role or None, and
           one list of numbers per token for every kind, and for any other score that is to be read when pointed at
    said   text above them

    A kind that a row lacks is left out of it. ValueError where no row has any of the kinds.
    """
    if not any(row.get(kind.name) is not None for row in rows for kind in kinds):
        raise ValueError(f"no completion has any of the columns {', '.join(kind.name for kind in kinds)}")
    prompts: list[Any] = []
    roles: list[str] = []
    data = {
        "kinds": [{"name": kind.name, "label": kind.label, "about": kind.about} for kind in kinds],
        "rows": [packed(row, MAX_TOKENS, prompts, roles) for row in rows],
        "prompts": prompts,
        "roles": roles,
    }
    return Section(title, (f"<p>{text(said)}</p>" if said else "") + note(text(READING)), data, "credits.js")
