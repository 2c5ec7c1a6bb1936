"""Transforms that add to credit token by token: bonuses for uncertainty, penalties for confidence, and an entropy
bonus's own gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokencredit.credit.transform import Transform, needs, one_of
from tokencredit.masked import over, pool, pool_mean, zero_off
from tokencredit.rollouts import Rollouts


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


@dataclass(frozen=True)
class ConfidenceBonus(Transform):
    """Confident rollouts get less, by the probability of the tokens that they were least sure of.

        cᵢₜ ← cᵢₜ + α (c(q) − c(oᵢ))       c(o) = exp(mean of log π over the ⌈ρ |o|⌉ least likely tokens of o)

    prompt       c(q): "none" is 0; "group_mean" the mean of c(o) over the group; "prompt_confidence" the score of this
                 name, exp(mean log π) of the least likely tokens of the *prompt*, the same at every token. c(q) is one
                 number per group, a baseline: what acts is −α c(oᵢ), on failures as on successes
    all_correct  whether a group of successes alone gets it as well: second-hand texts contradict one another. There
                 nothing but confidence is left in the credit. A group without a success never does

    α = 0 is the identity, an empty rollout has c = 0. Source: ProGRPO (arXiv:2602.05281), whose mechanism is called
    ARM, in three digests that state neither α nor the gradient: a reconstruction.

        ConfidenceBonus(0.3, 0.5)(credit, rollouts)     # log π −0.1, −2, −0.1, −1 -> −0.3 · exp(−1.5) = −0.067
    """

    alpha: float = 0.3
    fraction: float = 0.2
    prompt: str = "none"
    all_correct: bool = False
    score: str = "logprob"
    laws: ClassVar[frozenset[str]] = frozenset({"group_local"})

    def __post_init__(self) -> None:
        one_of(self, prompt=("none", "group_mean", "prompt_confidence"))
        if not 0 < self.fraction <= 1:
            raise ValueError(f"ConfidenceBonus.fraction must be in (0, 1], got {self.fraction}")

    @property
    def needs(self) -> frozenset[str]:
        return needs(self) | ({"prompt_confidence"} if self.prompt == "prompt_confidence" else set())

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        index, confidence = rollouts.group_index, self.confidence(rollouts).to(credit.dtype)[:, None]
        if self.prompt == "prompt_confidence":
            prompt = rollouts.score(self.prompt).to(credit.dtype)
        else:
            alive = rollouts.mask.any(1, keepdim=True)
            prompt = (
                pool_mean(confidence, alive, index) if self.prompt == "group_mean" else torch.zeros_like(confidence)
            )
        takes = pool(rollouts.success.long(), index) > 0 if self.all_correct else rollouts.mixed
        return credit + torch.where(takes[:, None], self.alpha * (prompt - confidence), 0)

    def confidence(self, rollouts: Rollouts) -> Tensor:
        """[B]: c(oᵢ), 0 for an empty rollout."""
        mask, length = rollouts.mask, rollouts.length
        rising = rollouts.score(self.score).masked_fill(~mask, torch.inf).sort(1).values
        num = torch.ceil(self.fraction * length * (1 - 1e-12)).long().clamp(min=1)
        least = torch.arange(mask.shape[1], device=mask.device) < torch.minimum(num, length)[:, None]
        mean = over(zero_off(rising, least).sum(1), least.sum(1).to(rising.dtype))
        return torch.where(length > 0, mean.exp(), 0)


@dataclass(frozen=True)
class EntropyGradient(Transform):
    """An entropy bonus as credit: its gradient is that of α times the entropy, on average over what is sampled.

        cᵢₜ ← cᵢₜ + α λ_g (−log π(oᵢₜ) − Hᵢₜ)          E_π[(−log π − H) ∇log π] = ∇H, with the states held fixed

    So no gradient flows through an entropy, and the term has mean zero: what is likelier than average gets less, what
    is rarer more. The size of the bonus follows the aggregate: TokenMean is α times the mean entropy of the tokens.

    target      None: α is `coef`. A number of nats: α is `coef` where the mean token entropy of the batch is at most
                `target`, and 0 above; after every batch `after` raises `coef` by `delta` where it is, and lowers it by
                `delta` where it is not, within `bounds`. That is Skywork-OR1's controller; all its state is `coef`
    difficulty  None: λ = 1. ρ: λ_g = max(0, 1 − p_g / ρ), more for prompts that are hard. A *reconstruction*: only the
                abstract of AER (arXiv:2510.10959) could be read
    rate        p_g: "group" is the share of successes of the group itself; "past_pass_rate" the score of this name,
                what is known of the prompt from before. That does not depend on the rollouts at hand, so the term keeps
                its mean of zero; the group's own share goes with what was sampled

    α = 0 is the identity. Reads `logprob` besides `score`. Source: Williams and Peng 1991 for the bonus; Skywork-OR1
    (arXiv:2505.22312) for the controller, with the constants of TRL's code. Differs: theirs has the gradient of H
    itself and moves α at every optimizer step, this one once per rollout batch.

        EntropyGradient(0.1)(credit, rollouts)     # H = 1, log π = −3 -> +0.2; log π = −0.5 -> −0.05
    """

    coef: float = 0.001
    target: float | None = None
    delta: float = 0.005
    bounds: tuple[float, float] = (0.0, 1.0)
    difficulty: float | None = None
    rate: str = "group"
    score: str = "entropy"
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local"})

    def __post_init__(self) -> None:
        one_of(self, rate=("group", "past_pass_rate"))
        if self.difficulty is None and self.rate != "group":
            raise ValueError(f"EntropyGradient.rate is of difficulty, which is None: {self.rate!r} would be unread")
        if self.difficulty is not None and not self.difficulty > 0:
            raise ValueError(f"EntropyGradient.difficulty must be positive or None: it divides; got {self.difficulty}")
        if self.target is not None:
            object.__setattr__(self, "laws", frozenset())
        elif self.difficulty is not None and self.rate == "group":
            object.__setattr__(self, "laws", frozenset({"group_local"}))

    @property
    def needs(self) -> frozenset[str]:
        return needs(self) | {"logprob"} | ({self.rate} - {"group"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        if self._uncertain(rollouts):
            return credit
        entropy, logprob = (rollouts.score(name).to(credit.dtype) for name in (self.score, "logprob"))
        return credit + self.coef * self._need(rollouts).to(credit.dtype) * (-logprob - entropy)

    def after(self, rollouts: Rollouts) -> EntropyGradient:
        if self.target is None:
            return self
        low, high = self.bounds
        step = -self.delta if self._uncertain(rollouts) else self.delta
        return replace(self, coef=min(max(self.coef + step, low), high))

    def _uncertain(self, rollouts: Rollouts) -> bool:
        """Whether the mean token entropy of the batch is above the target."""
        if self.target is None:
            return False
        mean = over(rollouts.score(self.score).sum(), rollouts.mask.sum())
        return float(mean) > self.target

    def _need(self, rollouts: Rollouts) -> Tensor:
        """[B, T] or [B, 1]: λ of each rollout's prompt."""
        won = rollouts.success.to(rollouts.reward.dtype)[:, None]
        if self.difficulty is None:
            return torch.ones_like(won)
        if self.rate == "group":
            rate = pool_mean(won, torch.ones_like(won, dtype=torch.bool), rollouts.group_index)
        else:
            rate = rollouts.score(self.rate)
        return (1 - rate / self.difficulty).clamp(min=0)
