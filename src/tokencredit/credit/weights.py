"""Transforms that multiply credit token by token: weights from a score, top fractions, bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokencredit.credit.transform import Transform, one_of
from tokencredit.masked import over, pool_deviation, pool_mean, pool_min_max, pool_std, row_mean, row_min_max
from tokencredit.rollouts import Rollouts


@dataclass(frozen=True)
class Score(Transform):
    """A score is the credit.

        cᵢₜ ← xᵢₜ

    With x = Q − V, the change of the success probability that the token brought, this is the exact policy gradient's
    advantage: the ceiling against which every proxy is compared.
    """

    score: str
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "idempotent"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return rollouts.score(self.score).to(credit.dtype)


@dataclass(frozen=True)
class Weight(Transform):
    """More credit where a score is high.

        cᵢₜ ← cᵢₜ · (1 + α xᵢₜ / x̄ᵢ)          x̄ᵢ: mean over the rollout

    α = 0 is the identity; α < 0 gives less where the score is high, and may turn signs. Assumes x ≥ 0; a rollout with
    x̄ = 0 is left unchanged.

    >>> Weight("entropy", 0.5)(credit, rollouts)[0]  # credit 1, entropies 1 and 3
    tensor([1.2500, 1.7500])
    """

    score: str
    alpha: float = 1.0
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign"})

    def __post_init__(self) -> None:
        if self.alpha < 0:
            object.__setattr__(self, "laws", self.laws - {"keeps_sign"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        x = rollouts.score(self.score).to(credit.dtype)
        mean = row_mean(x, rollouts.mask)[:, None].expand_as(x)
        return credit * (1 + self.alpha * over(x, mean))


@dataclass(frozen=True)
class ProxyWeight(Transform):
    """Proxy-weighted credit: a rollout's credit is spread by a proxy of token importance.

        cᵢₜ ← cᵢₜ · wᵢₜ        raw       wᵢₜ = xᵢₜ
                               min_max   wᵢₜ = (xᵢₜ − minᵢ x) / (maxᵢ x − minᵢ x)
                               mean_one  wᵢₜ = xᵢₜ / x̄ᵢ                    keeps the rollout's total
                               rank      wᵢₜ = (2 rankᵢₜ − 1) / |oᵢ|
                                                                     ranks 1 … |oᵢ|, ties share theirs; keeps the total

    A rollout whose scores are all equal has w = 1, but for raw: nothing to tell its tokens apart. raw takes the score
    in its own units, so its scale is part of the learning rate, and rollouts with a high mean score weigh more than
    others. min_max changes the size of the step as well as its direction (its mean weight is below 1); mean_one and
    rank do not. raw and mean_one assume x ≥ 0; raw with x = 1 is the identity. scope="group" takes minimum, maximum and
    mean over the tokens of the whole group: equal scores then have equal weights in all its rollouts, and it is the
    group's total that mean_one keeps, of credit that is equal at every token.
    """

    score: str
    normalise: str = "min_max"
    scope: str = "row"
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign"})

    def __post_init__(self) -> None:
        one_of(self, normalise=("raw", "min_max", "mean_one", "rank"), scope=("row", "group"))
        if self.scope == "group":
            if self.normalise == "rank":
                raise ValueError('ProxyWeight ranks within rollouts only: scope="group" needs another normalise')
            object.__setattr__(self, "laws", frozenset({"group_local", "keeps_sign"}))
        elif self.normalise in ("mean_one", "rank"):
            object.__setattr__(self, "laws", self.laws | {"keeps_total"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        x, mask = rollouts.score(self.score).to(credit.dtype), rollouts.mask
        if self.normalise == "raw":
            return credit * x
        if self.normalise == "rank":
            return credit * _rank_weight(x, mask)
        if self.normalise == "mean_one":
            return credit * over(x, self._mean(x, rollouts).expand_as(x), empty=1.0)
        if self.scope == "group":
            low, high = pool_min_max(x, mask, rollouts.group_index)
        else:
            low, high = (end[:, None] for end in row_min_max(x, mask))
        return credit * over(x - low, (high - low).expand_as(x), empty=1.0)

    def _mean(self, x: Tensor, rollouts: Rollouts) -> Tensor:
        """[B, 1]: x̄ of each rollout, or of its group."""
        if self.scope == "group":
            return pool_mean(x, rollouts.mask, rollouts.group_index)
        return row_mean(x, rollouts.mask)[:, None]


@dataclass(frozen=True)
class Below(Transform):
    """Only the tokens whose score lies under a threshold keep their credit.

        cᵢₜ ← cᵢₜ · 1[xᵢₜ < τ]        τ = ∞ is the identity

    Source: SPO (arXiv:2505.23564), released probability mask, with x = log π and τ = log 0.9.
    """

    score: str
    threshold: float = 0.0
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign", "idempotent"})

    def select(self, rollouts: Rollouts) -> Tensor:
        """[B, T] bool: the tokens that keep their credit."""
        return rollouts.mask & (rollouts.score(self.score) < self.threshold)

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return torch.where(self.select(rollouts), credit, 0)


@dataclass(frozen=True)
class GroupWeight(Transform):
    """More credit where a score is high among all tokens of the group.

        cᵢₜ ← cᵢₜ · (1 + (α − 1) (xᵢₜ − min_g x) / (max_g x − min_g x))          α: `high`

    α = 1 is the identity, and a group whose scores are all equal has weights of 1. Source: TW-GRPO (arXiv:2505.24718)
    as in its released code, with a score that all living rollouts of a group share at a position. Differs: the code
    takes minimum and maximum over the padding too, and lets a gradient through the weights.
    """

    score: str
    high: float = 1.7
    laws: ClassVar[frozenset[str]] = frozenset({"group_local", "keeps_sign"})

    def __post_init__(self) -> None:
        if not self.high >= 1:
            raise ValueError(f"GroupWeight.high must be at least 1, the weight of the lowest score; got {self.high}")

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        x = rollouts.score(self.score).to(credit.dtype)
        low, high = pool_min_max(x, rollouts.mask, rollouts.group_index)
        return credit * (1 + (self.high - 1) * over(x - low, (high - low).expand_as(x)))


@dataclass(frozen=True)
class LengthMean(Transform):
    """A rollout's credit is shared among its tokens that carry any.

        cᵢₜ ← cᵢₜ / #{s : cᵢₛ ≠ 0}

    Then a sum over tokens is a mean over those that count: SimPO's length normalisation, and SePO's over its selection.
    """

    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        num = (credit != 0).sum(1, keepdim=True).to(credit.dtype)
        return over(credit, num.expand_as(credit))


@dataclass(frozen=True)
class BoundCredit(Transform):
    """No token counts for more than k standard deviations.

        cᵢₜ ← clip(cᵢₜ, −k σ, k σ)          σ: std of c over all tokens of the batch

    k = ∞ is the identity; where the credit does not vary nothing is clipped. Done twice it clips again: clipping lowers
    σ. Source: the last step of OSPO (arXiv:2601.08403) as in its released code, with k = 2.
    """

    k: float = 2.0
    ddof: int = 1
    laws: ClassVar[frozenset[str]] = frozenset({"keeps_sign"})

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"BoundCredit.k must be positive: 0 would leave no credit; got {self.k}")

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        index = rollouts.index("batch")
        spread = pool_std(pool_deviation(credit, rollouts.mask, index), rollouts.mask, index, self.ddof)
        bound = torch.where(spread > 0, self.k * spread, torch.inf)
        return torch.minimum(torch.maximum(credit, -bound), bound)


def _rank_weight(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: (2 rank − 1) / |o|, average ranks for ties; mean 1 over every non-empty row."""
    shown = x.masked_fill(~mask, torch.inf).sort(1).values
    below = torch.searchsorted(shown, x.contiguous())
    upto = torch.minimum(torch.searchsorted(shown, x.contiguous(), right=True), mask.sum(1, keepdim=True))
    return over((below + upto).to(x.dtype), mask.sum(1, keepdim=True).to(x.dtype).expand_as(x))


@dataclass(frozen=True)
class TopFraction(Transform):
    """Only the tokens whose score is among the highest keep their credit.

        cᵢₜ ← cᵢₜ · 1[xᵢₜ ≥ τ]        τ: the ⌈ρ N⌉-th largest of the N scores of the scope ("batch", "group" or "row")

    Ties at τ are all kept; ρ = 1 is the identity. by_outcome=True takes the *lowest* scores of failures, −x for x: what
    speaks most for the outcome on either side. Source: beyond the 80/20 rule (arXiv:2506.01939) eq. 5, whose τ runs
    over the micro-batch; here it runs over the whole rollout batch.
    """

    score: str
    fraction: float = 0.2
    scope: str = "batch"
    by_outcome: bool = False
    laws: ClassVar[frozenset[str]] = frozenset({"keeps_sign", "idempotent"})

    def __post_init__(self) -> None:
        one_of(self, scope=("batch", "group", "row"))
        if not 0 < self.fraction <= 1:
            raise ValueError(f"TopFraction.fraction must be in (0, 1], got {self.fraction}")
        local = {"batch": set(), "group": {"group_local"}, "row": {"group_local", "row_local"}}[self.scope]
        object.__setattr__(self, "laws", frozenset({"keeps_sign", "idempotent"} | local))

    def select(self, rollouts: Rollouts) -> Tensor:
        """[B, T] bool: the tokens that keep their credit."""
        x = rollouts.score(self.score)
        x = torch.where(rollouts.success[:, None], x, -x) if self.by_outcome else x
        index = torch.arange(len(rollouts), device=x.device) if self.scope == "row" else rollouts.index(self.scope)
        threshold = x.new_full((len(rollouts), 1), -torch.inf)
        for population in torch.unique(index):
            rows = index == population
            values = x[rows][rollouts.mask[rows]]
            if values.numel():
                keep = math.ceil(self.fraction * values.numel() * (1 - 1e-12))
                threshold[rows] = values.kthvalue(values.numel() - max(keep, 1) + 1).values
        return rollouts.mask & (x >= threshold)

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return torch.where(self.select(rollouts), credit, 0)


@dataclass(frozen=True)
class Above(Transform):
    """Only the tokens whose score exceeds a threshold keep their credit: with a score of 0 and 1, the tokens that it
    marks.

    cᵢₜ ← cᵢₜ · 1[xᵢₜ > τ]        τ = −∞ is the identity
    """

    score: str
    threshold: float = 0.0
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign", "idempotent"})

    def select(self, rollouts: Rollouts) -> Tensor:
        """[B, T] bool: the tokens that keep their credit."""
        return rollouts.mask & (rollouts.score(self.score) > self.threshold)

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return torch.where(self.select(rollouts), credit, 0)
