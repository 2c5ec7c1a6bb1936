"""Who does the pieces of a measurement: this process (`Here`), or workers that each hold the model
(`away.Away`).

A piece is a few traces, by their numbers in the whole, and what is asked about them; a function (sampler, judge, piece,
progress) does it. Pieces are cut alike whoever does them, and none knows of another, so that the results are the same
to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from tokencredit.distribute.together import together_of
from tokencredit.lm.distribution import Settings
from tokencredit.lm.sampling import Progress, Sampler
from tokencredit.pivotality.verdicts import Judge


class SomeTraces(Protocol):
    """Some traces of a measurement."""

    @property
    def numbers(self) -> Sequence[int]:
        """Which, in the whole."""
        ...


Work = Callable[[Sampler, Judge, Any, Progress | None], Any]
"""What is done with a piece. A function of a module, so that it can be named to another process; the judge takes the
numbers of the whole.
"""


class Crew(Protocol):
    """Does pieces of work.

    settings, ends   of the sampler that it has
    together         tokens that it samples before they are stored, at most
    """

    settings: Settings
    ends: tuple[int, ...]
    together: int

    def run(
        self, work: Work, pieces: Sequence[SomeTraces], progress: Progress | None = None
    ) -> Iterator[tuple[int, Any]]:
        """(number of the piece, what came of it, or a `distribute.lost.Lost`), in any order; `progress` hears of rows
        and tokens that are sampled.
        """
        ...


def _together(sampler: Sampler) -> int:
    model = getattr(sampler, "model", None)
    return sys.maxsize if model is None else together_of(model)


class Here:
    """This process, piece after piece; what a sampler raises is raised. Without `together`, it follows from the model
    of the sampler, where that has one.
    """

    def __init__(self, sampler: Sampler, judge: Judge, together: int | None = None) -> None:
        self.sampler, self.judge = sampler, judge
        self.settings, self.ends = sampler.settings, tuple(sampler.ends)
        self.together = _together(sampler) if together is None else together

    def run(
        self, work: Work, pieces: Iterable[SomeTraces], progress: Progress | None = None
    ) -> Iterator[tuple[int, Any]]:
        for number, piece in enumerate(pieces):
            yield number, work(self.sampler, self.judge, piece, progress)
