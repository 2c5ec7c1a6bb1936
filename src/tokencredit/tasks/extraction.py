r"""Which part of a completion is its answer.

An answer must be marked. Three forms are accepted, in this order: the last complete ``<answer>...</answer>`` that is
not empty, else the last complete ``\boxed{...}`` (or ``\boxed 5``), else what follows the last ``####`` on its line, or
on the next line where nothing follows. No marker, no answer: the last number of a text is never guessed to be its
answer. What a model thinks is not searched: between ``<think>``, ``<thinking>`` and their like and the end mark, and
after a mark that never ends.

A mark inside the answer counts only where it holds the whole answer: ``\boxed{41 #### 42}`` names two numbers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Form = Literal["answer", "boxed", "hash"]
FORMS: tuple[Form, ...] = ("answer", "boxed", "hash")
MAX_ANSWER = 1000  # characters; a longer answer is no answer

_THINK = re.compile(
    r"<\s*(?P<end>/?)\s*(?:\w{1,10}:)?(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad)(?:\s[^<>]{0,80})?>"
    r"|\[(?P<bracket>/?)THINK\]|◁(?P<kimi>/?)think▷|<\|(?:begin|(?P<spoken>end))_of_thought\|>",
    re.IGNORECASE,
)
_ANSWER = re.compile(r"<\s*(/?)\s*answer\s*>", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s*(?=[^\s{])(-?\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z]))")
# What may stand before a mark inside an answer: words that announce it, which name no number and take nothing back.
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b[,:]?\s*)?(?:the\s+)?(?:(?:correct|final|right)\s+)?(?:answer|result|value)?\s*(?:is|:|=)?\s*[:=]?\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """The text between the marks, the form they have, and whether the answer is `complete` even if the completion was
    cut off.
    """

    text: str
    form: Form
    complete: bool = True


def extract(completion: str, forms: Sequence[Form] = FORMS) -> Answer | None:
    r"""The last answer of the first of `forms` that occurs, unwrapped (``<answer> \boxed{5} </answer>`` is ``5``), or
    None. An empty answer hides no other; if there is none but empty ones, the first form's is returned.

    >>> extract("<think> \\boxed{4} </think> <answer> 5 </answer>").text
    '5'
    """
    text = _after_thinking(completion)
    found = [answer for form in forms if (answer := _FIND[form](text)) is not None]
    chosen = next((answer for answer in found if answer.text), found[0] if found else None)
    return _unwrapped(chosen) if chosen else None


def _unwrapped(answer: Answer) -> Answer:
    r"""The innermost mark that holds the whole answer. In an ``<answer>`` a short lead may stand before the mark."""
    if len(answer.text) > MAX_ANSWER:
        return answer
    for _ in range(MAX_ANSWER // 8):
        span = _box_span(answer.text)
        if span is not None:
            before, inner, after = answer.text[: span[0]], answer.text[span[1] : span[2]], answer.text[span[2] + 1 :]
        elif "####" in answer.text and answer.form == "answer":
            before, _, inner = answer.text.rpartition("####")
            after = ""
        else:
            return answer
        if before.strip(" $\n([") and not (answer.form == "answer" and _LEAD.fullmatch(before.strip(" $\n([*\\"))):
            return answer
        if after.strip(" $\n.)]*\\"):
            return answer
        answer = Answer(inner.strip(), answer.form, answer.complete)
    return answer


def _after_thinking(text: str) -> str:
    start, end = 0, len(text)
    for mark in _THINK.finditer(text):
        if any(mark.groupdict().values()):
            start, end = mark.end(), len(text)
        else:
            end = min(end, mark.start())
    return text[start:end]


def _tagged(text: str) -> Answer | None:
    found, start = "", None
    seen = False
    for mark in _ANSWER.finditer(text):
        if not mark[1]:
            start = mark.end()
        elif start is not None:
            found, seen, start = text[start : mark.start()].strip(), True, None
    return Answer(found, "answer") if seen else None


def _box_span(text: str) -> tuple[int, int, int] | None:
    """Where the last box that ends begins, where its content begins, and where that ends."""
    found, opened = None, []
    for mark in _BRACES.finditer(text):
        if mark[0].endswith("{") and mark[0] != "\\{":
            opened.append((mark.start(), mark.end()) if len(mark[0]) > 1 else None)
        elif mark[0] == "}" and opened and (start := opened.pop()) is not None:
            found = (*start, mark.start())
    return found


def _boxed(text: str) -> Answer | None:
    span = _box_span(text)
    found = list(_BARE_BOX.finditer(text, span[2] if span else 0))
    if found:
        bare = found[-1]
        return Answer(bare[1], "boxed", complete=bare.end() < len(text))
    return Answer(text[span[1] : span[2]].strip(), "boxed") if span else None


def _hash(text: str) -> Answer | None:
    _, mark, rest = text.rpartition("####")
    if not mark:
        return None
    rest = rest.lstrip(": \t\r\n") if rest.lstrip(": \t\r\n") else ""
    line, newline, _ = rest.partition("\n")
    return Answer(line.strip(), "hash", complete=bool(newline))


_FIND = {"answer": _tagged, "boxed": _boxed, "hash": _hash}
