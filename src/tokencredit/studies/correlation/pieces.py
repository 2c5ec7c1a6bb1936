"""The pieces of the study that workers do, each a function of a host; and asking a pool for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np

from tokencredit.distribute.host import Host
from tokencredit.distribute.pool import Alone, Pool, done
from tokencredit.lm.policy import Policy, PolicyConfig
from tokencredit.lm.sampling import Progress
from tokencredit.studies.correlation import conditions, measurement
from tokencredit.tasks.task import Row

Drawn = Sequence[Sequence[dict]]


def draw(pool: Pool | Alone, rows: Sequence[Row], num: int, seed: int, progress: Progress) -> list[list[dict]]:
    """`measurement.draw` of all rows, which is one piece: what is sampled is sampled together."""
    return done(pool, _drawn, [(rows, num, seed)], progress, lambda found: (sum(map(len, found)), 0))[0]


def _drawn(host: Host, rows: Sequence[Row], num: int, seed: int) -> list[list[dict]]:
    return measurement.draw(host.policy, rows, num, seed, host.listen)


def proxies(host: Host, pairs: Sequence[tuple[Row, dict]], seed: int, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """`measurement.proxies` of some completions, with the row of each."""
    rows, completions = [row for row, _ in pairs], [[each] for _, each in pairs]
    return measurement.proxies(host.policy, rows, completions, seed, kinds, len(pairs))


def rolled_out(
    host: Host, rows: Sequence[Row], drawn: Drawn, num: int, seed: int, first: int = 0, places: range | None = None
) -> dict[str, np.ndarray]:
    """`measurement.roll_out` as arrays, its cost among them."""
    found, cost = measurement.roll_out(host.policy, rows, drawn, num, seed, host.listen, first, places)
    return asdict(found) | {name: np.array(value) for name, value in cost.items()}


def spans(length: int, num: int, limit: int, together: int) -> list[range]:
    """The tokens of a completion in pieces of at most `together` tokens of `num` rollouts each, which may be as long as
    `limit` leaves; of one token at the least.
    """
    bounds, size = [0], 0
    for at in range(length):
        more = num * (limit - at)
        if at > bounds[-1] and size + more > together:
            bounds.append(at)
            size = 0
        size += more
    return [range(a, b) for a, b in pairwise([*bounds, length])] if length else []


def rollouts_and_tokens(found: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """What a piece of rollouts cost."""
    return int(found["rollouts"]), int(found["tokens"])


def exact(host: Host, rows: Sequence[Row], drawn: Drawn) -> dict[str, np.ndarray]:
    """Effects from prefix trees."""
    return measurement.exact(host.policy, rows, drawn, eps=1e-5)


def condition(
    host: Host,
    asked: PolicyConfig,
    which: conditions.Condition,
    rows: Sequence[Row],
    options: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """`conditions.measure` of a condition of the policy that is asked about; another model is opened for it, and kept
    for the next piece.
    """
    if which.model == asked.model:
        policy = replace(host.policy, temperature=which.temperature)
    else:
        other = replace(asked, model=which.model, temperature=which.temperature)
        policy = _opened(json.dumps(other.as_dict() | {"memory": other.memory}))
    return conditions.measure(policy, rows, **options)


_other: dict[str, Policy] = {}


def _opened(policy: str) -> Policy:
    if policy not in _other:
        _other.clear()  # one at a time
        _other[policy] = PolicyConfig(**json.loads(policy)).open()
    return _other[policy]
