"""The crew of a pool. Workers on Ray: each holds the model and the task, and verifies by the row that is sent along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokencredit.distribute.host import Host
from tokencredit.distribute.pool import Alone, Pool
from tokencredit.lm.distribution import Settings
from tokencredit.lm.policy import Policy
from tokencredit.lm.sampling import Progress
from tokencredit.pivotality.crew import Crew, Here, SomeTraces, Work
from tokencredit.pivotality.parts import Found, Written, continued, sampled
from tokencredit.tasks.task import Row
from tokencredit.tasks.verdict import Verdict


class Away:
    """A `Crew` of a pool; `rows` are the task's, one per trace."""

    def __init__(self, pool: Pool, settings: Settings, rows: Sequence[Row] = ()) -> None:
        self.pool, self.settings, self.rows = pool, settings, rows
        self.ends, self.together = pool.facts.ends, pool.facts.together

    def run(
        self, work: Work, pieces: Iterable[SomeTraces], progress: Progress | None = None
    ) -> Iterator[tuple[int, Any]]:
        """`progress` hears of a part when it has come back."""
        calls = ((work, piece, {k: self.rows[k] for k in piece.numbers}) for piece in pieces)
        told = _sampled if work in (continued, sampled) else _nothing
        yield from self.pool.run(_on_host, calls, progress, told)


def crew_of(pool: Pool | Alone, policy: Policy, rows: Sequence[Row]) -> Crew:
    """The crew of a pool; `rows` are the task's, one per trace. A process that is alone tells of every row."""
    if isinstance(pool, Pool):
        return Away(pool, policy.settings, rows)
    judge = lambda k, ids, truncated: policy.verdict(ids, rows[k], truncated)  # noqa: E731
    return Here(pool.host.sampler, judge, pool.facts.together)


def _sampled(result: Found | Written) -> tuple[int, int]:
    """Rows and tokens of a part."""
    written = result.written if isinstance(result, Found) else result
    return len(written.ids), sum(map(len, written.ids))


def _nothing(result: Any) -> tuple[int, int]:
    """What is no sampling is no progress of it."""
    return 0, 0


def _on_host(host: Host, work: Work, piece: SomeTraces, rows: Mapping[int, Row]) -> Any:
    def judge(k: int, ids: tuple[int, ...], truncated: bool) -> Verdict:
        return host.policy.verdict(ids, rows[k], truncated)

    return work(host.sampler, judge, piece, None)
