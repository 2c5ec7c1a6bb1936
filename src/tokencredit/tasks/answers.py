r"""From a completion to a verdict: find the answer, read it, compare it with the gold answer.

An answer must be marked. Three forms are accepted, in this order: the last complete ``<answer>...</answer>``, else the
last complete ``\boxed{...}``, else the rest of the line after the last ``####``. No marker, no answer: the last number
of a text is never guessed to be its answer. What is inside ``<think>...</think>`` is not searched, nor what follows a
``<think>`` that never ends.

Plain numbers are compared exactly, here. Everything else goes to math-verify in a process with limits (`bounded`).
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from tokencredit.tasks import bounded, numerals
from tokencredit.tasks.bounded import Limits
from tokencredit.tasks.verdict import CORRECT, TIMEOUT, TRUNCATED, UNPARSED, WRONG, Verdict

Form = Literal["answer", "boxed", "hash"]
FORMS: tuple[Form, ...] = ("answer", "boxed", "hash")
MAX_ANSWER = 1000  # characters; a longer answer is no answer

_THINK = re.compile(r"<(/?)think>", re.IGNORECASE)
_ANSWER = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_REASONS = {"correct": CORRECT, "wrong": WRONG, "unparsed": UNPARSED, "timeout": TIMEOUT}


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
    None.

    >>> extract("<think> \\boxed{4} </think> <answer> 5 </answer>").text
    '5'
    """
    text = _after_thinking(completion)
    for form in forms:
        answer = _FIND[form](text)
        if answer is None:
            continue
        inner = None if form == "hash" or len(answer.text) > MAX_ANSWER else _boxed(answer.text) or _hash(answer.text)
        while inner is not None:
            answer = Answer(inner.text, form)
            inner = _boxed(inner.text)
        return answer
    return None


def verify(
    completion: str, gold: str, truncated: bool = False, forms: Sequence[Form] = FORMS, limits: Limits | None = None
) -> Verdict:
    """The verdict on a completion. A `truncated` one counts only by an answer that was complete when it was cut."""
    question = _question(completion, truncated, forms)
    return question if isinstance(question, Verdict) else check(question, gold, limits)


def verify_many(
    completions: Sequence[str],
    golds: Sequence[str],
    truncated: Sequence[bool] | None = None,
    forms: Sequence[Form] = FORMS,
    limits: Limits | None = None,
) -> list[Verdict]:
    """`verify` for a batch: equal questions are asked once, and those for math-verify go to several processes."""
    truncated = [False] * len(completions) if truncated is None else truncated
    if not len(completions) == len(golds) == len(truncated):
        raise ValueError(
            f"{len(completions)} completions, {len(golds)} gold answers and {len(truncated)} flags do not match"
        )
    limits = limits or Limits()
    questions = [_question(completion, cut, forms) for completion, cut in zip(completions, truncated)]
    pairs = list({(question, gold) for question, gold in zip(questions, golds) if isinstance(question, str)})
    verdicts = {pair: check_plain(*pair) for pair in pairs}
    hard = [pair for pair, verdict in verdicts.items() if verdict is None]
    with ThreadPoolExecutor(max_workers=limits.processes) as threads:
        verdicts.update(zip(hard, threads.map(lambda pair: check(*pair, limits), hard)))
    return [
        verdicts[question, gold] if isinstance(question, str) else question for question, gold in zip(questions, golds)
    ]


def check(answer: str, gold: str, limits: Limits | None = None) -> Verdict:
    """The verdict on an extracted answer: without computer algebra where that decides, else by math-verify within
    `limits`.
    """
    verdict = check_plain(answer, gold)
    if verdict is None:
        verdict = _REASONS[bounded.compare(numerals.tidy(gold), numerals.tidy(answer), limits)]
    return verdict


def check_plain(answer: str, gold: str) -> Verdict | None:
    """The verdict where equal text or plain numbers decide, None where it takes computer algebra.

    Decimals are compared exactly; unequal fractions are left to math-verify, which lets `0.333333` be a third.
    """
    if len(answer) > MAX_ANSWER or not answer.strip():
        return UNPARSED
    answer, gold = numerals.tidy(answer), numerals.tidy(gold)
    if answer == gold or (len(gold) > 1 and gold.isalpha() and answer.casefold() == gold.casefold()):
        return CORRECT
    number, gold_number = numerals.read(answer), numerals.read(gold)
    if number is not None and gold_number is not None:
        if number.equals(gold_number):
            return CORRECT
        if number.terminating and gold_number.terminating:
            return WRONG
    if not _balanced(answer):
        return UNPARSED
    return WRONG if len(gold) > MAX_ANSWER or not _balanced(gold) else None


def _question(completion: str, truncated: bool, forms: Sequence[Form]) -> str | Verdict:
    if not isinstance(completion, str):
        raise TypeError(f"a completion to verify is a string, not {type(completion).__name__}")
    answer = extract(completion, forms)
    if truncated and (answer is None or not answer.complete):
        return TRUNCATED
    return UNPARSED if answer is None else answer.text


def _after_thinking(text: str) -> str:
    start, end = 0, len(text)
    for mark in _THINK.finditer(text):
        if mark[1]:
            start, end = mark.end(), len(text)
        else:
            end = min(end, mark.start())
    return text[start:end]


def _tagged(text: str) -> Answer | None:
    found, start = None, None
    for mark in _ANSWER.finditer(text):
        if not mark[1]:
            start = mark.end()
        elif start is not None:
            found, start = (start, mark.start()), None
    return Answer(text[slice(*found)].strip(), "answer") if found else None


def _boxed(text: str) -> Answer | None:
    found, opened = None, []
    for mark in _BRACES.finditer(text):
        if mark[0].endswith("{") and mark[0] != "\\{":
            opened.append(mark.end() if len(mark[0]) > 1 else None)
        elif mark[0] == "}" and opened and (start := opened.pop()) is not None:
            found = (start, mark.start())
    return Answer(text[slice(*found)].strip(), "boxed") if found else None


def _hash(text: str) -> Answer | None:
    _, mark, rest = text.rpartition("####")
    if not mark:
        return None
    line, newline, _ = rest.partition("\n")
    return Answer(line.strip(), "hash", complete=bool(newline))


def _balanced(text: str) -> bool:
    depth = 0
    for mark in _BRACES.finditer(text):
        depth += mark[0].endswith("{") and mark[0] != "\\{"
        depth -= mark[0] == "}"
        if depth < 0:
            return False
    return depth == 0


_FIND = {"answer": _tagged, "boxed": _boxed, "hash": _hash}
