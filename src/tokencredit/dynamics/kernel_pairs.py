"""Which pairs of tokens (or completions) the kernel couples: cosines by what the two have in common; the kernel's
spectrum.

Every statistic is a ratio of sums over pairs, the sums kept by (prompt, prompt): without a prompt both its row and its
column go, which is the jackknife for statistics of pairs. A token with itself is no pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.influence import interval
from tokencredit.dynamics.kernel import cosines
from tokencredit.dynamics.kernel_sketch import without_noise
from tokencredit.stats import Estimate

SCOPES = ("same completion", "same prompt", "other prompts")
LARGEST = 32


@dataclass(frozen=True, eq=False)
class Units:
    """What is known of the N tokens, or completions, of a kernel, [N] each; `labels` are further numbers by name:
    token, role, outcome.
    """

    row: np.ndarray
    position: np.ndarray
    prompt: np.ndarray
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def member(self) -> np.ndarray:
        """[N, P]: 1 where a unit is of a prompt; prompts that occur, ascending."""
        return (self.prompt[:, None] == np.unique(self.prompt)).astype(float)

    def scopes(self) -> dict[str, np.ndarray]:
        """{scope: [N, N] bool}: pairs of one completion, of two completions of one prompt, of two prompts. Each pair is
        in one.
        """
        together, row = self.prompt[:, None] == self.prompt, self.row[:, None] == self.row
        own = np.eye(len(self), dtype=bool)
        return dict(zip(SCOPES, (row & ~own, together & ~row, ~together)))

    def likeness(self) -> dict[str, np.ndarray]:
        """{name: [N, N] bool}: all pairs, those alike in a label or in position, and those alike in none."""
        labels = dict(self.labels) | ({"position": self.position} if (self.position >= 0).all() else {})
        alike = {f"same {name}": x[:, None] == x for name, x in labels.items()}
        none = ~np.logical_or.reduce(list(alike.values())) if alike else np.zeros((len(self), len(self)), bool)
        return {
            "all": np.ones((len(self), len(self)), bool),
            **alike,
            **({"alike in none of these": none} if alike else {}),
        }


@dataclass(frozen=True)
class SenderPairs:
    """Cosines of the pairs of one kind: how many, mean, mean of |cos|, standard deviation."""

    scope: str
    likeness: str
    num: int
    cosine: Estimate
    size: Estimate
    deviation: Estimate


def pair_table(k: Tensor, units: Units) -> list[SenderPairs]:
    """The kinds of pairs that occur, with intervals over prompts; a likeness that every pair of a scope has is left
    out.
    """
    cosine = cosines(k).numpy()
    alike, found = units.likeness(), []
    for scope, inside in units.scopes().items():
        for name, like in alike.items():
            kind = inside & like
            if not kind.any() or (name != "all" and kind.sum() == inside.sum()):
                continue
            sums = without_each(
                np.stack([_blocks(kind * x, units) for x in (1.0, cosine, np.abs(cosine), cosine**2)], -1)
            )
            num, first, size, second = (sums[:, i] for i in range(4))
            with np.errstate(invalid="ignore", divide="ignore"):
                mean = first / num
                columns = (mean, size / num, np.sqrt(np.maximum(second / num - mean**2, 0)))
            estimates = (interval(x[0], x[1:], within) for x, within in zip(columns, ((-1, 1), (0, 1), (0, 1))))
            found.append(SenderPairs(scope, name, round(num[0] / 2), *estimates))
    return found


def _blocks(values: np.ndarray, units: Units) -> np.ndarray:
    """[P, P]: sums over the units of two prompts."""
    return units.member.T @ values @ units.member


def without_each(blocks: np.ndarray) -> np.ndarray:
    """[1 + P, ...]: the sum over all blocks [P, P, ...], then that without each prompt's row and column."""
    whole = blocks.sum((0, 1))
    own = blocks[np.arange(len(blocks)), np.arange(len(blocks))]
    return np.concatenate([whole[None], whole - blocks.sum(0) - blocks.sum(1) + own])


def effective_rank(k: Tensor, units: Units, noise: float = 0.0) -> Estimate:
    """(Σ λ)² / Σ λ²: 1 where all gradients are parallel, N where they are orthogonal and alike in length. A sketch's
    noise is taken out.
    """
    trace = without_each(np.diag(units.member.T @ k.diagonal().numpy()))
    square = without_noise(without_each(_blocks(k.square().numpy(), units)), trace, noise)
    with np.errstate(invalid="ignore", divide="ignore"):
        rank = np.where(square > 0, trace**2 / square, np.nan)
    return interval(rank[0], rank[1:], (1, len(k)))


def top_share(k: Tensor, units: Units) -> Estimate:
    """λ₁ / Σ λ: the share of the kernel that a single direction in parameter space has. A sketch's is too large."""
    left_out = [k[keep][:, keep] for keep in (torch.from_numpy(each == 0) for each in units.member.T)]
    values = [float(spectrum(x, 1)[0] / x.diagonal().sum()) if len(x) else float("nan") for x in (k, *left_out)]
    return interval(values[0], values[1:], (0, 1))


def spectrum(k: Tensor, num: int = LARGEST) -> np.ndarray:
    """The largest eigenvalues, descending."""
    if len(k) <= max(4 * num, 64):
        return torch.linalg.eigvalsh(k).flip(0)[:num].clamp(min=0).numpy()
    from scipy.sparse.linalg import eigsh

    start = np.ones(len(k)) / len(k) ** 0.5
    return np.sort(eigsh(k.numpy(), k=num, v0=start, return_eigenvectors=False))[::-1].clip(min=0)
