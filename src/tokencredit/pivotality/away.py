"""The crew of workers on Ray: each holds the model and the task, and verifies by the row that is sent along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokencredit.distribute.host import Host
from tokencredit.distribute.pool import Pool
from tokencredit.lm.distribution import Settings
from tokencredit.lm.sampling import Progress
from tokencredit.pivotality.crew import Piece, Work
from tokencredit.pivotality.parts import Found, Written, sampled
from tokencredit.tasks.task import Row
from tokencredit.tasks.verdict import Verdict


class Away:
    """A `Crew` of a pool; `rows` are the task's, one per trace."""

    def __init__(self, pool: Pool, settings: Settings, rows: Sequence[Row] = ()) -> None:
        self.pool, self.settings, self.rows = pool, settings, rows
        self.ends = pool.facts.ends

    def run(
        self, work: Work, pieces: Iterable[Piece], progress: Progress | None = None
    ) -> Iterator[tuple[int, Any]]:
        """`progress` hears of a part when it has come back."""
        calls = ((work, piece, {k: self.rows[k] for k in piece.numbers}) for piece in pieces)
        for number, done in self.pool.run(_on_host, calls):
            if progress and (written := _sampled(work, done)):
                progress(len(written.ids), sum(map(len, written.ids)))
            yield number, done


def _sampled(work: Work, done: Any) -> Written | None:
    """What was sampled just now."""
    if isinstance(done, Written):
        return done
    return done.written if work is sampled and isinstance(done, Found) else None


def _on_host(host: Host, work: Work, piece: Piece, rows: Mapping[int, Row]) -> Any:
    def judge(k: int, ids: tuple[int, ...], truncated: bool) -> Verdict:
        return host.policy.verdict(ids, rows[k], truncated)

    return work(host.sampler, judge, piece, None)
