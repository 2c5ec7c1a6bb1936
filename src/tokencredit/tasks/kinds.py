r"""What kind of thing a gold answer is, which decides how an answer is compared with it.

choice      a single letter A to J, with or without brackets: the label counts
structure   a set, a tuple or interval, a list, a union: compared part by part, `Structure`
text        words, formulas such as `H2O`, ratios and times, numerals with a base: compared as text
expression  everything else: mathematics, for the algebra system

A run of letters is a product of variables only beside mathematics: `2ab` is, `no`, `listen`, `NaCl` are text.
"""

import re
from dataclasses import dataclass
from typing import Literal

from tokencredit.tasks.units import is_known
from tokencredit.tasks.vocabulary import WORDS
from tokencredit.tasks.words import VALUES

Shape = Literal["set", "tuple", "list", "union"]

_LABEL = r"(?:\\text\s*\{\s*)?\(?\s*(?P<label>[A-J])\s*(?P<mark>[.):]|\)\s*\})?\s*\}?"
_CHOICE = re.compile(rf"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*)?{_LABEL}", re.IGNORECASE)
_LABELLED = re.compile(
    r"(?:(?:option|choice)\s*)?(?:\\text\s*\{\s*)?(?:\((?P<a>[A-J])\)[.:]?|(?P<b>[A-J])[.):])"
    r"(?:\s*\}\s*|\s+)(?P<rest>\S.*)",
    re.DOTALL | re.IGNORECASE,
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_RUN = re.compile(r"[A-Za-z]{2,}")
_FUNCTIONS = frozenset(WORDS["functions"])
_EVIDENCE = re.compile(r"[0-9^+=_<>*!|]|\\(?:frac|sqrt|cdot|times|leq|geq|pi|infty|alpha|beta|theta)")
_TEXT = re.compile(r"\\(?:text|operatorname)\s*\{([^{}]*)\}")
_GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|phi|omega)"
_LETTER = (
    r"(?:\\(?:angle|triangle|overline|Delta)\s*\{?\s*)?"  # a figure's part
    rf"(?:[A-Za-z]{{1,3}}|{_GREEK})(?:_\{{?\w\}}?)?'?\}}?"  # x, AB, x_1, x'
    r"(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?"  # f(x)
)
_JOIN = re.compile(r"\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\quad|;|\\vee|\\lor)\s*")


@dataclass(frozen=True)
class Structure:
    """Parts in the brackets that hold them, "" and "" for a list."""

    shape: Shape
    parts: tuple[str, ...]
    brackets: tuple[str, str] = ("", "")


def choice_of(text: str) -> str | None:
    """The letter A to J that `text` is and nothing else, or None."""
    match = _CHOICE.fullmatch(text)
    return match["label"] if match and match["label"].isupper() else None


def labelled(text: str) -> tuple[str, str] | None:
    """The label of an option and what follows it (`A. 12` is A and 12), or None."""
    match = _LABELLED.fullmatch(text)
    if not match or not (match["a"] or match["b"]).isupper():
        return None
    return match["a"] or match["b"], match["rest"].strip(" }")


def is_text(gold: str) -> bool:
    """Whether a gold answer that is no number, choice or structure is compared as text."""
    if re.search(r"[0-9A-Fa-f]_\{?[0-9]{1,2}\}?$", gold) and re.fullmatch(r"[0-9A-F]+_\{?[0-9]{1,2}\}?", gold):
        return True
    if re.fullmatch(r"[0-9.]+(?:\s*:\s*[0-9.]+)+(?:\s*[ap]\.?m\.?)?", gold, re.IGNORECASE):
        return True
    if any(len(run) > 1 for found in _TEXT.findall(gold) for run in re.findall(r"[A-Za-z]+", found)):
        return True
    plain = _COMMAND.sub(" ", _TEXT.sub(" ", re.sub(r"\\(?:begin|end)\s*\{\w+\*?\}", " ", gold)))
    if re.search(r"[^\x00-\x7f]", plain) and not re.search(r"[0-9]", plain):
        return True
    if re.search(r"[A-Za-z][0-9]", plain) or re.fullmatch(r"(?:[A-Z][a-z]?(?:_\{?[0-9]+\}?)?){2,}", plain.strip()):
        return True
    runs = [run for run in _RUN.findall(plain) if run not in _FUNCTIONS]
    if not runs:
        return False
    if re.search(r"[0-9]\s+[A-Za-z]{2,}", plain) or re.search(
        r"[A-Za-z]{3,}\s+[A-Za-z]{2,}|[A-Za-z]{2,}\s+[A-Za-z]{3,}", plain
    ):
        return True
    if set("".join(runs)) <= set("xyz"):
        return False
    return not _EVIDENCE.search(gold)


def same_text(answer: str, gold: str) -> bool:
    """Equal words. Spaces and case do not count, but case does where the gold answer mixes it in a word (`NaCl`)."""
    answer, gold = _words(answer), _words(gold)
    if re.search(r"[a-z][A-Z]|[0-9][A-Z]|[A-Z][0-9]", gold):
        return answer == gold
    return answer.casefold() == gold.casefold()


def _words(text: str) -> str:
    text = _TEXT.sub(lambda m: f" {m[1]} ", text).replace("\\", " ")
    text = re.sub(r"[_^]\{([^{}]*)\}", r"_\1", text)
    text = re.sub(r"([A-Za-z)])_([0-9])", r"\1\2", text)
    text = re.sub(r"\s*([:,/(){}=+-])\s*", r"\1", " ".join(text.split()))
    return text.strip(" .!\"'")


def letter_runs(text: str) -> set[str]:
    """Runs of three and more letters that are no commands and no functions."""
    plain = _COMMAND.sub(" ", re.sub(r"\\(?:begin|end)\s*\{\w+\*?\}", " ", text))
    return {run for run in _RUN.findall(plain) if len(run) > 2 and run not in _FUNCTIONS and set(run) - set("xyz")}


def structure_of(text: str) -> Structure | None:
    r"""The parts of a set, tuple, interval, union, list, or of ``a \pm b``; None for what is none of them."""
    text = re.sub(r"^[A-Za-z]\s*\\in\s*", "", text.strip())
    unions = _split(text, r"\\cup(?![A-Za-z])")
    if len(unions) > 1:
        return Structure("union", tuple(unions))
    if text.startswith("\\{") and text.endswith("\\}") and _encloses(text, 2):
        return Structure("set", tuple(_split(text[2:-2], r"[,;]")), ("\\{", "\\}"))
    if text[:1] in "([" and text[-1:] in ")]" and text and _encloses(text, 1):
        parts = _split(text[1:-1], r"[,;]")
        return Structure("tuple", tuple(parts), (text[0], text[-1])) if len(parts) > 1 else None
    if match := re.fullmatch(r"\\langle(?P<inner>.*)\\rangle", text):
        return Structure("tuple", tuple(_split(match["inner"], r",")), ("<", ">"))
    if text.count("\\pm") == 1 and not re.search(r"[,;]", text):
        return Structure("list", (text.replace("\\pm", "+").lstrip("+ "), text.replace("\\pm", "-")))
    parts = [part for piece in _split(_JOIN.sub(" , ", text), r",") if (part := piece.strip())]
    return Structure("list", tuple(parts)) if len(parts) > 1 else None


def _encloses(text: str, width: int) -> bool:
    """Whether the first bracket of `text` is closed by its last."""
    depth = 0
    for mark in re.finditer(r"\\[{}]|\\.|[()\[\]{}]", text):
        opens, closes = mark[0] in ("\\{", "(", "[", "{"), mark[0] in ("\\}", ")", "]", "}")
        depth += opens - closes
        if depth == 0 and closes and mark.end() < len(text):
            return False
    return depth == 0 and len(text) > 2 * width - 1


def _split(text: str, separator: str) -> list[str]:
    """`text` cut at every `separator` that stands in no bracket and no environment."""
    parts, depth, start = [], 0, 0
    for mark in re.finditer(rf"(?P<cut>{separator})|\\begin|\\end|\\[{{}}]|\\[A-Za-z]+|\\.|[()\[\]{{}}]", text):
        depth += (mark[0] in ("\\begin", "\\{", "(", "[", "{")) - (mark[0] in ("\\end", "\\}", ")", "]", "}"))
        if mark["cut"] and depth == 0:
            parts.append(text[start : mark.start()].strip())
            start = mark.end()
    return [*parts, text[start:].strip()]


def sides(text: str, sums: bool = True) -> list[str]:
    """The sides of a chain of equalities, without a name at its beginning: `x = 40 + 2 = 42` has two."""
    parts = _split(text, r"(?<![<>!:=])=(?!=)|\\approx(?![A-Za-z])|:=")
    named = len(parts) > 1 and is_name(parts[0], sums)
    # `x = x + 1` defines nothing
    defines = named and not re.search(rf"(?<![A-Za-z\\\\]){re.escape(parts[0])}(?![A-Za-z])", " ".join(parts[1:]))
    return parts[1:] if defines else parts


def is_name(text: str, sums: bool = True) -> bool:
    r"""Whether `text` names a quantity and holds no number: `x`, `f(x)`, `x_1`, `AB`, `a+b`, ``\theta``, `Total cost`;
    without `sums`, of one quantity alone.
    """
    text = _TEXT.sub(lambda m: m[1], text).strip()
    if re.fullmatch(rf"{_LETTER}(?:\s*(?:[-+*]|\\cdot)\s*{_LETTER}){{0,{3 if sums else 0}}}", text):
        return not any(run in VALUES or run in ("not", "no") for run in re.findall(r"[a-z]+", text.lower()))
    return bool(re.fullmatch(r"[A-Za-z]+(?: [A-Za-z]+){0,5}", text)) and is_known(text)
