r"""Plain numbers as people and models write them, read exactly and without a computer algebra system.

Most gold answers and most completions end in a plain number; reading it here costs microseconds and cannot blow up:
powers are of ten and bounded, there is no factorial, and the length is bounded. A numeral is a finished number: digits
with separators, decimals, recurring decimals, a fraction, a mixed number, scientific notation, a scale word
(`2 million`), number words; with a sign, a currency, a percent sign and a known unit (`units`). `84/2` is still to be
worked out, as is `3 \cdot 4`; only `lenient` reading, for gold answers, takes the first.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import floor, log10

from tokencredit.tasks import units
from tokencredit.tasks.words import CHINESE_SCALES, SCALES, read_words

MAX_LENGTH = 160
MAX_EXPONENT = 400  # of ten, in scientific notation
DIGITS = 6  # significant digits that a decimal must share with a number it cannot write exactly

_WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]{1,3}(?:[ ][0-9]{3})+(?![0-9/]|[ ]?/)|[0-9]+"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?P<currency>(?:US|USD|A|C)?\s?\\?\$|€|£|¥|₹|Rs\.?\s)?\s*(?P<sign_after>[-+]?)\s*
        (?:(?P<whole>{_WHOLE})?(?P<decimals>\.[0-9]+|\.(?=\\|\())?(?P<recurring>\\(?:overline|bar|dot)\s*\{{[0-9]+\}}|\([0-9]+\))?
           (?:[eE](?P<exponent>[-+]?[0-9]{{1,4}})|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*(?P<power>[-+]?[0-9]{{1,4}})\s*\}}|(?P<digit>[0-9])(?![0-9])))?)
        (?:\s+(?P<fraction>[0-9]+\s?/\s?[0-9]+)|\s?/\s?(?P<divisor>[0-9]+))?
        (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_PERCENT = re.compile(r"\s*(?:%|per\s?cent\b|percent\b|pct\b)", re.IGNORECASE)
_SCALE = re.compile(rf"\s*(?:({'|'.join(SCALES)})\b|([{''.join(CHINESE_SCALES)}]+))(.*)", re.IGNORECASE | re.DOTALL)
_FRACTION = re.compile(r"\\frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORDS = re.compile(
    r"(?:(?:minus|negative) )?[A-Za-z-]+(?: [A-Za-z-]+){0,12}|[负零〇一二两三四五六七八九十百千万亿分之]+"
)


@dataclass(frozen=True)
class Numeral:
    """An exact value as written. A percent sign is kept, for `50 %` may answer a gold `50` as well as a gold `0.5`;
    `digits` are the significant digits of a decimal, None for what is exact by its form; `unit` are the measures
    written with it, None where there is no unit.
    """

    value: Fraction
    percent: bool = False
    digits: int | None = None
    unit: tuple[str, ...] | None = None

    def equals(self, other: "Numeral") -> bool:
        """Equal values and no different units; with one percent sign among the two, either reading of it counts. A
        decimal is equal to a fraction that no decimal writes where they share `DIGITS` significant digits.
        """
        if self.unit is not None and other.unit is not None and self.unit != other.unit:
            return False
        if self.percent != other.percent and (self.unit or other.unit):
            return False
        if self._same(self.value, other):
            return True
        return self.percent != other.percent and self._same(
            self.value / 100 if self.percent else self.value * 100, other
        )

    def _same(self, value: Fraction, other: "Numeral") -> bool:
        if value == other.value:
            return True
        written = [digits for digits in (self.digits, other.digits) if digits is not None]
        endless = [number for number in (value, other.value) if not _ends(number)]
        return len(written) == 1 and written[0] >= DIGITS and len(endless) == 1 and agree(value, other.value)


def agree(a: Fraction, b: Fraction) -> bool:
    """Whether two numbers differ by less than one unit in the sixth significant digit of the second."""
    if b == 0 or (a < 0) != (b < 0):
        return a == b
    return abs(a - b) < Fraction(10) ** (floor(_log10(abs(b))) - DIGITS + 1)


def _log10(value: Fraction) -> float:
    # of numerator and denominator apart: a quotient of large integers need not fit a float
    estimate = len(str(value.numerator)) - len(str(value.denominator))
    return estimate + log10(value / Fraction(10) ** estimate)


def _ends(value: Fraction) -> bool:
    divisor = value.denominator
    for prime in (2, 5):
        while divisor % prime == 0:
            divisor //= prime
    return divisor == 1


def read(text: str, lenient: bool = False, bare_gold: bool = True) -> Numeral | None:
    r"""The plain number that `text` (already tidied) is, or None.

    lenient     a quotient that is a whole number, `84/2`, and a bare power of ten, `10^{5}`, count as numbers
    bare_gold   the gold answer has no unit, or this is an answer to such: a capital such as `N` may be a unit
    """
    if len(text) > MAX_LENGTH:
        return None
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    if _WORDS.fullmatch(text):
        return _spoken(text, bare_gold)
    text = _FRACTION.sub(r" \1/\2", text).strip()
    text = re.sub(r"^([-+])\s+(?=[0-9]+/)", r"\1", text)
    if lenient and (power := re.fullmatch(r"(-?)10\s*\^\s*\{?(-?[0-9]{1,3})\}?", text)):
        return Numeral(Fraction(10) ** int(power[2]) * (-1 if power[1] else 1))
    match = _NUMBER.fullmatch(text)
    if not match or (match["sign"] and match["sign_after"]):
        return None
    value = _value(match, lenient)
    return None if value is None else _with_rest(value, match, bare_gold)


def _spoken(text: str, bare_gold: bool) -> Numeral | None:
    """A number in words, with a known unit after it: `ten dollars`."""
    if (value := read_words(text)) is not None:
        return Numeral(value)
    words = text.split()
    for place in range(len(words) - 1, 0, -1):
        value = read_words(" ".join(words[:place]))
        unit = units.unit_of(" ".join(words[place:]), bare_gold=bare_gold)
        if value is not None and unit is not None:
            return Numeral(value, unit=unit)
    return None


def _with_rest(value: Fraction, match: re.Match[str], bare_gold: bool) -> Numeral | None:
    """The numeral with what follows its digits: a scale, a percent sign, a unit."""
    rest = match["rest"]
    if (scale := _SCALE.fullmatch(rest)) and not units.is_chinese(rest):  # 千 of 千米 scales the metre, not the number
        if scale[2] and len(scale[2]) > 1 and scale[2] not in ("百万", "千万", "万亿", "百亿", "千亿"):
            return None
        value *= SCALES[scale[1].lower()] if scale[1] else _product(scale[2])
        rest = scale[3]
    percent = _PERCENT.match(rest)
    rest = rest[percent.end() :] if percent else rest
    sign = _currency(match["currency"])
    unit = _unit(rest, bare_gold, sign)
    if rest.strip() and (unit is None or percent):
        return None
    if sign:
        unit = unit or (sign,)
    negative = "-" in (match["sign"], match["sign_after"])
    exact = match["fraction"] or match["divisor"] or match["recurring"]
    written = len(
        ((match["whole"] or "").replace(",", "").replace(" ", "") + (match["decimals"] or "")[1:]).lstrip("0")
    )
    digits = None if exact or "." not in (match["decimals"] or "") else written
    return Numeral(-value if negative else value, percent is not None, digits, unit)


def _product(signs: str) -> int:
    scale = 1
    for sign in signs:
        scale *= CHINESE_SCALES[sign]
    return scale


def _currency(written: str | None) -> str | None:
    if not written:
        return None
    return "rupee" if written.startswith("Rs") else units.currency(written[-1])


def _unit(rest: str, bare_gold: bool, sign: str | None) -> tuple[str, ...] | None:
    """The measures in the text after a number, None where there is none or it is no unit. A currency `sign` before the
    number is the head of what follows it: `$5 per day`.
    """
    if not rest.strip():
        return None
    marked = _TEXT.search(rest) is not None
    plain = _TEXT.sub(lambda m: m[1], rest)
    if marked and _TEXT.sub("", rest).strip(" ^{}23/."):
        plain = " ".join(_TEXT.sub(lambda m: f" {m[1]} ", rest).split())
        marked = False
    if plain.strip().lstrip("\\") in units.CURRENCIES:
        return None if sign else (units.currency(plain),)
    adjacent = not rest[0].isspace() and not marked
    plain = plain.replace("\\cdot", "·")
    unit = units.unit_of(plain, adjacent, marked, bare_gold)
    if sign and (unit is None or unit[:1] != (sign,)):
        return units.unit_of(f"{sign} {plain.strip()}")
    return unit


def _value(match: re.Match[str], lenient: bool) -> Fraction | None:
    whole, decimals, fraction, divisor = (match[key] for key in ("whole", "decimals", "fraction", "divisor"))
    decimals = decimals or ""
    power = match["exponent"] or match["power"] or match["digit"]
    if (whole is None and decimals in ("", ".")) or (match["recurring"] and not decimals):
        return None
    if (fraction or divisor) and (whole is None or decimals or power or match["recurring"]):
        return None
    value = Fraction((whole or "0").replace(",", "").replace(" ", "") + decimals.rstrip("."))
    if match["recurring"]:
        digits = re.sub(r"[^0-9]", "", match["recurring"])
        value += Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** (len(decimals) - 1))
    if power:
        normal = 1 <= value < 10 or match["exponent"] or lenient
        if not normal or abs(int(power)) > MAX_EXPONENT:
            return None
        return value * Fraction(10) ** int(power)
    if not (fraction or divisor):
        return value
    numerator, below = map(int, fraction.split("/")) if fraction else (0, int(divisor))
    if below == 0:
        return None
    value = value + Fraction(numerator, below) if fraction else value / below
    if lenient:
        return value
    proper = numerator < below if fraction else value.denominator > 1
    return value if proper else None
