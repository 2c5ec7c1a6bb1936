"""Transforms that set a rollout's total: the outcome, and the outcome against a baseline.

They read each rollout's value Rᵢ, the mean of its incoming credit over its tokens, or its reward where it has no token;
the baseline per token reads the credit of each token.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokencredit.credit.transform import Transform, one_of
from tokencredit.masked import (
    column_deviation,
    column_mean,
    over,
    pool,
    pool_deviation,
    pool_mean,
    pool_standardise,
    pool_std,
    row_mean,
    zero_off,
)
from tokencredit.rollouts import Rollouts


@dataclass(frozen=True)
class Outcome(Transform):
    """The verifier's number, at every token.

    cᵢₜ ← rᵢ
    """

    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "idempotent"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return rollouts.reward[:, None].expand_as(rollouts.mask)


@dataclass(frozen=True)
class GroupCenter(Transform):
    """A rollout against its siblings.

        cᵢₜ ← (Rᵢ − mean_g R) / (σ + eps)        σ = std of R over the group, over the batch, or (scale="none") no
                                                 division

    A group of equal rewards, or of one rollout, gets 0. `ddof=1` and an eps inside the division are what the public
    engines do (verl eps 1e-6, TRL 1e-4); the paper prints neither. Source: GRPO (arXiv:2402.03300) sec. 4.1.2;
    scale="none": Dr. GRPO (arXiv:2503.20783) eq. 5.

    >>> GroupCenter(scale="none")(credit, rollouts)[:, 0]  # rewards 1, 0, 0, 1
    tensor([ 0.5000, -0.5000, -0.5000,  0.5000])
    """

    scale: str = "group"
    eps: float = 1e-6
    ddof: int = 1
    laws: ClassVar[frozenset[str]] = frozenset({"group_local"})

    def __post_init__(self) -> None:
        one_of(self, scale=("group", "batch", "none"))
        if self.scale == "batch":
            object.__setattr__(self, "laws", frozenset())

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        value = row_value(credit, rollouts)
        everyone = torch.ones_like(value, dtype=torch.bool)
        centred = pool_deviation(value, everyone, rollouts.group_index)
        if self.scale != "none":
            index = rollouts.index(self.scale)
            spread = centred if self.scale == "group" else pool_deviation(value, everyone, index)
            centred = over(centred, pool_std(spread, everyone, index, self.ddof) + self.eps)
        return centred.expand_as(credit)


@dataclass(frozen=True)
class LeaveOneOut(Transform):
    """A rollout against the mean of its siblings, itself left out: an unbiased baseline.

        cᵢₜ ← Rᵢ − 1/(G−1) Σ_{j≠i} Rⱼ  =  G/(G−1) (Rᵢ − mean_g R)

    A group of one gets 0: it has no sibling to compare with. Source: RLOO (arXiv:2402.14740) eq. 8.
    """

    laws: ClassVar[frozenset[str]] = frozenset({"group_local"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        value = row_value(credit, rollouts)
        everyone = torch.ones_like(value, dtype=torch.bool)
        size = pool(torch.ones_like(value), rollouts.group_index)
        return (pool_deviation(value, everyone, rollouts.group_index) * over(size, size - 1)).expand_as(credit)


@dataclass(frozen=True)
class TokenLeaveOneOut(Transform):
    """A reward per token against the mean rewards of its siblings, itself left out.

        cᵢₜ ← G/(G−1) (cᵢₜ − mean_g R)          over the G rollouts of the group that have tokens

    The factor meets the token's own reward as well, as in the released code. A group of one gets 0. Source: PRIME
    (arXiv:2502.01456), released masked_rloo.

        TokenLeaveOneOut()(credit, rollouts)     # rewards 3, 1 and 0 -> 4, 0 and −2: the means are 2 and 0
    """

    laws: ClassVar[frozenset[str]] = frozenset({"group_local"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        mask, index = rollouts.mask, rollouts.group_index
        alive = mask.any(1, keepdim=True)
        size = pool(alive.to(credit.dtype), index)
        # Baselines move with the rewards: taken of deviations, equal rewards give exactly 0.
        deviation = pool_deviation(credit, mask, index)
        against = deviation - pool_mean(row_mean(deviation, mask)[:, None], alive, index)
        return against * over(size, size - 1)


@dataclass(frozen=True)
class ColumnCenter(Transform):
    """Each token against the rollouts of its group that are alive at the same position, itself among them.

        cᵢₜ ← cᵢₜ − mean of cₖₜ over the rollouts k of the group that are alive at t

    What a critic is replaced by where credit differs from token to token. Where no sibling is alive, and in a group of
    one, nothing stays. `OptimalTokenBaseline` weighs the rollouts. Source: SPRO's masked step advantage
    (arXiv:2507.01551), of which no equation could be read.

        ColumnCenter()(credit, rollouts)     # [0.5, 0.25, 0.1] and [0, 0.25] -> [0.25, 0, 0] and [-0.25, 0]
    """

    laws: ClassVar[frozenset[str]] = frozenset({"group_local", "idempotent"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return column_deviation(credit, rollouts.mask, rollouts.group_index)


@dataclass(frozen=True)
class OptimalTokenBaseline(Transform):
    """Each token against the group's return at the same position, weighted by how much each rollout has moved the
    logits so far.

        cᵢₜ ← cᵢₜ − B_gt       B_gt = Σᵢ cᵢₜ Wᵢₜ / Σᵢ Wᵢₜ        over the rollouts i of the group that are alive at t
        Wᵢₜ = Σ_{j≤t} ‖sᵢⱼ‖²    ‖s‖² = ‖e_a − π‖² = 1 − 2 π(a) + Σᵥ π(v)²        the gradient of log π(a) in the logits

    The incoming credit is the return from t on: with an outcome reward the reward, Chain(Outcome(),
    OptimalTokenBaseline()). Reads the scores `logprob` and `sum_p2`. `alone` is about positions where no sibling is
    alive, the tail of the longest rollout and a group of one: "zero" has B = 0 there, as verl's code by default, so
    that the whole return stays; "own" has B = c, so that nothing does. Where all W are 0 the mean is plain. Source:
    optimal token baseline (arXiv:2602.07078) as in verl's code. Differs: no ε in the division, no weights for a
    mismatch of sampler and policy.

    Returns 1, 0 with W 1, 3 at a position have B = 1/4 and become 0.75, -0.25.
    """

    alone: str = "zero"
    laws: ClassVar[frozenset[str]] = frozenset({"group_local"})

    def __post_init__(self) -> None:
        one_of(self, alone=("zero", "own"))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logprob", "sum_p2"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        mask, index = rollouts.mask, rollouts.group_index
        logprob, sum_p2 = (rollouts.score(name).to(credit.dtype) for name in ("logprob", "sum_p2"))
        energy = zero_off(1 - 2 * logprob.exp() + sum_p2, mask).clamp(min=0).cumsum(1)
        # Baselines move with the returns: taken of deviations, equal returns give exactly 0.
        deviation = pool_deviation(credit, mask, index)
        against = deviation - column_mean(deviation, mask, index, energy)
        siblings = pool(mask.long(), index) - 1
        return torch.where(siblings > 0, against, credit if self.alone == "zero" else torch.zeros_like(credit))


@dataclass(frozen=True)
class BatchWhiten(Transform):
    """Standardise over all tokens of the batch, so that longer rollouts weigh more in the mean and the spread.

        cᵢₜ ← (cᵢₜ − mean c) / (std c + eps)

    Source: REINFORCE++ (arXiv:2501.03262) sec. 3, as in verl's masked whitening.
    """

    eps: float = 1e-8
    ddof: int = 1

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return pool_standardise(credit, rollouts.mask, rollouts.index("batch"), self.eps, self.ddof)


@dataclass(frozen=True)
class PolarityCenter(Transform):
    """Standardise shaped rewards of successes (+) and failures (−) separately, each over *all* tokens of the scope.

        cᵢₜ ← (c±ᵢₜ − mean C±) / (std C± + eps)
                                                  C⁺ = {c of successes} ∪ {0 for every token of a failure}, C⁻ likewise

    population  "all": the other polarity's zeros belong to the population (default: GTPO eq. 6 with the definitions of
                eqs. 3 and 5; its appendix B.4 does the same); "within_polarity": they do not. Then each polarity has
                mean zero and more than half of the tokens of correct answers can come out negative: the outcome is
                erased. It exists for comparison and warns. "joint": one population of both polarities (the version of
                August 2025).
    level       "token", or "sequence" for GRPO-S: mean and std over the G rollouts (below its eq. 9); those that have
                tokens
    scope       "group" (the printed equations) or "batch" (what sec. 4 says of the authors' own implementation)

    A group in which no success or no failure has tokens gets 0 and takes no part in a batch's statistics, as if dynamic
    sampling had dropped it: all that its spread holds is entropy. Source: GTPO (arXiv:2508.04349v6) eq. 6. Differs: the
    paper's std states no ddof.
    """

    scope: str = "group"
    population: str = "all"
    level: str = "token"
    eps: float = 1e-6
    ddof: int = 1
    laws: ClassVar[frozenset[str]] = frozenset({"group_local"})

    def __post_init__(self) -> None:
        one_of(
            self, scope=("group", "batch"), population=("all", "within_polarity", "joint"), level=("token", "sequence")
        )
        if self.scope == "batch":
            object.__setattr__(self, "laws", frozenset())
        if self.population == "within_polarity":
            warnings.warn(
                'population="within_polarity" gives each polarity mean zero: the outcome signal is erased and many'
                ' tokens of correct answers get negative credit. The paper\'s definitions mean population="all"',
                stacklevel=3,
            )

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        index, comparable = rollouts.index(self.scope), rollouts.comparable[:, None]
        mask = rollouts.mask
        if self.level == "sequence":
            credit, mask = row_value(credit, rollouts), mask.any(1, keepdim=True)
        won = rollouts.success[:, None].expand_as(mask)
        return self._standardise(credit, mask & comparable, won, index).expand_as(rollouts.mask)

    def _standardise(self, credit: Tensor, mask: Tensor, won: Tensor, index: Tensor) -> Tensor:
        if self.population == "joint":
            return pool_standardise(credit, mask, index, self.eps, self.ddof)
        sides = []
        for side in (won, ~won):
            shaped = zero_off(credit, side)
            population = mask & side if self.population == "within_polarity" else mask
            sides.append(pool_standardise(shaped, population, index, self.eps, self.ddof))
        return torch.where(won, sides[0], sides[1])


def row_value(credit: Tensor, rollouts: Rollouts) -> Tensor:
    """[B, 1]: Rᵢ, the mean credit of a rollout's tokens; its reward where it has no token."""
    value = torch.where(rollouts.length > 0, row_mean(credit, rollouts.mask), rollouts.reward.to(credit.dtype))
    return value[:, None]
