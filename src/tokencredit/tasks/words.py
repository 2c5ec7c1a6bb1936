"""Whole numbers in words, English and Chinese: `forty-two`, `minus three`, `one thousand two hundred`, `四十二`.

Words that name a number also decide what a unit cannot be: see `units`.
"""

import re
from fractions import Fraction

from tokencredit.tasks.vocabulary import WORDS

VALUES = {word: value for value, word in enumerate(WORDS["small"])} | {
    word: 20 + 10 * place for place, word in enumerate(WORDS["tens"])
}
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}

_DIGITS = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_PLACES = {"十": 10, "百": 100, "千": 1000}
CHINESE_SCALES = {"百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8}
_CHINESE = re.compile(r"[负]?[零〇一二两三四五六七八九十百千万亿]{1,20}")


def read_words(text: str) -> Fraction | None:
    """The number that `text` names in words and nothing else, or None.

    >>> read_words("one hundred and twenty-three"), read_words("三分之一"), read_words("two fifty")
    (Fraction(123, 1), Fraction(1, 3), None)
    """
    text = text.strip()
    if "分之" in text:
        divisor, _, number = text.partition("分之")
        below, above = _chinese(divisor), _chinese(number)
        return Fraction(above, below) if above is not None and below else None
    if _CHINESE.fullmatch(text):
        value = _chinese(text)
        return None if value is None else Fraction(value)
    return _english(text)


def _english(text: str) -> Fraction | None:
    words = re.fullmatch(r"(?:(minus|negative) )?([a-z]+(?:[ -][a-z]+){0,12})", text.lower())
    if not words:
        return None
    total, group, last, room = 0, 0, 10**15, 100  # a word fits where its value is below `room`, a scale below `last`
    names = re.split(r"[ -]", words[2])
    for place, name in enumerate(names):
        value = VALUES.get(name, -1)
        if name == "and" and 0 < place < len(names) - 1 and names[place - 1] in SCALES:
            continue
        if 0 < value < room or (value == 0 and len(names) == 1):
            group, room = group + value, 10 if value >= 20 else 1
        elif name == "hundred" and 0 < group < 10:
            group, room = group * 100, 100
        elif name in ("thousand", "million", "billion", "trillion") and group and SCALES[name] < last:
            total, group, last, room = total + group * SCALES[name], 0, SCALES[name], 100
        else:
            return None
    return Fraction((total + group) * (-1 if words[1] else 1))


def _chinese(text: str) -> int | None:
    """The value of Chinese numerals written by places; None where they are not, as in 一二."""
    if not _CHINESE.fullmatch(text) or text == "负":
        return None
    negative, text = text.startswith("负"), text.lstrip("负")
    total = section = digit = 0
    place, previous = 10**4, ""
    for sign in text:
        if sign in _DIGITS:
            if digit or (previous in _DIGITS and previous not in "零〇"):
                return None
            digit = _DIGITS[sign]
        elif sign in _PLACES:
            if _PLACES[sign] >= place or (not digit and (sign != "十" or section)):
                return None
            section, place, digit = section + (digit or 1) * _PLACES[sign], _PLACES[sign], 0
        else:
            scale = CHINESE_SCALES[sign]
            if not (total + section + digit):
                return None
            total = (total + section + digit) * scale if scale == 10**8 else total + (section + digit) * scale
            section, digit, place = 0, 0, 10**4
        previous = sign
    value = total + section + digit
    return -value if negative else value
