r"""What may follow a number without changing it: units that are known, and nothing else.

A unit is a measure (`cm`, `dollars`, `m/s`, `\text{h}`), a count noun (`apples`), or a short phrase of these with words
that only describe (`red`, `total`, `per`, `of`). The lists are closed: a word that is in none of them is no unit. So
`millions`, `dozens`, `sevenths`, `factorial`, `doubled`, `or`, `but`, `fifty` need not be thought of. Letters are no
units: `h` may be hours or a variable. A single letter counts only as text (`\text{h}`), in a quotient after a space
(`m/s`), or, where the gold answer is a bare number, as one of the capitals L, N, J, V, W after a space.
"""

import re

from tokencredit.tasks.vocabulary import WORDS

_LETTERS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "L": "liter", "l": "liter", "N": "newton"} | {
    "J": "joule", "V": "volt", "W": "watt", "A": "ampere", "K": "kelvin", "C": "coulomb", "T": "tesla", "F": "farad"
}  # fmt: skip
_CAPITALS = frozenset("LNJVW")
_SPEEDS = {
    "in": ("inch",),
    "mph": ("mile", "/", "hour"),
    "kmh": ("kilometer", "/", "hour"),
    "kph": ("kilometer", "/", "hour"),
    "rpm": ("rpm",),
    "fps": ("foot", "/", "second"),
}
CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
_DESCRIBING = frozenset(WORDS["describing"])
_QUANTITIES = frozenset(WORDS["quantities"])
_AFTER = frozenset(WORDS["after"])
_JOINING = frozenset(WORDS["joining"])
_IN = frozenset(("total", "all"))
_CHINESE = frozenset(WORDS["chinese"])
_POWERS = {"square": "^2", "sq": "^2", "sq.": "^2", "cubic": "^3", "cu": "^3"}
_POWER = re.compile(r"\s*\^\s*\{?([23])\}?$")


def _measures() -> dict[str, tuple[str, ...]]:
    table = dict(_SPEEDS)
    for line in WORDS["measures"]:
        name, _, spellings = line.partition(":")
        table |= {spelling: (name,) for spelling in spellings.split()}
    return table


MEASURES = _measures()
NOUNS = frozenset(WORDS["nouns"])


def currency(sign: str) -> str | None:
    """The measure that a currency sign stands for."""
    return CURRENCIES.get(sign.strip().lstrip("\\"))


def unit_of(text: str, adjacent: bool = False, marked: bool = False, bare_gold: bool = True) -> tuple[str, ...] | None:
    r"""The measures in a unit (none in `apples`, `meter / second` in `m/s`), or None where `text` is no known unit.

    adjacent    no space stands between number and text: `3h`, `12cm`
    marked      the text stands in ``\text{}`` or ``\mathrm{}``, so a letter in it is no variable
    bare_gold   the other side has no unit: then the capitals that are units may follow a space
    """
    text = text.strip()
    text = text[:-1] if text.endswith(".") and text not in ("Rs.", "sq.") else text
    if text in _CHINESE:
        return ()
    if not text or len(text) > 60:
        return None if text else ()
    if degrees := _degrees(text):
        return degrees
    if re.fullmatch(r"[A-Za-z]", text):
        known = text in _LETTERS and (marked or (bare_gold and not adjacent and text in _CAPITALS))
        return (_LETTERS[text],) if known else None
    quotient = bool(
        re.fullmatch(r"[A-Za-z]+(?:\s*\^\s*\{?[23]\}?)?(?:\s*[/·]\s*[A-Za-z]+(?:\s*\^\s*\{?[23]\}?)?){0,2}", text)
    )
    if quotient and ("/" in text or "^" in text):
        return _quotient(text, letters=marked or not adjacent)
    if adjacent and text not in MEASURES and not (len(text) > 3 and _is_noun(text)):
        return None
    return _phrase(text)


def _degrees(text: str) -> tuple[str, ...] | None:
    match = re.fullmatch(r"(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°)\s*(C|F|Celsius|Fahrenheit)?", text)
    if not match:
        return None
    return ({"C": "celsius", "F": "fahrenheit"}[match[1][0]],) if match[1] else ("degree",)


def _quotient(text: str, letters: bool) -> tuple[str, ...] | None:
    measures: list[str] = []
    parts = re.split(r"\s*([/·])\s*", text)
    for part in parts:
        if part in "/·":
            measures += part
            continue
        power = _POWER.search(part)
        name = part[: power.start()] if power else part
        if len(name) == 1 and name in _LETTERS and letters and (len(parts) > 1 or name in "m"):
            measures.append(_LETTERS[name])
        elif name in MEASURES and len(name) > 1:
            measures += MEASURES[name]
        elif _is_noun(name.lower()) and not power:
            continue
        else:
            return None
        measures += [f"^{power[1]}"] if power else []
    return tuple(measures)


def _is_noun(word: str) -> bool:
    """Whether `word` is a count noun of the list, in the singular or the plural."""
    return len(word) > 2 and (word in NOUNS or f"{word}s" in NOUNS or (word.endswith("s") and word[:-1] in NOUNS))


def _phrase(text: str) -> tuple[str, ...] | None:
    """The measures of up to seven known words that hold a unit: describing words, head, and joined units."""
    words = text.replace("-", " ").replace("/", " per ").split()
    if not 1 <= len(words) <= 7:
        return None
    measures: list[str] = []
    power, head, joined = "", False, False
    for place, word in enumerate(words):
        lower = word.lower()
        measure = MEASURES.get(word) or MEASURES.get(lower)
        if lower in _POWERS and place + 1 < len(words) and not head:
            power = _POWERS[lower]
        elif measure and (lower != "in" or len(words) == 1):
            measures += ["/", *measure] if joined and measures else measure
            measures += [power] if power else []
            power, head, joined = "", True, False
        elif _is_noun(lower) or lower in _QUANTITIES:
            head, joined = True, False
        elif head and lower in _JOINING and place + 1 < len(words):
            joined = lower in ("per", "a", "an", "each", "every")
        elif (lower in _DESCRIBING and place + 1 < len(words)) or (head and lower in _AFTER):
            continue
        elif lower in ("total", "altogether") or (place and lower in _IN and words[place - 1].lower() == "in"):
            head = True
        elif lower == "in" and place + 1 < len(words) and words[place + 1].lower() in _IN:
            continue
        elif words in (["times"], ["am"], ["pm"], ["a.m"], ["p.m"], ["of", "them"]):
            head = True
        else:
            return None
    if measures[:1] == ["degree"] and len(measures) > 1:
        measures = measures[1:]
    return tuple(measures) if head and not power else None


def is_chinese(text: str) -> bool:
    """Whether it is a Chinese unit of the list."""
    return text.strip() in _CHINESE


def is_known(words: str) -> bool:
    """Whether every word is one of the lists': then none of them names, scales or takes back a number."""
    lists = (NOUNS, _QUANTITIES, _DESCRIBING, _AFTER, _JOINING, MEASURES)
    return all(any(word in known for known in lists) for word in words.lower().split())
