"""Parts: what is stored in one file; and pieces: what is sampled together.

A list of requests is cut where a trace ends, into parts of about `part_size` rollouts; a trace with more than that is
cut into parts of its own. A part is cut alike into the pieces that whoever samples does in about half a minute. A piece
is always sampled whole, so that it ends with the same bits. The verifier is asked trace by trace: a trace that it fails
on is a hole in its piece, whose tokens are kept and whose reward is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from tokencredit.lm.sampling import Progress, Request, Rollout, Sampler, Trace
from tokencredit.pivotality.verdicts import Judge, judged_all

LEAST, MOST = 64, 4096  # rollouts per part
SHARE = 8  # ... of which there are so many, where that is more than the least
TOKENS, FEW = 2048, 16  # where rollouts may be long, the least is what may make so many tokens, down to so few rollouts
ERROR = "error"  # the reason of a rollout without a reward


def part_size(num: int, longest: int = 0) -> int:
    """Rollouts per part of `num` requests of at most `longest` tokens: an eighth of them, from 64 to 4,096; from fewer
    where they may be long, what may make 2,048 tokens (half a minute of a model that writes 60 a second), down to 16.
    """
    least = min(max(TOKENS // max(longest, 1), FEW), LEAST)
    return min(max(-(-num // SHARE), least), MOST)


def cut(requests: Sequence[Request], size: int) -> list[slice]:
    """Where the parts of a list of requests are: at most `size` of them, and no trace in two parts that has room in
    one.
    """
    bounds, start, end = [], 0, 0
    for _, group in groupby(requests, key=lambda request: request.trace):
        num = sum(1 for _ in group)
        if end > start and end - start + num > size:
            bounds.append(slice(start, end))
            start = end
        if num > size:
            pieces = -(-num // size)
            marks = [end + num * n // pieces for n in range(pieces + 1)]
            bounds += [slice(a, b) for a, b in pairwise(marks)]
            start = end + num
        end += num
    return [*bounds, slice(start, end)] if end > start else bounds


def pieces(requests: Sequence[Request], together: int, part: int | None = None) -> list[list[slice]]:
    """Of every part, of `part` rollouts or `part_size`, its pieces: at most `together` tokens each, if every rollout is
    as long as it may be; of `FEW` rollouts at the least.
    """
    found = []
    for own in cut(requests, part or part_size(len(requests), max((r.budget for r in requests), default=0))):
        longest = max(r.budget for r in requests[own])
        some = cut(requests[own], max(together // max(longest, 1), FEW))
        found.append([slice(own.start + each.start, own.start + each.stop) for each in some])
    return found


@dataclass(frozen=True)
class Part:
    """Requests that are sampled together.

    numbers   of its traces in the whole; a request names one by its place here
    """

    numbers: tuple[int, ...]
    traces: tuple[Trace, ...]
    requests: tuple[Request, ...]

    @classmethod
    def of(cls, traces: Sequence[Trace], requests: Sequence[Request]) -> Part:
        """The part of requests that name their traces by numbers of the whole."""
        numbers = tuple(dict.fromkeys(r.trace for r in requests))
        place = {k: j for j, k in enumerate(numbers)}
        own = tuple(Request(place[r.trace], r.prefix, r.budget, r.seed, r.token) for r in requests)
        return cls(numbers, tuple(traces[k] for k in numbers), own)

    def whole(self, request: Request, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The completion that a rollout is of: prefix, the request's own token, what was sampled."""
        own = () if request.token is None else (request.token,)
        return (*self.traces[request.trace].completion[: request.prefix], *own, *ids)


@dataclass(frozen=True)
class Written:
    """A part that is sampled: token ids and whether it was cut, of every request."""

    part: Part
    ids: list[tuple[int, ...]]
    truncated: list[bool]

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.part.numbers


@dataclass(frozen=True)
class Found:
    """A part that is sampled and verified.

    reward   of every request, None where the verifier failed
    failed   {number of the trace in the whole: why}
    """

    written: Written
    reward: list[float | None]
    reason: list[str]
    failed: dict[int, Exception] = field(default_factory=dict)


def continued(sampler: Sampler, judge: Judge, part: Part, progress: Progress | None) -> Written:
    """Sample a part."""
    rollouts: list[Rollout | None] = [None] * len(part.requests)
    for index, rollout in sampler.continue_(part.traces, part.requests, progress):
        rollouts[index] = rollout
    return Written(part, [x.ids for x in rollouts], [x.truncated for x in rollouts])


def sampled(sampler: Sampler, judge: Judge, part: Part, progress: Progress | None) -> Found:
    """Sample a part, and verify it."""
    return verified(sampler, judge, continued(sampler, judge, part, progress), progress)


def verified(sampler: Sampler, judge: Judge, written: Written, progress: Progress | None) -> Found:
    """Verify a part that is sampled, trace by trace."""
    part, found = written.part, Found(written, [None] * len(written.ids), [ERROR] * len(written.ids))
    for place, number in enumerate(part.numbers):
        own = [n for n, request in enumerate(part.requests) if request.trace == place]
        wholes = [(part.whole(part.requests[n], written.ids[n]), written.truncated[n]) for n in own]
        try:
            verdicts = judged_all(judge, number, wholes)
        except Exception as error:
            found.failed[number] = error
            continue
        for n, (reward, reason) in zip(own, verdicts):
            found.reward[n], found.reason[n] = reward, reason
    return found


def holes(reward: Sequence[Any]) -> bool:
    """Whether a part has rollouts without a reward."""
    return any(value is None for value in reward)
