"""Plain numbers as people and models write them, read exactly and without a computer algebra system.

Most gold answers and most completions end in a plain number; reading it here costs microseconds and cannot blow up:
there is no power, no factorial and no exponent in this grammar, and the length is bounded.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 120

_TYPOGRAPHY = str.maketrans(
    {"−": "-", "–": "-", "－": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "％": "%", "⁄": "/"}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_SPACING = re.compile(r"(?<!\\)(?:\\[,;:! ]|~)")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_WRAPPERS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$(?P<inner>[^$]*)\$\$",
        r"\$(?P<inner>(?:[^$\\]|\\.)+)\$",
        r"\\\((?P<inner>.*)\\\)",
        r"\\\[(?P<inner>.*)\\\]",
        r"\*\*(?P<inner>[^*]*)\*\*",
        r"<(?P<tag>[A-Za-z]\w*)>(?P<inner>.*)</(?P=tag)>",
        r"(?i:(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)\s*:?)(?P<inner>.*)",
    )
)
_NUMBER = re.compile(
    r"""(?P<sign>[-+]?)\s*(?:\\?\$|€|£|¥|₹)?\s*(?P<sign_after>[-+]?)
        (?P<whole>[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)?(?P<decimals>\.[0-9]*)?
        (?:\s+(?P<fraction>[0-9]+/[0-9]+)|/(?P<divisor>[0-9]+))?
        \s*(?P<percent>\\?%|\s[Pp]ercent)?(?P<unit>\s+.*)?""",
    re.VERBOSE | re.DOTALL,
)
# Units may follow a number and are not compared. Words that change the number's meaning are no units, nor are single
# letters (variables), so "5 million" and "5 x" are left to the algebra system.
_UNIT = re.compile(
    r"\s+(?:[A-Za-z]{3,}|kg|km|cm|mm|ml|mL|mg|ft|lb|oz|hr|mi|am|pm|of|in|an?)(?:\s+[A-Za-z]{2,}|/[A-Za-z]+){0,4}\.?"
)
_NOT_UNITS = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|score|half|halves|thirds?|quarters?|fourths|tenths|hundredths|percent|squared|cubed"
    r"|plus|minus|times|mod|over|choose|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|and|or|not|more|less|than|least|most|about)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Numeral:
    """An exact value as written; a percent sign is kept, for `50 %` may answer a gold `50` as well as a gold `0.5`."""

    value: Fraction
    percent: bool = False
    terminating: bool = True

    def equals(self, other: "Numeral") -> bool:
        """Exact equality; with one percent sign among the two, either reading of it counts."""
        if self.value == other.value:
            return True
        return self.percent != other.percent and (
            self.value / 100 == other.value if self.percent else self.value == other.value / 100
        )


def tidy(text: str) -> str:
    """`text` without what surrounds an answer: dollar signs of mathematics, bold marks, a markup element, spacing
    commands, full stop.
    """
    text = _SPACING.sub(lambda match: " " if match[0] in ("\\ ", "~") else "", text.translate(_TYPOGRAPHY))
    for _ in range(8):
        before = text
        text = text.strip()
        if text.endswith("."):
            text = text[:-1]
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match["inner"].strip()
        if text == before:
            break
    return text


def read(text: str) -> Numeral | None:
    """The plain number that `text` (already tidied) is, or None: an optional currency, thousands separators, decimals,
    `a/b`, `1 1/2`, a percent sign, and a unit in words, which is ignored."""
    if len(text) > MAX_LENGTH:
        return None
    text = _TEXT.sub(r" \1 ", text)
    text = _FRACTION.sub(r" \1/\2", text).strip()
    match = _NUMBER.fullmatch(re.sub(r"^([-+])\s+(?=[0-9]+/)", r"\1", text))
    if not match or (match["sign"] and match["sign_after"]) or not _is_unit(match["unit"]):
        return None
    value = _value(match)
    if value is None:
        return None
    negative = "-" in (match["sign"], match["sign_after"])
    terminating = not (match["fraction"] or match["divisor"])
    return Numeral(-value if negative else value, percent=bool(match["percent"]), terminating=terminating)


def _is_unit(unit: str | None) -> bool:
    if unit is None or not unit.strip():
        return True
    return bool(_UNIT.fullmatch(unit)) and not _NOT_UNITS.search(unit)


def _value(match: re.Match[str]) -> Fraction | None:
    whole, decimals, fraction = match["whole"], match["decimals"] or "", match["fraction"]
    if (whole is None and decimals in ("", ".")) or (fraction and (whole is None or decimals)):
        return None
    value = Fraction((whole or "0").replace("{,}", "").replace(",", "") + decimals.rstrip("."))
    numerator, divisor = map(int, fraction.split("/")) if fraction else (0, int(match["divisor"] or 1))
    if divisor == 0:
        return None
    return value + Fraction(numerator, divisor) if fraction else value / divisor
