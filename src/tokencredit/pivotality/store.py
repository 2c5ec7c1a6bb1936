"""Where rollouts are kept: Parquet parts that are named by what they hold, written whole or not at all.

    identity.json             model hash, sampler settings, verifier and the hash of its source
    parts/<digest>.parquet    trace, position, alternative, reward, reason, length, seed, truncated, ids: one row per
                              rollout
    pieces/<digest>.parquet   the same, of a part that is not whole yet
    traces/<digest>.parquet   ids: completions that were sampled to be measured

A list of requests is cut into `parts`, and they into pieces; a name is a hash of the identity and of the requests
(prompt and prefix token ids, alternative, length budget, seed). What is there is read, any other piece is sampled, so a
command that was killed goes on where it was and, since a piece is always sampled whole, ends with the same bits. A part
whose pieces are there becomes one file: it is the same whatever its pieces were. Whoever samples, this process alone
writes. A rollout that the verifier failed on is kept without a reward, and verified again
by the next command. A store of another model, sampler or verifier is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.distribute.lost import Lost
from tokencredit.durable import (
    DamagedFile,
    plain,
    read_mapping,
    read_rows,
    write_json,
    write_parquet,
)
from tokencredit.lm.distribution import Settings
from tokencredit.lm.sampling import Progress, Request, Trace
from tokencredit.pivotality.crew import Crew
from tokencredit.pivotality.parts import Found, Part, Written, continued, holes, pieces, sampled, verified

ON_PATH = -1  # the alternative of a continuation of the trace itself
COLUMNS = ("reward", "length", "truncated", "ids")  # what is read of a part


class StoreError(ValueError):
    """A store that holds something else than what is asked for."""


@dataclass(frozen=True)
class Outcomes:
    """What came of requests, in their order: reward [n] float64, NaN where there is none; length [n] sampled tokens.

    failed   {number of the trace: why}, of traces that the verifier or all workers failed on
    """

    reward: np.ndarray
    length: np.ndarray
    failed: dict[int, Exception] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stored:
    """A part: its name, and what it is in now, (name, requests) each."""

    name: str
    units: list[tuple[str, slice]]


def sampler_identity(
    kind: str,
    settings: Settings,
    ends: Sequence[int],
    *,
    model: str,
    model_digest: str,
    verifier: str,
    max_new_tokens: int,
    verifier_source: str | None = None,
) -> dict[str, Any]:
    """What rollouts of a store have in common. kind, settings, ends: of the sampler. `verifier_source`: of
    `tasks.source`, None where it cannot be had.
    """
    return plain(
        {
            "model": model,
            "model_hash": model_digest,
            "sampler": {
                "kind": kind,
                **settings.as_dict(),
                "ends": list(ends),
                "max_new_tokens": max_new_tokens,
            },
            "verifier": verifier,
            "verifier_source": verifier_source,
        }
    )


class RolloutStore:
    """Rollouts of one identity, in a folder; with no folder, in memory for one call.

    labels     for each trace, what its rewards depend on besides its tokens (the task's row): rollouts with another
               label are other rollouts
    part       rollouts per part, `part_size` by default. Parts of another size are other parts: what is there is not
               used
    generated  tokens that were sampled since the store was opened; of what was there, none
    """

    def __init__(
        self,
        path: str | Path | None,
        identity: Mapping[str, Any],
        part: int | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.path, self.identity, self.part, self.labels = (
            None if path is None else Path(path),
            plain(dict(identity)),
            part,
            labels,
        )
        self.generated = 0
        # The name of a model may differ between machines, its hash may not.
        self._digest = json.dumps({k: v for k, v in self.identity.items() if k != "model"}, sort_keys=True).encode()
        if self.path is not None:
            self._open()

    def _open(self) -> None:
        file = self.path / "identity.json"
        there = read_mapping(file) if file.exists() else self.identity
        mine, other = dict(_flat(self.identity)), dict(_flat(there))
        wrong = [
            f"  {key}: {other.get(key, '(absent)')!r} in the store, {mine.get(key, '(absent)')!r} asked for"
            for key in {**other, **mine}
            if key != "model" and other.get(key) != mine.get(key)
        ]
        if wrong:
            models = f"(written by the model {there.get('model')!r}, asked for {self.identity.get('model')!r})"
            raise StoreError(
                f"the store {self.path} holds other rollouts {models}:\n"
                + "\n".join(wrong)
                + _why(other, mine)
                + "\nUse another directory."
            )

    def collect(
        self,
        traces: Sequence[Trace],
        requests: Sequence[Request],
        crew: Crew,
        stage: str = "",
        progress: Progress | None = None,
    ) -> Outcomes:
        """The outcome of every request: read where it is stored, sampled and verified by the crew where not."""
        parts = [self._units(traces, requests, own) for own in pieces(requests, crew.together, self.part)]
        units = [unit for part in parts for unit in part.units]
        found = Outcomes(np.full(len(requests), np.nan), np.zeros(len(requests), int))
        missing, unverified = [], {}
        for n, (name, own) in enumerate(units):
            there = self._read(name)
            if there is None:
                missing.append(n)
            elif holes(there["reward"]):
                ids = [tuple(each) for each in there["ids"]]
                unverified[n] = Written(Part.of(traces, requests[own]), ids, there["truncated"])
            else:
                found.reward[own], found.length[own] = there["reward"], there["length"]
            if there is not None and progress:
                progress(own.stop - own.start)
        for work, numbers, given in (
            (sampled, missing, (Part.of(traces, requests[units[n][1]]) for n in missing)),
            (verified, list(unverified), list(unverified.values())),
        ):
            for k, done in crew.run(work, given, progress):
                name, own = units[numbers[k]]
                if isinstance(done, Lost):
                    found.failed.update(dict.fromkeys((r.trace for r in requests[own]), done.error))
                    continue
                self._write(name, done, stage)
                found.failed.update(done.failed)
                found.reward[own] = [np.nan if reward is None else reward for reward in done.reward]
                found.length[own] = [len(ids) for ids in done.written.ids]
                self.generated += int(found.length[own].sum()) * (work is sampled)
        for part in parts:
            self._join(part)
        return found

    def write(
        self, traces: Sequence[Trace], requests: Sequence[Request], crew: Crew, progress: Progress | None = None
    ) -> list[tuple[int, ...]]:
        """The token ids of every request: read where they are stored, sampled by the crew where not, and not verified.
        The error of a piece that nobody could sample is raised.
        """
        where = [own for part in pieces(requests, crew.together, self.part) for own in part]
        names = [f"traces/{self._name(traces, requests[own])}" for own in where]
        found: list[tuple[int, ...]] = [()] * len(requests)
        missing = []
        for n, own in enumerate(where):
            if (there := self._rows(names[n])) is None:
                missing.append(n)
                continue
            found[own] = [tuple(row["ids"]) for row in there]
            if progress:
                progress(own.stop - own.start)
        for k, done in crew.run(continued, (Part.of(traces, requests[where[n]]) for n in missing), progress):
            if isinstance(done, Lost):
                raise done.error
            found[where[missing[k]]] = done.ids
            self._keep(names[missing[k]], [{"ids": list(ids)} for ids in done.ids])
        return found

    def _units(self, traces: Sequence[Trace], requests: Sequence[Request], where: Sequence[slice]) -> _Stored:
        """A part in pieces: one file where it is whole or a single piece, else a file for each."""
        whole = slice(where[0].start, where[-1].stop)
        name = f"parts/{self._name(traces, requests[whole])}"
        if len(where) == 1:
            return _Stored(name, [(name, whole)])
        some = [(f"pieces/{self._name(traces, requests[own])}", own) for own in where]
        if not self._is_there(name):
            return _Stored(name, some)
        for piece, _ in some:  # of a command that was killed when it had just made the whole
            self._file(piece).unlink(missing_ok=True)
        return _Stored(name, [(name, whole)])

    def _join(self, part: _Stored) -> None:
        """Makes one file of the pieces of a part, where all are there."""
        names = [name for name, _ in part.units]
        if names == [part.name] or not all(map(self._is_there, names)):
            return
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        tables = [parquet.read_table(self._file(name)) for name in names]
        self._keep(part.name, arrow.concat_tables(tables).cast(_schema()).combine_chunks())
        for name in names:
            self._file(name).unlink()

    def _name(self, traces: Sequence[Trace], requests: Sequence[Request]) -> str:
        digest = hashlib.blake2b(self._digest, digest_size=16)
        prefixes: dict[tuple[int, int], bytes] = {}
        for r in requests:
            key = r.trace, r.prefix
            if key not in prefixes:
                prefixes[key] = prefix_digest(traces[r.trace], r.prefix) + (
                    self.labels[r.trace].encode() if self.labels else b""
                )
            digest.update(prefixes[key] + f"{r.token} {r.budget} {r.seed};".encode())
        return digest.hexdigest()

    def _file(self, name: str) -> Path:
        assert self.path is not None
        return self.path / f"{name}.parquet"

    def _is_there(self, name: str) -> bool:
        return self.path is not None and self._file(name).exists()

    def _rows(self, name: str) -> list[dict[str, Any]] | None:
        if not self._is_there(name):
            return None
        try:
            return read_rows(self._file(name))
        except DamagedFile as error:
            raise DamagedFile(f"{error}, and run the same command again: it is sampled anew") from error

    def _read(self, name: str) -> dict[str, list] | None:
        rows = self._rows(name)
        return None if rows is None else {name: [row[name] for row in rows] for name in COLUMNS}

    def _keep(self, name: str, table: Any) -> None:
        if self.path is None:
            return
        # Only now is the folder ours: a command that failed before its first rollout leaves it to the next.
        if not (self.path / "identity.json").exists():
            write_json(self.path / "identity.json", self.identity)
        write_parquet(self._file(name), table)

    def _write(self, name: str, found: Found, stage: str) -> None:
        if self.path is None:
            return
        import pyarrow as arrow

        part, ids = found.written.part, found.written.ids
        digests = [prefix_digest(trace, len(trace.completion)).hex() for trace in part.traces]
        columns = {
            "trace": [digests[r.trace] for r in part.requests],
            "stage": [stage] * len(ids),
            "position": [r.prefix for r in part.requests],
            "alternative": [ON_PATH if r.token is None else r.token for r in part.requests],
            "reward": found.reward,
            "reason": found.reason,
            "length": [len(each) for each in ids],
            "seed": [r.seed for r in part.requests],
            "truncated": found.written.truncated,
            "ids": ids,
        }

        self._keep(name, arrow.table(columns, schema=_schema()))


def _schema() -> Any:
    """Of a file of rollouts."""
    import pyarrow as arrow

    return arrow.schema(
        {
            "trace": arrow.string(),
            "stage": arrow.string(),
            "position": arrow.int32(),
            "alternative": arrow.int32(),
            "reward": arrow.float64(),
            "reason": arrow.string(),
            "length": arrow.int32(),
            "seed": arrow.int64(),
            "truncated": arrow.bool_(),
            "ids": arrow.list_(arrow.int32()),
        }
    )


def _why(there: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """What a difference in the verifier's source means, as a line of its own."""
    name = "verifier_source"
    if there.get(name) == mine.get(name):
        return ""
    if name not in there:
        return "\nThe store is of a version that knew a verifier by its name: its rewards may be those of other code."
    return f"\nThe verifier {mine.get('verifier')!r} was edited, so the rewards in the store are those of other code."


def _flat(identity: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of nested mappings, with dotted names."""
    for key, value in identity.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}{key}.")
        else:
            yield f"{name}{key}", value


def prefix_digest(trace: Trace, prefix: int) -> bytes:
    """16 bytes that name a prompt and the first `prefix` tokens of a completion."""
    numbers = np.array([len(trace.prompt), *trace.prompt, *trace.completion[:prefix]], np.int64)
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()
