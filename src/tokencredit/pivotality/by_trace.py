"""What is asked of every trace by itself, by a crew: traces are sent in shards, and each is worked on alone, so that no
result depends on which shard it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokencredit.distribute.lost import Lost
from tokencredit.lm.sampling import Progress, Sampler, Trace
from tokencredit.pivotality.crew import Crew
from tokencredit.pivotality.verdicts import Judge

SHARD = 8  # traces that are sent together

Ask = Callable[[Sampler, Judge, int, Trace, Any], Any]
"""(sampler, judge, number of the trace, trace, what it needs besides) -> answer. A function of a module."""


@dataclass(frozen=True)
class Shard:
    """Some traces by number, each with what is needed besides."""

    asked: dict[int, tuple[Trace, Any]]

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self.asked)


def ask_each(
    crew: Crew, ask: Ask, asked: Mapping[int, tuple[Trace, Any]], failed: dict[int, Exception]
) -> dict[int, Any]:
    """The answer for every trace, by number and in order, but for those that raise an error: they are put into
    `failed`, where they have not failed before.
    """
    numbers = list(asked)
    shards = [Shard({k: asked[k] for k in numbers[start : start + SHARD]}) for start in range(0, len(numbers), SHARD)]
    found: dict[int, Any] = {}
    for n, answers in crew.run(partial(_answers, ask), shards):
        found |= dict.fromkeys(shards[n].numbers, answers) if isinstance(answers, Lost) else answers
    for k in numbers:
        if isinstance(found[k], Lost):
            failed.setdefault(k, found[k].error)
    return {k: found[k] for k in numbers if not isinstance(found[k], Lost)}


def _answers(ask: Ask, sampler: Sampler, judge: Judge, shard: Shard, progress: Progress | None) -> dict[int, Any]:
    return {k: _answer(ask, sampler, judge, k, *given) for k, given in shard.asked.items()}


def _answer(ask: Ask, sampler: Sampler, judge: Judge, k: int, trace: Trace, given: Any) -> Any:
    try:
        return ask(sampler, judge, k, trace, given)
    except Exception as error:
        return Lost(error)
