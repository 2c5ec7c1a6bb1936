"""Aggregates: how much each token's loss counts. L = Σᵢₜ ωᵢₜ ℓᵢₜ, with ω computed over the whole rollout batch.

Because ω is fixed before the batch is split, the losses of micro-batches add up to the loss of the batch, and dropping
rows that have neither credit nor selected tokens changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokencredit.credit.transform import needs
from tokencredit.credit.weights import Above, Below, TopFraction
from tokencredit.masked import over
from tokencredit.rollouts import Rollouts


@dataclass(frozen=True)
class Aggregate:
    """rollouts -> ω [B, T], 0 off the mask. Subclass it as a frozen dataclass and write `weights`."""

    def weights(self, rollouts: Rollouts) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define weights(self, rollouts)")

    @property
    def needs(self) -> frozenset[str]:
        return needs(self)


@dataclass(frozen=True)
class TokenMean(Aggregate):
    """ω = 1 / Σₖ |oₖ|: every token counts the same (DAPO, arXiv:2503.14476 eq. 8)."""

    def weights(self, rollouts: Rollouts) -> Tensor:
        mask = rollouts.mask.to(rollouts.reward.dtype)
        return mask / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class SequenceMean(Aggregate):
    """ω = 1 / (B |oᵢ|): every rollout counts the same (GRPO, arXiv:2402.03300 eq. 3)."""

    def weights(self, rollouts: Rollouts) -> Tensor:
        mask = rollouts.mask.to(rollouts.reward.dtype)
        return over(mask, mask.sum(1, keepdim=True).expand_as(mask)) / max(len(rollouts), 1)


@dataclass(frozen=True)
class SequenceSum(Aggregate):
    """ω = 1 / (B L): a rollout's tokens add up; L is constant, so length carries no bias (Dr. GRPO, arXiv:2503.20783
    eq. 5).

    `max_length` L = 1 is the plain sum over a rollout's tokens (REINFORCE). None: the completion budget of the engine
    (`Method.within`); without one, the longest completion of the batch.
    """

    max_length: int | None = None

    def weights(self, rollouts: Rollouts) -> Tensor:
        mask = rollouts.mask.to(rollouts.reward.dtype)
        length = max(rollouts.length.tolist(), default=0) if self.max_length is None else self.max_length
        return mask / max(len(rollouts) * length, 1)


@dataclass(frozen=True)
class SelectedMean(Aggregate):
    """ω = 1 / (number of selected tokens) on the selected tokens (beyond the 80/20 rule, arXiv:2506.01939 eq. 5).

    TRL and ms-swift mask the loss but divide by all tokens, which makes the step about ρ times smaller than the
    paper's.
    """

    selection: TopFraction | Above | Below

    def weights(self, rollouts: Rollouts) -> Tensor:
        chosen = self.selection.select(rollouts).to(rollouts.reward.dtype)
        return chosen / chosen.sum().clamp(min=1)
