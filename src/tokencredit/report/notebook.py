"""What a notebook shows: a completion with numbers per token, and the findings and figures of a study.

Both are HTML without a script and without a request: every text is escaped, and a number is read by pointing at its
token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokencredit.figure import Figure, number
from tokencredit.lm.prompts import Prompt, prompt_text
from tokencredit.report.figures import said, shown, table
from tokencredit.report.section import text
from tokencredit.report.tokens import COLUMNS

POSITIVE, NEGATIVE, SIZE = "0,114,178", "230,129,0", "0,148,108"
DEEP, FAINT, MONO = 0.78, "opacity:.65", "font-family:ui-monospace,Menlo,Consolas,monospace"
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"
)
MAX_TOKENS = 4000


@dataclass(frozen=True)
class TokenView:
    """A completion to look at in a notebook: a line of its tokens for every score, coloured by it.

    tokens   [T] what every token adds to the text
    scores   {name: [T] numbers}; None and NaN are not defined. What has both signs is orange below 0 and blue above it
    prompt   text or messages
    success  of the completion; None where nobody judged it

        TokenView.of(Run.open("runs/gtpo").tokens(20)[0], "credit", "entropy")

    ValueError where a score has not one number per token.
    """

    tokens: Sequence[str]
    scores: Mapping[str, Sequence[float | None]]
    prompt: Prompt = ""
    success: bool | None = None
    reward: float | None = None
    reason: str | None = None
    roles: Sequence[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, values in self.scores.items():
            if len(values) != len(self.tokens):
                raise ValueError(f"{name} has {len(values)} numbers for {len(self.tokens)} tokens")

    @classmethod
    def of(cls, record: Mapping[str, Any], *names: str) -> TokenView:
        """The view of a recorded completion (`Run.tokens`), with these of its scores; all of them where none is named.
        KeyError says which scores it has.
        """
        known = {name: value for name, value in record.items() if name not in COLUMNS and isinstance(value, list)}
        if missing := [name for name in names if name not in known]:
            raise KeyError(f"the completion has no {', '.join(missing)}; it has {', '.join(known)}")
        scores = {name: known[name] for name in names or known}
        rest = {name: record.get(name) for name in ("success", "reward", "reason")}
        return cls(record["tokens"], scores, record.get("prompt") or "", roles=record.get("role"), **rest)

    def _repr_html_(self) -> str:
        asked = f'<div style="white-space:pre-wrap;{MONO};{FAINT}">{visible(prompt_text(self.prompt))}</div>'
        lines = "".join(self._line(name, values) for name, values in self.scores.items())
        left = len(self.tokens) - MAX_TOKENS
        cut = f'<div style="{FAINT}">{left} further tokens are not shown</div>' if left > 0 else ""
        parts = [asked if self.prompt else "", self._judged(), lines, cut]
        return f'<div class="tokencredit" style="max-width:70em">{"".join(parts)}</div>'

    def _judged(self) -> str:
        verdict = {True: "✓ correct", False: "✕ incorrect"}.get(self.success)  # type: ignore[arg-type]
        parts = [
            verdict,
            self.reward is not None and f"reward {self.reward:g}",
            self.reason,
            f"{len(self.tokens)} tokens",
        ]
        return f'<div style="margin:.4em 0">{" · ".join(text(part) for part in parts if part)}</div>'

    def _line(self, name: str, values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None and math.isfinite(value)]
        most = max(map(abs, known), default=0.0)
        signed = min(known, default=0.0) < 0 < max(known, default=0.0) or name == "credit"
        spans = "".join(
            map(self._token, self.tokens[:MAX_TOKENS], values, [most] * len(values), [signed] * len(values))
        )
        ends = f"{number(-most, '.3g')} to {number(most, '.3g')}" if signed else f"0 to {number(most, '.3g')}"
        head = f'<b>{text(name)}</b> <span style="{FAINT}">{ends}</span>'
        body = f'<div style="white-space:pre-wrap;line-height:1.9;{MONO}">{spans}</div>'
        return f'<div style="margin:.5em 0">{head}{body}</div>'

    def _token(self, token: str, value: float | None, most: float, signed: bool) -> str:
        if value is None or not math.isfinite(value):
            return f'<span title="not defined" style="text-decoration:underline dotted">{visible(token)}</span>'
        colour = SIZE if not signed else POSITIVE if value > 0 else NEGATIVE
        deep = DEEP * abs(value) / most if most else 0.0
        return (
            f'<span title="{number(value, ".4g")}" style="background:rgba({colour},{deep:.3f})">{visible(token)}</span>'
        )


def visible(token: str) -> str:
    """A text as escaped HTML in which nothing is hidden: what would vanish or reorder is written as its code point."""
    if not token:
        return "…"
    parts = re.split(f"({HIDDEN.pattern})", token)
    written = [f"⟨U+{ord(part):04X}⟩" if HIDDEN.fullmatch(part) else text(part) for part in parts if part]
    return "".join(written).replace("\n", '<span style="opacity:.45">↵</span>\n')


def findings_and_figures(result: Mapping[str, Any]) -> str:
    """A study's result: what it found, and its figures folded under it."""
    figures: Mapping[str, Figure] = result.get("figures", {})
    rows = [[text(figure.label or name), shown(figure), text(figure.unit)] for name, figure in figures.items()]
    listed = table("Figures", ("figure", "value", "unit"), rows)
    folded = f"<details><summary>{len(rows)} figures</summary>{listed}</details>"
    command = f"<p><code>{text(result['command'])}</code></p>" if result.get("command") else ""
    return f'<div class="tokencredit"><b>{text(result.get("study", "study"))}</b>{said(result)}{folded}{command}</div>'
