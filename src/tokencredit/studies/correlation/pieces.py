"""The pieces of the study that workers do, each a function of a host; and asking a pool for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tokencredit.distribute.host import Host
from tokencredit.distribute.pool import Alone, Pool, done
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.sampling import Progress
from tokencredit.studies.correlation import conditions, measurement
from tokencredit.tasks.task import Row

BATCH = 32  # completions whose proxies are computed together
Drawn = Sequence[Sequence[dict]]


def draw(pool: Pool | Alone, rows: Sequence[Row], num: int, seed: int, progress: Progress) -> list[list[dict]]:
    """`measurement.draw` of all rows, which is one piece: what is sampled is sampled together."""
    return done(pool, _drawn, [(rows, num, seed)], progress, lambda found: (sum(map(len, found)), 0))[0]


def _drawn(host: Host, rows: Sequence[Row], num: int, seed: int) -> list[list[dict]]:
    return measurement.draw(host.policy, rows, num, seed, host.listen)


def proxies(
    pool: Pool | Alone, rows: Sequence[Row], drawn: Drawn, seed: int, kinds: Sequence[str]
) -> dict[str, np.ndarray]:
    """`measurement.proxies` of all completions, `BATCH` of them a piece."""
    pairs = [(row, each) for row, group in zip(rows, drawn) for each in group]
    calls = [(pairs[start : start + BATCH], seed, kinds) for start in range(0, len(pairs), BATCH)]
    found = done(pool, _proxies, calls)
    return {kind: np.concatenate([piece[kind] for piece in found]) for kind in kinds}


def _proxies(host: Host, pairs: Sequence[tuple[Row, dict]], seed: int, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    rows, completions = [row for row, _ in pairs], [[each] for _, each in pairs]
    return measurement.proxies(host.policy, rows, completions, seed, kinds, BATCH)


def rolled_out(host: Host, rows: Sequence[Row], drawn: Drawn, num: int, seed: int) -> dict[str, np.ndarray]:
    """`measurement.roll_out` as arrays, its cost among them."""
    found, cost = measurement.roll_out(host.policy, rows, drawn, num, seed, host.listen)
    return asdict(found) | {name: np.array(value) for name, value in cost.items()}


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
    """`conditions.measure` of a condition of the policy that is asked about; another model is opened for it."""
    if which.model == asked.model:
        policy = replace(host.policy, temperature=which.temperature)
    else:
        policy = replace(asked, model=which.model, temperature=which.temperature).open()
    return conditions.measure(policy, rows, **options)
