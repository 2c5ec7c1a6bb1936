"""How prefix trees grow: breadth first over the model's distribution with pruning, then values carried from the leaves
to the roots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokencredit.pivotality.frontier import Frontier, measuring

Verify = Callable[[list[int], bool], float]
"""(completion token ids, its eos included; truncated: the length limit came before an eos) -> reward."""


@dataclass(frozen=True)
class Pruning:
    """When a prefix is kept, when a completion is complete, and what an unseen one may earn."""

    eps: float
    include_eps: float
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    reward_range: tuple[float, float]

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature <= 0 or self.eps < 0 or self.include_eps <= 0:
            raise ValueError(f"need max_new_tokens ≥ 1, temperature > 0, eps ≥ 0 and include_eps > 0, not {self}")


@dataclass(frozen=True)
class Nodes:
    """Every kept prefix of a block of trees, breadth first, so the children of a node are contiguous and sorted by
    token.
    """

    key: np.ndarray  # parent * vocab + token, ascending: a child is found by bisection. Root r of R has r − R < 0
    tree: np.ndarray  # index of the root
    depth: np.ndarray  # number of completion tokens
    probability: np.ndarray  # of the last token
    reach: np.ndarray  # of the whole prefix
    entropy: np.ndarray  # of the next-token distribution; NaN unless expanded
    pruned: np.ndarray  # next-token mass that was not kept; NaN unless expanded
    bracket: np.ndarray  # [N,2] bounds of V
    spread: np.ndarray  # standard deviation of the midpoint of Q over the next token; NaN unless expanded
    vocab: int
    max_new_tokens: int

    @cached_property
    def expanded(self) -> np.ndarray:
        """Which prefixes had their next-token distribution computed."""
        return ~np.isnan(self.pruned)


@dataclass
class _Level:
    """All kept prefixes of one depth. `parent` counts within the level above; `local` is P(prefix | its last included
    prefix).
    """

    parent: np.ndarray
    token: np.ndarray
    tree: np.ndarray
    probability: np.ndarray
    reach: np.ndarray
    local: np.ndarray
    path: np.ndarray  # [n, depth] the completion so far
    reward: np.ndarray  # NaN unless complete
    entropy: np.ndarray
    pruned: np.ndarray

    @classmethod
    def of_roots(cls, num: int) -> _Level:
        whole, unknown = np.arange(num), np.full((3, num), np.nan)
        # local 0: around a root, which every completion shares, `eps` alone decides
        return cls(
            whole - num,
            whole * 0,
            whole,
            *np.ones((2, num)),
            np.zeros(num),
            np.zeros((num, 0), dtype=np.int64),
            *unknown,
        )

    @property
    def open(self) -> np.ndarray:
        """Rows that still want a next token."""
        return np.flatnonzero(np.isnan(self.reward))


class _Included:
    """Completions that must be in the tree, each with the row of its prefix at the current level."""

    def __init__(self, include: Sequence[Sequence[Sequence[int]]], vocab: int) -> None:
        wanted = [
            (tree, list(map(int, completion))) for tree, completions in enumerate(include) for completion in completions
        ]
        outside = next(((k, t) for k, ids in wanted for t in ids if not 0 <= t < vocab), None)
        if outside:
            raise ValueError(
                f"a completion to include of prompt {outside[0]} has token id {outside[1]}, outside the vocabulary of"
                f" {vocab}"
            )
        width = max((len(ids) for _, ids in wanted), default=0)
        self.ids = np.array([ids + [-1] * (width - len(ids)) for _, ids in wanted], dtype=np.int64).reshape(
            len(wanted), width
        )
        self.row = np.array([tree for tree, _ in wanted], dtype=np.int64)
        self.active = np.arange(len(wanted))

    def step(self, depth: int, open_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position among the open rows, token) of the children that are wanted at this depth; drops what has ended."""
        if depth >= self.ids.shape[1]:
            self.active = self.active[:0]
        else:
            wants = (self.ids[self.active, depth] >= 0) & np.isin(self.row[self.active], open_rows)
            self.active = self.active[wants]
        if not len(self.active):
            return self.active, self.active
        return np.searchsorted(open_rows, self.row[self.active]), self.ids[self.active, depth]

    def follow(self, child_key: np.ndarray, wanted_key: np.ndarray) -> None:
        """Moves every active completion to its child's row."""
        self.row[self.active] = np.searchsorted(child_key, wanted_key)


def grow_block(
    frontier: Frontier, verify: Sequence[Verify], include: Sequence[Sequence[Sequence[int]]], rule: Pruning
) -> Nodes:
    """Trees of the frontier's prompts, which have equal length; see `tokencredit.pivotality.tree.grow_forest`."""
    levels = [_Level.of_roots(len(frontier.prompts))]
    with measuring(frontier.model):
        logits = frontier.start()
        vocab = logits.shape[1]
        included = _Included(include, vocab)
        for depth in range(rule.max_new_tokens):
            above = levels[-1]
            level, position = _expand(above, logits, included, depth, rule)
            _verify_leaves(level, verify, rule)
            levels.append(level)
            open_rows = level.open
            if not len(open_rows):
                break
            logits = frontier.advance(torch.from_numpy(position[open_rows]), torch.from_numpy(level.token[open_rows]))
    return _collect(levels, vocab, rule)


def _expand(above: _Level, logits: Tensor, included: _Included, depth: int, rule: Pruning) -> tuple[_Level, np.ndarray]:
    """The kept children of the open rows of a level, and each one's position among those open rows."""
    open_rows, vocab = above.open, logits.shape[1]
    log_p = torch.log_softmax(logits / rule.temperature, -1)
    p = log_p.exp()
    above.entropy[open_rows] = torch.special.entr(p).sum(-1).numpy()
    p = p.numpy()
    position, token = included.step(depth, open_rows)
    matters = (above.reach[open_rows, None] * p >= rule.eps) | (above.local[open_rows, None] * p >= rule.include_eps)
    keep = matters & (p > 0)
    keep[position, token] = True
    wanted_key = position * vocab + token
    position, token = np.nonzero(keep)
    parent, prob = open_rows[position], p[position, token]
    above.pruned[open_rows] = np.maximum(0.0, 1.0 - np.bincount(position, prob, minlength=len(open_rows)))
    included.follow(position * vocab + token, wanted_key)
    local = above.local[parent] * prob
    local[included.row[included.active]] = 1.0
    path = np.concatenate([above.path[parent], token[:, None]], 1)
    unknown = np.full((3, len(token)), np.nan)
    return _Level(parent, token, above.tree[parent], prob, above.reach[parent] * prob, local, path, *unknown), position


def _verify_leaves(level: _Level, verify: Sequence[Verify], rule: Pruning) -> None:
    """Rewards of the prefixes that are complete: they end with eos, or have reached the length limit."""
    ended = np.isin(level.token, rule.eos_token_ids)
    worst, best = rule.reward_range
    complete = np.flatnonzero(ended | (level.path.shape[1] == rule.max_new_tokens))
    for row, tree, ids, truncated in zip(
        complete, level.tree[complete], level.path[complete].tolist(), ~ended[complete]
    ):
        reward = float(verify[tree](ids, bool(truncated)))
        if not worst <= reward <= best:
            raise ValueError(
                f"the verifier gave {reward} to {ids}, outside reward_range={rule.reward_range}: the brackets would not"
                " hold"
            )
        level.reward[row] = reward


def _collect(levels: list[_Level], vocab: int, rule: Pruning) -> Nodes:
    """Levels to flat arrays."""
    sizes = [len(level.token) for level in levels]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    roots, deeper = levels[0], zip(levels[1:], starts)
    key = np.concatenate([roots.parent, *((level.parent + start) * vocab + level.token for level, start in deeper)])
    bracket, spread = _back_up(levels, rule)

    def flat(name: str) -> np.ndarray:
        return np.concatenate([getattr(level, name) for level in levels])

    depth = np.repeat(np.arange(len(levels)), sizes)
    measured = (flat(name) for name in ("probability", "reach", "entropy", "pruned"))
    return Nodes(key, flat("tree"), depth, *measured, bracket, spread, vocab, rule.max_new_tokens)


def _back_up(levels: list[_Level], rule: Pruning) -> tuple[np.ndarray, np.ndarray]:
    """V = Σ p Q + pruned · [worst, best], from the deepest level upwards: brackets [N,2] and spreads [N]."""
    brackets: list[np.ndarray] = []
    spreads: list[np.ndarray] = []
    limits = np.array(rule.reward_range)
    for k in range(len(levels) - 1, -1, -1):
        level, rows = levels[k], levels[k].open
        bracket, spread = np.stack([level.reward] * 2, -1), np.full(len(level.token), np.nan)
        if len(rows):
            kids, below = levels[k + 1], brackets[-1]

            def expect(values: np.ndarray, kids: _Level = kids, num: int = len(spread)) -> np.ndarray:
                return np.bincount(kids.parent, kids.probability * values, minlength=num)

            rest = level.pruned[rows]
            bracket[rows] = np.stack([expect(below[:, 0]), expect(below[:, 1])], -1)[rows] + rest[:, None] * limits
            middle = bracket.mean(-1)
            away = (
                expect((below.mean(-1) - middle[kids.parent]) ** 2)[rows] + rest * (limits.mean() - middle[rows]) ** 2
            )
            spread[rows] = np.sqrt(away)
        brackets.append(bracket)
        spreads.append(spread)
    return np.concatenate(brackets[::-1]), np.concatenate(spreads[::-1])
