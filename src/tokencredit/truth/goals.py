"""The gradients of expected reward and of mean token entropy, without sampling: sums over the prefixes of a tree.

    ∇J = Σ_c P(c) (R(c) − J M(c)) ∇log π(c) / M                         c a kept prefix, π(c) of its last token
    ∇A = Σ_c P(c) A(c) ∇log π(c) + Σ_x P(x) ∇H(x)                       A(x) = H(x) + Σ_a π(a|x) A(xa), entropy to go
    ∇B = Σ_c P(c) B(c) ∇log π(c)                                        B(x) = 1 + Σ_a π(a|x) B(xa), tokens to go
    ∇H̄ = (∇A − H̄ ∇B) / B,   H̄ = A / B                                 the mean over all tokens that are sampled

R(c) is the reward and M(c) the mass of the completions behind c that the tree holds, R and M those of the root, and
J = R / M: completions outside the tree are taken to be worth what those inside are. With M = 1 the first line is the
policy gradient theorem, and so are the others, with entropy and length for rewards; what is left out adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.vectors import Vector
from tokencredit.lm.policy import Policy
from tokencredit.pivotality.tree import Prefixes, PrefixTree


@dataclass(frozen=True)
class Known:
    """Expected reward and mean token entropy over the prompts, each with its gradient over the parameters."""

    reward: float
    entropy: float
    reward_gradient: Vector
    entropy_gradient: Vector


def known_goals(policy: Policy, prompts: Sequence[Sequence[int]], trees: Sequence[PrefixTree]) -> Known:
    """Both goals from one tree per prompt. Prompts count alike in J; in H̄ every token does."""
    reward = entropy = length = 0.0
    sums: dict[str, Vector] = {}
    for prompt, tree in zip(prompts, trees):
        p = tree.prefixes()
        mass = 1 - (p.bracket[:, 1] - p.bracket[:, 0])
        value = p.bracket[0, 0] / mass[0]
        to_go = {
            "entropy": _to_go(p, np.where(p.expanded, np.nan_to_num(p.entropy), 0.0)),
            "length": _to_go(p, p.expanded.astype(float)),
        }
        reward += value
        entropy += to_go["entropy"][0]
        length += to_go["length"][0]
        rows = _Rows(p)
        passes = Passes(policy.model, [prompt] * len(rows.paths), rows.paths, temperature=policy.temperature)
        weights = {
            "reward": (rows.edges(p.reach * (p.bracket[:, 0] - value * mass) / mass[0]), None),
            "entropy": (rows.edges(p.reach * to_go["entropy"]), rows.contexts(p.reach * p.expanded)),
            "length": (rows.edges(p.reach * to_go["length"]), None),
        }
        for name, pair in weights.items():
            found = passes.reverse(*pair)
            sums[name] = {key: sums[name][key] + x for key, x in found.items()} if name in sums else found
    mean = entropy / length
    along = {key: (x - mean * sums["length"][key]) / length for key, x in sums["entropy"].items()}
    return Known(
        float(reward / len(trees)), float(mean), {key: x / len(trees) for key, x in sums["reward"].items()}, along
    )


def _to_go(p: Prefixes, own: np.ndarray) -> np.ndarray:
    """[N]: what a prefix gives itself and, on average, all that follow it."""
    total = own.copy()
    for depth in range(int(p.depth.max()), 0, -1):
        at = np.flatnonzero(p.depth == depth)
        share = p.reach[at] / np.maximum(p.reach[p.parent[at]], 1e-300)
        np.add.at(total, p.parent[at], share * total[at])
    return total


class _Rows:
    """A tree as rows for a forward pass: the paths to its leaves. Every prefix belongs to one row, the first that goes
    through it."""

    def __init__(self, p: Prefixes) -> None:
        leaves = np.setdiff1d(np.arange(len(p.parent)), p.parent)
        self.paths: list[list[int]] = []
        self.row, self.depth = np.full(len(p.parent), -1), p.depth
        for number, leaf in enumerate(leaves):
            node, path = int(leaf), []
            while node > 0:
                path.append(int(p.token[node]))
                if self.row[node] < 0:
                    self.row[node] = number
                node = int(p.parent[node])
            # Any token will do behind a leaf whose entropy counts: only the distribution before it is looked at.
            self.paths.append(path[::-1] + [0] * bool(p.expanded[leaf]))
        self.row[0] = 0
        self.shape = (len(self.paths), max(map(len, self.paths)))

    def edges(self, weight: np.ndarray) -> torch.Tensor:
        """[rows, T]: a prefix's weight at its last token."""
        return self._grid(weight, self.depth - 1, self.depth > 0)

    def contexts(self, weight: np.ndarray) -> torch.Tensor:
        """[rows, T]: a prefix's weight at the token after it."""
        return self._grid(weight, self.depth, self.depth < self.shape[1])

    def _grid(self, weight: np.ndarray, column: np.ndarray, keep: np.ndarray) -> torch.Tensor:
        grid = np.zeros(self.shape)
        grid[self.row[keep], column[keep]] = weight[keep]
        return torch.from_numpy(grid)
