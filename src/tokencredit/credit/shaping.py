"""Shaped rewards: entropy decides how the outcome is spread over tokens or rollouts; length penalties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokencredit.credit.transform import Transform, one_of
from tokencredit.masked import column_mean, over, pool, pool_mean, row_mean, zero_off
from tokencredit.rollouts import Rollouts


@dataclass(frozen=True)
class EntropyReward(Transform):
    """Reward uncertainty when right, punish confidence when wrong.

        success   cᵢₜ ←  α₁ rᵢ + α₂ Hᵢₜ / H̄⁺        H̄⁺: mean of H over the successes compared with
        failure   cⱼₜ ← −α₁ − α₂ Hⱼₜ⁻¹ / H̄⁻         H̄⁻: mean of 1/H over the failures compared with

    level    "token", or "sequence": Ĥᵢ, the mean entropy of the rollout, takes the place of Hᵢₜ (GRPO-S eqs. 8-9)
    compare  whom a token is compared with: "column", the same position of the other rollouts of its polarity (the
             paper's; then at every position the shaped rewards of d_t living successes of reward 1 sum to (α₁+α₂) d_t);
             "row", the positions of its own rollout; "matrix", all tokens of its polarity. The paper names the last two
             as open questions
    mean     "arithmetic", or "geometric" (appendix C)
    scope    "group" (the printed equations) or "batch" (what the paper says of its own implementation)
    failures False: failures get 0 (the version of August 2025)
    floor    1/H and log H see max(H, floor): a documented epsilon of remark 2.1, without effect where H ≥ floor
    entropy_clip, reward_clip   optional (low, high) bounds on H and on the successes' shaped reward. The paper's
             "entropy is clipped at 0.2 and 0.28" are most likely DAPO's ratio bounds; literally taken they would leave
             almost no spread

    Where all compared entropies are 0 every ratio is 1. Entropy is the old policy's, without gradient.
    Source: GTPO and GRPO-S (arXiv:2508.04349v6) eqs. 3, 5, 8, 9; appendix C.

    >>> EntropyReward(alpha=(1, 0.1))(credit, rollouts)[rollouts.success]  # H = [[1, 3], [3, 1]]
    tensor([[1.0500, 1.1500],
            [1.1500, 1.0500]])
    """

    alpha: tuple[float, float] = (1.0, 0.1)
    level: str = "token"
    compare: str = "column"
    mean: str = "arithmetic"
    scope: str = "group"
    failures: bool = True
    floor: float = 0.01
    entropy_clip: tuple[float, float] | None = None
    reward_clip: tuple[float, float] | None = None
    score: str = "entropy"
    laws: ClassVar[frozenset[str]] = frozenset({"group_local", "idempotent"})

    def __post_init__(self) -> None:
        one_of(
            self,
            level=("token", "sequence"),
            compare=("column", "row", "matrix"),
            mean=("arithmetic", "geometric"),
            scope=("group", "batch"),
        )
        if not self.floor > 0:
            raise ValueError(f"EntropyReward.floor must be positive: it bounds 1/H; got {self.floor}")
        if self.scope == "batch":
            object.__setattr__(self, "laws", frozenset({"idempotent"}))

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        entropy = rollouts.score(self.score).to(credit.dtype)
        if self.entropy_clip:
            entropy = entropy.clamp(*self.entropy_clip)
        won, base = rollouts.success[:, None], rollouts.reward[:, None].to(credit.dtype)
        # Groups without both outcomes carry no signal; in a batch's means they would only add their entropies.
        counted = rollouts.mask & rollouts.comparable[:, None] if self.scope == "batch" else rollouts.mask
        up = self.alpha[0] * base + self.alpha[1] * self._ratio(entropy, counted & won, rollouts)
        if self.reward_clip:
            up = up.clamp(*self.reward_clip)
        down = -self.alpha[0] - self.alpha[1] * self._ratio(entropy, counted & ~won, rollouts, inverse=True)
        return torch.where(won, up, down if self.failures else torch.zeros_like(down))

    def _ratio(self, entropy: Tensor, side: Tensor, rollouts: Rollouts, inverse: bool = False) -> Tensor:
        """H (or 1/H) over its mean among the compared tokens of `side`, 1 elsewhere: [B, T], or [B, 1] for whole
        rollouts.
        """
        geometric = self.mean == "geometric"
        to, back = (torch.log, torch.exp) if geometric else (_same, _same)
        x = entropy.clamp(min=self.floor) if geometric else entropy
        if self.level == "sequence":
            x, side = back(row_mean(to(x), rollouts.mask))[:, None], side.any(1, keepdim=True)
        x = 1 / x.clamp(min=self.floor) if inverse else x
        if self.level == "sequence" or self.compare == "matrix":
            centre = pool_mean(to(x), side, rollouts.index(self.scope))
        elif self.compare == "column":
            centre = column_mean(to(x), side, rollouts.index(self.scope))
        else:
            centre = row_mean(to(x), side)[:, None]
        return torch.where(side, over(x, back(centre).expand_as(x), empty=1.0), 1)


@dataclass(frozen=True)
class Overlong(Transform):
    """DAPO's soft overlong punishment, added to the reward.

        cᵢₜ ← cᵢₜ + 0                                   |oᵢ| ≤ L − cache
                    λ (L − cache − |oᵢ|) / cache          up to L
                    −λ                                    beyond L

    `max_length` L None: the completion budget of the engine (`Method.within`); without one, nothing is overlong.
    `cache` None: L / 5, the paper's share (4096 of 20480). `penalty` λ is in units of the reward. The paper's outcome
    is −1 or 1 and its λ is 1, half of what right is apart from wrong: where rewards are 0 and 1 that is λ = 0.5, the
    default; penalty=1 is right for rewards of −1 and 1. λ = 0 is the identity. Outcomes (success or failure) are not
    changed. Source: DAPO (arXiv:2503.14476) eq. 13.

        Chain(Outcome(), Overlong(20), GroupCenter())

    Rewards 1, 0, 0, 1 of which the first comes at the limit are 0.5, 0, 0, 1 then, the paper's 0, −1, −1, 1 but for
    place and scale: 0.261, −0.783, −0.783, 1.306.
    """

    max_length: int | None = None
    cache: int | None = None
    penalty: float = 0.5
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local"})

    def __post_init__(self) -> None:
        if self.max_length is not None and not 0 < self._window(self.max_length) <= self.max_length:
            raise ValueError(
                f"Overlong needs 0 < cache <= max_length, got cache={self.cache}, max_length={self.max_length}"
            )
        if not self.penalty >= 0:
            raise ValueError(f"Overlong.penalty must not be negative: it is subtracted; got {self.penalty}")

    def _window(self, max_length: int) -> float:
        return max_length / 5 if self.cache is None else self.cache

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        if self.max_length is None:
            return credit
        cache = self._window(self.max_length)
        excess = rollouts.length.to(credit.dtype) - (self.max_length - cache)
        return credit - self.penalty * (excess / cache).clamp(0, 1)[:, None]


@dataclass(frozen=True)
class GroupRelativeOverlong(Transform):
    """Group-relative overlong punishment: long among its siblings, not against a fixed length.

        cᵢₜ ← cᵢₜ − ½ · clip((|oᵢ| − L̂)/L̂, 0, 1)       L̂ = max{(min + max)/2, mean} of the reference lengths

    Easy group (pass rate ≥ `easy`): reference and target are its successes. Hard group (≤ 1 − easy): nothing. Between:
    the reference is the whole group, and the successes are punished where they are the majority. The text that could be
    read stops there; `punish_failures=True` punishes the failures of the other medium groups, as a third party does: a
    reconstruction. `easy` is not given in the text; 0.75 is the third party's. Source: GTPO (arXiv:2508.04349v6)
    appendix D.
    """

    easy: float = 0.75
    punish_failures: bool = False
    laws: ClassVar[frozenset[str]] = frozenset({"group_local"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        index, won, length = rollouts.group_index, rollouts.success, rollouts.length.to(credit.dtype)
        rate = over(pool(won.to(credit.dtype), index), pool(torch.ones_like(length), index))
        easy, hard = rate >= self.easy, rate <= 1 - self.easy
        reference = self._reference(length, won | ~easy, index)
        target = torch.where(easy | (rate > 0.5), won, ~won & self.punish_failures) & ~(hard & ~easy)
        penalty = 0.5 * over(length - reference, reference).clamp(0, 1)
        return credit - zero_off(penalty, target)[:, None]

    @staticmethod
    def _reference(length: Tensor, counts: Tensor, index: Tensor) -> Tensor:
        """[B]: max of the mid-range and the mean of the lengths that count, per group."""
        slots = length.new_zeros(len(length))
        low = slots.scatter_reduce(0, index[counts], length[counts], "amin", include_self=False)[index]
        high = slots.scatter_reduce(0, index[counts], length[counts], "amax", include_self=False)[index]
        mean = pool_mean(length[:, None], counts[:, None], index)[:, 0]
        return torch.maximum((low + high) / 2, mean)


def _same(x: Tensor) -> Tensor:
    return x
