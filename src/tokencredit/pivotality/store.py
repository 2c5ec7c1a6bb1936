"""Where rollouts are kept: Parquet parts that are named by what they hold, written whole or not at all.

    identity.json             model hash, sampler settings, verifier and the hash of its source
    parts/<digest>.parquet    trace, position, alternative, reward, reason, length, seed, truncated, ids: one row per
                              rollout

A list of requests is cut into parts, by its length and by theirs (`part_size`); the name of a part is a hash of the
identity and of its requests (prompt and prefix token ids, alternative, length budget, seed). A part that is there is
read, any other is sampled, so a command that was killed goes on where it was and, since a part is always sampled
whole, ends with the same bits. A store of another model, sampler or verifier is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokencredit.durable import (
    DamagedFile,
    plain,
    read_mapping,
    read_rows,
    write_json,
    write_parquet,
)
from tokencredit.lm.models import CausalModel
from tokencredit.lm.sampling import Progress, Request, Rollout, Sampler, Trace
from tokencredit.tasks.verdict import Verdict, VerifierError, to_verdict

LEAST, MOST = 64, 4096  # rollouts per part: what a batch is filled from, and what a kill may cost
SHARE = 8  # ... which is never more than one such share of the work, where that is more than the least
TOKENS, FEW = 2048, 16  # where rollouts may be long, the least is what may make so many tokens, down to so few rollouts
ON_PATH = -1  # the alternative of a continuation of the trace itself
CHECK_EVERY = 64  # every so many rollouts are verified twice
COLUMNS = ("reward", "length", "truncated", "reason", "ids")  # what is read of a part

Judge = Callable[[int, tuple[int, ...], bool], Any]
"""(index of the trace, completion token ids, truncated) -> Verdict, bool, or a reward in [0, 1]."""


class StoreError(ValueError):
    """A store that holds something else than what is asked for."""


@dataclass(frozen=True)
class Outcomes:
    """What came of requests, in their order: reward [n] float64, length [n] sampled tokens, truncated [n], reason and
    ids lists.
    """

    reward: np.ndarray
    length: np.ndarray
    truncated: np.ndarray
    reason: list[str]
    ids: list[tuple[int, ...]]


def part_size(num: int, longest: int = 0) -> int:
    """Rollouts per part of `num` requests of at most `longest` tokens: an eighth of them, from 64 to 4,096; from fewer
    where they may be long, what may make 2,048 tokens (half a minute of a model that writes 60 a second), down to 16.
    """
    least = min(max(TOKENS // max(longest, 1), FEW), LEAST)
    return min(max(-(-num // SHARE), least), MOST)


def model_hash(model: CausalModel) -> str:
    """32 hex digits of a model's parameters and buffers, names included, and of its architecture."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def sampler_identity(
    sampler: Sampler,
    model: str,
    model_digest: str,
    verifier: str,
    max_new_tokens: int,
    verifier_source: str | None = None,
) -> dict[str, Any]:
    """What rollouts of a store have in common. `verifier_source`: of `tasks.source`, None where it cannot be had."""
    return plain(
        {
            "model": model,
            "model_hash": model_digest,
            "sampler": {
                "kind": type(sampler).__name__,
                **sampler.settings.as_dict(),
                "ends": list(sampler.ends),
                "max_new_tokens": max_new_tokens,
            },
            "verifier": verifier,
            "verifier_source": verifier_source,
        }
    )


class RolloutStore:
    """Rollouts of one identity, in a folder; with no folder, in memory for one call.

    labels   for each trace, what its rewards depend on besides its tokens (the task's row): rollouts with another label
             are other rollouts
    part     rollouts per part, `part_size` by default. Parts of another size are other parts: what is there is not used
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
        sampler: Sampler,
        judge: Judge,
        stage: str = "",
        progress: Progress | None = None,
    ) -> Outcomes:
        """The outcome of every request: read where it is stored, sampled and verified where not."""
        columns: dict[str, list] = {name: [] for name in COLUMNS}
        size = self.part or part_size(len(requests), max((r.budget for r in requests), default=0))
        for start in range(0, len(requests), size):
            some = requests[start : start + size]
            name = self._name(traces, some)
            found = self._read(name)
            if found is None:
                found = self._sample(traces, some, sampler, judge, stage, progress)
                self._write(name, found)
            elif progress:
                progress(len(some))
            for key, values in columns.items():
                values += found[key]
        return Outcomes(
            np.array(columns["reward"], float),
            np.array(columns["length"], int),
            np.array(columns["truncated"], bool),
            columns["reason"],
            [tuple(ids) for ids in columns["ids"]],
        )

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

    def _read(self, name: str) -> dict[str, list] | None:
        if self.path is None or not (file := self.path / "parts" / f"{name}.parquet").exists():
            return None
        try:
            rows = read_rows(file)
        except DamagedFile as error:
            raise DamagedFile(f"{error}, and run the same command again: it is sampled anew") from error
        return {name: [row[name] for row in rows] for name in COLUMNS}

    def _write(self, name: str, found: dict[str, list]) -> None:
        if self.path is None:
            return
        import pyarrow as arrow

        types = {
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
        # Only now is the folder ours: a command that failed before its first rollout leaves it to the next.
        if not (self.path / "identity.json").exists():
            write_json(self.path / "identity.json", self.identity)
        table = arrow.table({key: arrow.array(found[key], type=kind) for key, kind in types.items()})
        write_parquet(self.path / "parts" / f"{name}.parquet", table)

    def _sample(
        self,
        traces: Sequence[Trace],
        requests: Sequence[Request],
        sampler: Sampler,
        judge: Judge,
        stage: str,
        progress: Progress | None,
    ) -> dict[str, list]:
        rollouts: list[Rollout | None] = [None] * len(requests)
        for index, rollout in sampler.continue_(traces, requests, progress):
            rollouts[index] = rollout
        found: dict[str, list] = {name: [] for name in ("reward", "reason")}
        for number, (r, rollout) in enumerate(zip(requests, rollouts)):
            ids = (*traces[r.trace].completion[: r.prefix], *(() if r.token is None else (r.token,)), *rollout.ids)
            reward, reason = judged(judge, r.trace, ids, rollout.truncated)
            if number % CHECK_EVERY == 0 and judged(judge, r.trace, ids, rollout.truncated) != (reward, reason):
                raise ValueError(
                    "the verifier gave two answers to the same completion: pivotality needs one that is deterministic "
                    f"(trace {r.trace}, {len(ids)} tokens)"
                )
            found["reward"].append(reward)
            found["reason"].append(reason)
        names = {k: prefix_digest(traces[k], len(traces[k].completion)).hex() for k in {r.trace for r in requests}}
        return found | {
            "trace": [names[r.trace] for r in requests],
            "stage": [stage] * len(requests),
            "position": [r.prefix for r in requests],
            "alternative": [ON_PATH if r.token is None else r.token for r in requests],
            "seed": [r.seed for r in requests],
            "length": [len(x.ids) for x in rollouts],
            "truncated": [x.truncated for x in rollouts],
            "ids": [list(x.ids) for x in rollouts],
        }


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


def judged(judge: Judge, trace: int, ids: tuple[int, ...], truncated: bool) -> tuple[float, str]:
    """(reward in [0, 1], reason). A verifier that raises is a VerifierError naming the trace."""
    try:
        result = judge(trace, ids, truncated)
    except VerifierError:
        raise
    except Exception as error:
        raise VerifierError(
            f"the verifier failed on a completion of trace {trace}: {type(error).__name__}: {error}", {}
        ) from error
    if isinstance(result, float | int) and not isinstance(result, bool):
        if not 0 <= result <= 1:
            raise ValueError(
                f"the verifier gave the reward {result} (trace {trace}); pivotality needs rewards between 0 and 1"
            )
        return float(result), "correct" if result == 1 else "wrong"
    verdict: Verdict = to_verdict(result)
    return float(verdict.correct), verdict.reason
