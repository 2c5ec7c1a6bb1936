"""Transforms that multiply or add to credit token by token: weights from a score, top fractions, entropy bonuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokencredit.credit.transform import Transform, one_of
from tokencredit.masked import over, row_mean, row_min_max
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

        cᵢₜ ← cᵢₜ · wᵢₜ        min_max   wᵢₜ = (xᵢₜ − minᵢ x) / (maxᵢ x − minᵢ x)
                               mean_one  wᵢₜ = xᵢₜ / x̄ᵢ                    keeps the rollout's total
                               rank      wᵢₜ = (2 rankᵢₜ − 1) / |oᵢ|
                                                                     ranks 1 … |oᵢ|, ties share theirs; keeps the total

    A rollout whose scores are all equal has w = 1: nothing to tell its tokens apart. min_max changes the size of the
    step as well as its direction (its mean weight is below 1); mean_one and rank do not. mean_one assumes x ≥ 0.
    """

    score: str
    normalise: str = "min_max"
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign"})

    def __post_init__(self) -> None:
        one_of(self, normalise=("min_max", "mean_one", "rank"))
        if self.normalise != "min_max":
            object.__setattr__(self, "laws", self.laws | {"keeps_total"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        x, mask = rollouts.score(self.score).to(credit.dtype), rollouts.mask
        if self.normalise == "rank":
            return credit * _rank_weight(x, mask)
        if self.normalise == "mean_one":
            return credit * over(x, row_mean(x, mask)[:, None].expand_as(x), empty=1.0)
        low, high = row_min_max(x, mask)
        return credit * over(x - low[:, None], (high - low)[:, None].expand_as(x), empty=1.0)


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

    Ties at τ are all kept; ρ = 1 is the identity. Source: beyond the 80/20 rule (arXiv:2506.01939) eq. 5, whose τ runs
    over the micro-batch; here it runs over the whole rollout batch.
    """

    score: str
    fraction: float = 0.2
    scope: str = "batch"
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


@dataclass(frozen=True)
class EntropyBonus(Transform):
    """A bonus for uncertainty, added to the credit and never larger than a part of it.

        cᵢₜ ← cᵢₜ + min(α Hᵢₜ, |cᵢₜ| / κ)

    Added for negative credit too, where it softens the penalty; κ > 1 keeps the sign. α = 0.4 with group-relative
    credit, 0.1 with PPO; κ = 2. A token without credit gets none. Source: reasoning with exploration (arXiv:2506.14758)
    eq. 5. Differs: H is the old policy's, the same at the first update.
    """

    alpha: float = 0.4
    kappa: float = 2.0
    score: str = "entropy"
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign"})

    def __post_init__(self) -> None:
        if not self.kappa > 1:
            raise ValueError(f"EntropyBonus.kappa must exceed 1 to keep the sign of the credit, got {self.kappa}")
        if not self.alpha >= 0:
            raise ValueError(
                f"EntropyBonus.alpha must not be negative: the bonus is bounded from above only; got {self.alpha}"
            )

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return credit + torch.minimum(
            self.alpha * rollouts.score(self.score).to(credit.dtype), credit.abs() / self.kappa
        )
