"""Which completions are scored together: what is stored when it is there, so that a kill costs seconds of work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

from tokencredit.lm.proxies import DIRECTIONS, SKETCHED
from tokencredit.scores.steps import ROLLOUTS


def cut(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: int,
    tokens: int,
    siblings: Sequence[int] | None = None,
) -> list[range]:
    """Which rows (prompt, completion) are scored together: at most `batch` of them with at most so many tokens, and one
    at the least; `siblings`, the group of every row: rows of a group, which follow each other, stay together, however
    many they are.
    """
    units = [list(own) for _, own in groupby(range(len(rows)), key=siblings.__getitem__ if siblings else None)]
    bounds, size = [0], 0
    for unit in units:
        more = sum(len(ids) for k in unit for ids in rows[k])
        if unit[0] > bounds[-1] and (unit[-1] + 1 - bounds[-1] > batch or size + more > tokens):
            bounds.append(unit[0])
            size = 0
        size += more
    return [range(a, b) for a, b in pairwise([*bounds, len(rows)])] if rows else []


def passes_of(names: Sequence[str], directions: int | None) -> int:
    """About how many forward passes over a row these scores cost: what a sketch costs for its directions, and step
    values for their rollouts.
    """
    many = 3 * (directions or DIRECTIONS) * bool(set(names) & set(SKETCHED))
    many += 4 * ("last_block_norm" in names) + 4 * ROLLOUTS * ("step_gain" in names)
    return 1 + many
