"""Sums along a rollout: rewards per token as what is still to come, or what has come so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokencredit.credit.transform import Transform, one_of
from tokencredit.masked import over, pool_deviation, pool_std
from tokencredit.rollouts import TOKEN_REWARD, Rollouts


@dataclass(frozen=True)
class ToGo(Transform):
    """A score as a reward per token, added to the credit as a return.

        cᵢₜ ← cᵢₜ + Σ_{k≥t} γ^{k−t} clip(s xᵢₖ, −b, b)          s: `scale`, b: `clip`, None bounds nothing

    After Outcome() the reward at a rollout's end is there already: its return is the same at every token. past=True
    sums what came so far instead, Σ_{k≤t} γ^{t−k}. γ counts tokens, not positions. s = 0 is the identity. The bound
    comes after the scale, as in RTO's code. Where x is a difference of potentials, as log π_dpo/π_ref is, its return
    telescopes: an exact baseline removes it, and only bound and scale act. Source: returns (Sutton and Barto 2018, eq.
    3.8); RTO (arXiv:2404.18922), released code.

        ToGo("x", 0.05, clip=0.05)(credit, rollouts)     # credit 2, x 0.1, 0.5, 9 -> 2.08, 2.075, 2.05
    """

    score: str
    scale: float = 1.0
    clip: float | None = None
    gamma: float = 1.0
    past: bool = False
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local"})

    def __post_init__(self) -> None:
        _check_gamma(self)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"ToGo.clip must be positive or None, got {self.clip}")

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        reward = self.scale * rollouts.score(self.score).to(credit.dtype)
        if self.clip is not None:
            reward = reward.clamp(-self.clip, self.clip)
        return credit + _discounted(reward, rollouts.mask, self.gamma, self.past)


@dataclass(frozen=True)
class TokenReward(Transform):
    """Rewards of tokens or turns, against those of the group, as returns beside the credit.

        cᵢₜ ← cᵢₜ + s Σ_{k≥t} γ^{k−t} (rᵢₖ − mean_g r) / (std_g r + eps)          s: `scale`

    Sums, mean and std are over the rewards that were given: a token without one is no token with a reward of 0. A
    turn's reward stands at its last token, so it meets that turn and those before it. γ counts tokens;
    normalise="center" does not divide. s = 0 is the identity; a group with fewer than two rewards, or with equal ones,
    adds nothing. Rewards that count as they stand are `ToGo("token_reward")`. Source: GRPO with process supervision
    (arXiv:2402.03300) sec. 4.1.3, where there is no other credit and γ = 1; MT-GRPO (arXiv:2505.11821) adds the
    outcome's.

        TokenReward(normalise="center")(credit, rollouts)     # credit 1, r = (1, none, 0) and (0, none, none):
                                                              # 4/3, 2/3, 2/3 and 2/3, 1, 1
    """

    score: str = TOKEN_REWARD
    scale: float = 1.0
    normalise: str = "std"
    gamma: float = 1.0
    eps: float = 1e-6
    ddof: int = 1
    laws: ClassVar[frozenset[str]] = frozenset({"group_local"})

    def __post_init__(self) -> None:
        _check_gamma(self)
        one_of(self, normalise=("std", "center"))

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        given, index = rollouts.given(self.score), rollouts.group_index
        reward = pool_deviation(rollouts.score(self.score).to(credit.dtype), given, index)
        if self.normalise == "std":
            reward = over(reward, pool_std(reward, given, index, self.ddof) + self.eps)
        return credit + self.scale * _discounted(reward, rollouts.mask, self.gamma)


@dataclass(frozen=True)
class Returns(Transform):
    """Credit that is a reward per token becomes a return.

        cᵢₜ ← Σ_{k≥t} γ^{k−t} cᵢₖ

    γ counts tokens, not positions; γ = 0 is the identity. Source: Sutton and Barto 2018, eq. 3.8.

        Returns()(credit, rollouts)     # 1, 2, 3 -> 6, 5, 3
    """

    gamma: float = 1.0
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local"})

    def __post_init__(self) -> None:
        _check_gamma(self)

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return _discounted(credit, rollouts.mask, self.gamma)


@dataclass(frozen=True)
class Redistribute(Transform):
    """A part of a rollout's reward is paid out along the way, in shares of a score; credit is what is still to come.

        cᵢₜ ← cᵢₜ · (1 − β + β Σ_{k≥t} xᵢₖ / Σₖ xᵢₖ)          β: `share`

    β = 0 is the identity: all is paid at the end. Assumes x ≥ 0; a rollout whose scores are all 0 is left unchanged.
    Source: attention-based credit (ABC, arXiv:2402.00782), released code: there x is the attention of a reward model,
    in its variant ABC-D that of the policy.

        Redistribute("x", 0.8)(credit, rollouts)     # credit 2, x 0.1, 0.3, 0.6 -> 2, 1.84, 1.36
    """

    score: str
    share: float = 0.8
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign"})

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"Redistribute.share must be in [0, 1], got {self.share}")

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        left = _discounted(rollouts.score(self.score).to(credit.dtype), rollouts.mask, 1.0)
        whole = left.amax(1, keepdim=True) if left.shape[1] else left
        return credit * (1 - self.share + self.share * over(left, whole.expand_as(left), empty=1.0))


def _discounted(x: Tensor, mask: Tensor, gamma: float, past: bool = False) -> Tensor:
    """[B, T]: Σ_{k≥t} γ^{k−t} xᵢₖ over the tokens of a rollout (k ≤ t if `past`), counted without the gaps of the
    mask.
    """
    x, mask = (x, mask) if past else (x.flip(1), mask.flip(1))
    x = torch.where(mask, x, 0)
    if gamma == 1:
        sums = x.cumsum(1)
    else:
        total, columns = x.new_zeros(len(x)), []
        for t in range(x.shape[1]):
            total = torch.where(mask[:, t], gamma * total + x[:, t], total)
            columns.append(total)
        sums = torch.stack(columns, 1) if columns else x
    return sums if past else sums.flip(1)


def _check_gamma(part: Any) -> None:
    if not 0 <= part.gamma <= 1:
        raise ValueError(f"{type(part).__name__}.gamma must be in [0, 1], got {part.gamma}")
