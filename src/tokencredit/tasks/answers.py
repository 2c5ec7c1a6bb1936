r"""From a completion to a verdict: find the answer (`extraction`), read it, compare it with the gold answer.

The kind of the gold answer decides how. A plain number is compared exactly, here, with what is a finished number and
with nothing else (`numerals`): an answer that still has to be worked out is not accepted unless ``evaluated=False``.
Choices, texts, sets, tuples and lists (`kinds`) are compared as what they are; expressions go to math-verify in a
process with limits (`bounded`), unless their shape says that this would not end (`shapes`).
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from tokencredit.tasks import bounded, kinds, numerals, shapes, units
from tokencredit.tasks.bounded import Limits
from tokencredit.tasks.extraction import FORMS, MAX_ANSWER, Answer, Form, extract
from tokencredit.tasks.kinds import Structure
from tokencredit.tasks.notation import is_balanced, is_hidden, tidy
from tokencredit.tasks.numerals import Numeral
from tokencredit.tasks.verdict import CORRECT, REFUSED, TIMEOUT, TRUNCATED, UNPARSED, WRONG, Verdict

__all__ = [
    "FORMS",
    "MAX_ANSWER",
    "Answer",
    "Form",
    "Limits",
    "check",
    "check_plain",
    "extract",
    "verify",
    "verify_many",
]

MAX_PARTS = 12  # of a set, tuple or list that is compared part by part

_REASONS = {"correct": CORRECT, "wrong": WRONG, "unparsed": UNPARSED, "timeout": TIMEOUT}
_UNIT = re.compile(r"(?P<rest>.*\S)\s*\\text\s*\{(?P<unit>[^{}]*)\}(?P<power>\s*\^\s*\{?[23]\}?)?", re.DOTALL)
_BARE_UNIT = re.compile(
    r"(?P<rest>.*(?:[^A-Za-z\s]|\\[A-Za-z]+))\s+(?P<unit>[A-Za-z]{2,}(?: [A-Za-z]{2,}){0,2}(?:\s*\^\s*\{?[23]\}?)?)",
    re.DOTALL,
)
Ask = Callable[[str, str], Verdict]


class _Algebra(Exception):
    """It takes computer algebra to decide."""


def verify(
    completion: str,
    gold: str,
    truncated: bool = False,
    forms: Sequence[Form] = FORMS,
    limits: Limits | None = None,
    evaluated: bool = True,
) -> Verdict:
    """The verdict on a completion. A `truncated` one counts only by an answer that was complete when it was cut.

    evaluated   where the gold answer is a plain number, an answer has to be one too
    """
    question = _question(completion, truncated, forms)
    return question if isinstance(question, Verdict) else check(question, gold, limits, evaluated)


def verify_many(
    completions: Sequence[str],
    golds: Sequence[str],
    truncated: Sequence[bool] | None = None,
    forms: Sequence[Form] = FORMS,
    limits: Limits | None = None,
    evaluated: bool = True,
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
    verdicts = {pair: check_plain(*pair, evaluated) for pair in pairs}
    hard = [pair for pair, verdict in verdicts.items() if verdict is None]
    with ThreadPoolExecutor(max_workers=limits.processes) as threads:
        verdicts.update(zip(hard, threads.map(lambda pair: check(*pair, limits, evaluated), hard)))
    return [
        verdicts[question, gold] if isinstance(question, str) else question for question, gold in zip(questions, golds)
    ]


def check(answer: str, gold: str, limits: Limits | None = None, evaluated: bool = True) -> Verdict:
    """The verdict on an extracted answer: without computer algebra where that decides, else by math-verify within
    `limits`.
    """
    return _checked(answer, gold, lambda ours, theirs: _REASONS[bounded.compare(theirs, ours, limits)], evaluated)


def check_plain(answer: str, gold: str, evaluated: bool = True) -> Verdict | None:
    """The verdict where it takes no computer algebra, None where it does."""

    def ask(answer: str, gold: str) -> Verdict:
        raise _Algebra

    try:
        return _checked(answer, gold, ask, evaluated)
    except _Algebra:
        return None


def _question(completion: str, truncated: bool, forms: Sequence[Form]) -> str | Verdict:
    if not isinstance(completion, str):
        raise TypeError(f"a completion to verify is a string, not {type(completion).__name__}")
    answer = extract(completion, forms)
    if truncated and (answer is None or not answer.complete):
        return TRUNCATED
    return UNPARSED if answer is None else answer.text


def _checked(answer: str, gold: str, ask: Ask, evaluated: bool) -> Verdict:
    if len(answer) > MAX_ANSWER or not answer.strip():
        return UNPARSED
    hidden = is_hidden(answer) and answer.strip() != gold.strip()
    answer, gold = tidy(answer), _tidy_gold(gold)
    if hidden or not is_balanced(answer) or not answer:
        return UNPARSED
    if len(gold) > MAX_ANSWER or not is_balanced(gold):
        return WRONG
    return _compare(answer, gold, ask, evaluated)


@lru_cache(maxsize=4096)
def _tidy_gold(gold: str) -> str:
    return tidy(gold)


@lru_cache(maxsize=4096)
def _gold_number(gold: str) -> Numeral | None:
    parts = kinds.sides(gold, sums=False)
    return numerals.read(parts[0], lenient=True, bare_gold=False) if len(parts) == 1 else None


def _compare(answer: str, gold: str, ask: Ask, evaluated: bool) -> Verdict:
    """The verdict on two tidied texts, by the kind of the second."""
    if answer == gold:
        return CORRECT
    if number := _gold_number(gold):
        if "=" in gold and _name(answer) not in (None, _name(gold)):
            return WRONG
        return _compare_number(answer, number, ask, evaluated)
    if label := kinds.choice_of(gold):
        return _compare_choice(answer, label)
    if option := kinds.labelled(answer):
        answer = option[1]
    if structure := kinds.structure_of(gold):
        parts = (kinds.is_text(part) and _gold_number(part) is None for part in structure.parts)
        if structure.shape != "list" or not any(parts):
            return _compare_structures(answer, gold, structure, ask, evaluated)
    if kinds.is_text(_without_unit(gold)[0]):
        return CORRECT if kinds.same_text(answer, gold) else WRONG
    return _compare_expressions(answer, gold, ask)


def _compare_number(answer: str, gold: Numeral, ask: Ask, evaluated: bool) -> Verdict:
    if option := kinds.labelled(answer):
        answer = option[1]
    if answer.startswith("\\{") and (structure := kinds.structure_of(answer)) and len(structure.parts) == 1:
        answer = structure.parts[0]
    verdict = CORRECT
    bare = gold.unit is None
    for side in kinds.sides(answer):
        number = numerals.read(side, lenient=not evaluated, bare_gold=bare)
        if number is not None:
            verdict = verdict if number.equals(gold) else WRONG
        elif evaluated:
            return WRONG if re.search(r"[0-9A-Za-z]", side) and re.search(r"[0-9]", answer) else UNPARSED
        else:
            plain, unit = _without_unit(side)
            if unit and gold.unit and unit != gold.unit:
                return WRONG
            value = f"\\frac{{{gold.value.numerator}}}{{{gold.value.denominator}}}"
            found = _compare_expressions(plain, value if gold.value.denominator > 1 else str(gold.value), ask)
            verdict = found if verdict is CORRECT else verdict
    return verdict


def _compare_choice(answer: str, label: str) -> Verdict:
    if found := kinds.choice_of(answer):
        return CORRECT if found == label else WRONG
    option = kinds.labelled(answer)
    if option is None or re.search(r"(?<![A-Za-z\\])[A-J](?![A-Za-z'])|\b(?:not|or)\b", option[1]):
        return UNPARSED
    return CORRECT if option[0] == label else WRONG


def _compare_structures(answer: str, gold: str, wanted: Structure, ask: Ask, evaluated: bool) -> Verdict:
    found = kinds.structure_of(answer)
    if found is None:
        if len(wanted.parts) == 1:
            return _compare(answer, wanted.parts[0], ask, evaluated)
        interval = wanted.shape in ("union", "tuple") and re.search(r"[<>]|\\[lg]eq|\\neq|\\infty|\\mathbb", answer)
        return _compare_expressions(answer, gold, ask) if interval else WRONG
    shapes_of = {found.shape, wanted.shape}
    if shapes_of == {"tuple", "set"} or ("union" in shapes_of and len(shapes_of) > 1):
        return WRONG
    if shapes_of == {"tuple"} and found.brackets != wanted.brackets:
        return WRONG
    if shapes_of == {"tuple", "list"} and (
        "[" in found.brackets + wanted.brackets or "]" in found.brackets + wanted.brackets
    ):
        return WRONG
    if len(found.parts) != len(wanted.parts) or len(wanted.parts) > MAX_PARTS:
        return WRONG
    names = {part.partition("=")[0].strip() for part in wanted.parts if "=" in part}
    named = len(names) > 1 and not all("=" in part for part in found.parts)
    theirs = {part.partition("=")[0].strip() for part in found.parts if "=" in part}
    ordered = "tuple" in shapes_of or named or (len(theirs) > 1 and not names)
    return (_in_order if ordered else _in_any_order)(found.parts, wanted.parts, ask, evaluated)


def _in_order(found: Sequence[str], wanted: Sequence[str], ask: Ask, evaluated: bool) -> Verdict:
    for ours, theirs in zip(found, wanted):
        verdict = _compare_part(ours, theirs, ask, evaluated)
        if not verdict.correct:
            return verdict
    return CORRECT


def _in_any_order(found: Sequence[str], wanted: Sequence[str], ask: Ask, evaluated: bool) -> Verdict:
    left = list(found)
    for theirs in wanted:
        left.sort(key=lambda ours: ours != theirs)  # equal text first: it costs nothing
        for place, ours in enumerate(left):
            verdict = _compare_part(ours, theirs, ask, evaluated)
            if verdict.reason in ("timeout", "refused"):
                return verdict
            if verdict.correct:
                del left[place]
                break
        else:
            return WRONG
    return CORRECT


def _compare_part(answer: str, gold: str, ask: Ask, evaluated: bool) -> Verdict:
    if not answer or not gold:
        return UNPARSED
    return _compare(tidy(answer), _tidy_gold(gold), ask, evaluated)


def _without_unit(text: str) -> tuple[str, tuple[str, ...] | None]:
    """An expression without the known unit that follows it, and its measures."""
    for pattern, marked in ((_UNIT, True), (_BARE_UNIT, False)):
        if match := pattern.fullmatch(text):
            name = match["unit"] + (match.groupdict().get("power") or "")
            if (unit := units.unit_of(name, marked=marked)) is not None:
                return match["rest"], unit
    if match := re.fullmatch(r"(.*\S)\s*\^\s*\\circ", text, re.DOTALL):
        return match[1], ("degree",)
    return text, None


def _compare_expressions(answer: str, gold: str, ask: Ask) -> Verdict:
    """The verdict of the algebra system on every side of a chain of equalities, where names and units allow it."""
    answer, unit = _without_unit(answer)
    gold, gold_unit = _without_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return WRONG
    if not re.search(r"[0-9A-Za-z]", answer):
        return UNPARSED
    if not kinds.letter_runs(answer) <= kinds.letter_runs(gold):
        return WRONG
    found, wanted = kinds.sides(answer, sums=False), kinds.sides(gold, sums=False)
    if len(wanted) > 1 or (wanted[0] != gold and "=" in answer and _name(answer) != _name(gold)):
        found, wanted = [answer], [gold]  # an equation: compared as one
    for side in found:
        if side == wanted[0]:
            continue
        if shapes.refusal(side) or shapes.refusal(wanted[0]):
            return REFUSED
        verdict = ask(side, wanted[0])
        if not verdict.correct:
            return verdict
    return CORRECT


def _name(text: str) -> str | None:
    """The name at the beginning of `y = ...`, None without one."""
    name, equals, _ = text.partition("=")
    return name.strip() if equals and kinds.is_name(name, sums=False) else None
