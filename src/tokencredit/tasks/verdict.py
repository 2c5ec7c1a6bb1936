"""What a verifier says about a completion: never a bare number, so that *wrong*, *unreadable* and *cut off* stay apart.

A reward is made from a verdict by whoever trains (usually ``float(verdict.correct)``); the reason is what a report
counts.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokencredit.tasks.isolated import LOST, Isolated

REASONS = {
    "correct": "the answer is the gold answer",
    "wrong": "the answer was read and is another one",
    "unparsed": "no answer of an accepted form, or one that is no expression",
    "refused": "an expression too large, too deep or too much work to be handed to the algebra system",
    "truncated": "the completion hit its length limit before its answer was complete",
    "timeout": "checking the answer went over its limit of time or memory",
    "error": "the verifier raised",
}


@dataclass(frozen=True)
class Verdict:
    """What a verifier found: `correct`, whether an answer could be `parsed`, and the `reason` (a key of `REASONS`)."""

    correct: bool
    parsed: bool
    reason: str

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"unknown reason {self.reason!r}; a verdict's reason is one of: {', '.join(REASONS)}")
        if self.correct != (self.reason == "correct") or (self.correct and not self.parsed):
            raise ValueError(
                f"a verdict is correct exactly when its reason is 'correct' and it was parsed, not {self!r}"
            )


CORRECT = Verdict(True, True, "correct")
WRONG = Verdict(False, True, "wrong")
UNPARSED = Verdict(False, False, "unparsed")
REFUSED = Verdict(False, False, "refused")
TRUNCATED = Verdict(False, False, "truncated")
TIMEOUT = Verdict(False, False, "timeout")
ERROR = Verdict(False, False, "error")


@dataclass(frozen=True)
class Validation:
    """How many gold answers were put through their own verifier, and those that failed, one line each (row, gold,
    reason).
    """

    checked: int
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether at least one gold answer was checked and all were accepted."""
        return self.checked > 0 and not self.failures


class VerifierError(RuntimeError):
    """A verifier raised, or returned what is no verdict. `row` is the row it was given; the cause is chained."""

    def __init__(self, message: str, row: dict) -> None:
        super().__init__(message)
        self.row = row

    def __reduce__(self) -> tuple[Any, ...]:
        """What it is made of, so that it comes back whole from another process; the cause stays there."""
        return type(self), (str(self), self.row), self.__dict__


def name_row(row: dict) -> str:
    """A short name of a row for messages: its `row_id` where it has one, else its gold answer."""
    return str(row["row_id"]) if "row_id" in row else f"the row with answer {str(row.get('answer'))[:60]!r}"


def to_verdict(result: Any) -> Verdict:
    """A verdict from what a user's verifier returned: a `Verdict`, or a bool (Python's or numpy's). Numbers are
    refused.
    """
    if isinstance(result, Verdict):
        return result
    if isinstance(result, bool) or type(result).__name__ in ("bool", "bool_"):
        return CORRECT if result else WRONG
    raise TypeError(f"a verifier returns a Verdict or a bool, not {type(result).__name__} ({str(result)[:60]!r})")


def as_verifier(
    function: Callable[..., Any], on_error: str = "raise", timeout: float | None = None
) -> Callable[..., Verdict]:
    """Adapt a plain function `(completion, row) -> Verdict | bool` to `verify(completion, row, truncated=False) ->
    Verdict`.

    The function is told `truncated` only if it has a parameter of that name. When it raises, ``on_error="raise"``
    raises a `VerifierError` that names the row and chains the cause; ``on_error="verdict"`` gives a verdict with the
    reason "error". With a `timeout` the function runs in a process of its own (`isolated`), and a call that takes more
    than that many seconds of CPU time, or ten times that in all, gives a verdict with the reason "timeout".

    >>> as_verifier(lambda completion, row: row["answer"] in completion)("it is 7", {"answer": "7"}).reason
    'correct'
    """
    if on_error not in ("raise", "verdict"):
        raise ValueError(f"on_error is 'raise' or 'verdict', not {on_error!r}")
    told = "truncated" in inspect.signature(function).parameters

    def call(completion: str, row: dict, **options: bool) -> list:
        verdict = to_verdict(function(completion, row, **options))
        return [verdict.correct, verdict.parsed, verdict.reason]

    bounded = call if timeout is None else Isolated(call, timeout)

    @functools.wraps(function)
    def verify(completion: str, row: dict, truncated: bool = False) -> Verdict:
        try:
            found = bounded(completion, row, truncated=truncated) if told else bounded(completion, row)
            return TIMEOUT if found is LOST else Verdict(*found)
        except Exception as error:
            if on_error == "verdict":
                return ERROR
            name = getattr(function, "__name__", type(function).__name__)
            raise VerifierError(
                f"verifier {name} failed on {name_row(row)}: {type(error).__name__}: {error}", row
            ) from error

    return verify
