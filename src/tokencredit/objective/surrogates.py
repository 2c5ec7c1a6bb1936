"""Surrogates: the loss of one token, to be minimised. w = π_θ(oₜ) / π_old(oₜ), c the credit.

All tensors are [B, T]; logprob carries the gradient. Log ratios are clamped to ±20 so that a ratio never overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokencredit.credit.transform import needs, one_of
from tokencredit.masked import row_mean, row_min_max, wide, zero_off
from tokencredit.rollouts import Rollouts

Stats = dict[str, Tensor]


@dataclass(frozen=True)
class Surrogate:
    """logprob, old_logprob, credit, mask, coefficient -> (loss [B, T], stats). Subclass it as a frozen dataclass and
    write `token_loss`.

    `coefficient` plans over the whole rollout batch which tokens a surrogate treats apart, and how much: κ [B, T], 0
    where it leaves a token alone, 1 (or any other number) where it does not. Most plan nothing, and only those with
    `plans` read the log-probs for it. Stats are means over tokens.
    """

    plans: ClassVar[bool] = False

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        raise TypeError(
            f"{type(self).__name__} does not define token_loss(self, logprob, old_logprob, credit, mask, coefficient)"
        )

    def coefficient(self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> Tensor | None:
        return None

    def __call__(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor | None = None
    ) -> tuple[Tensor, Stats]:
        logprob, old_logprob, credit = (
            zero_off(wide(x), mask) for x in (logprob, old_logprob.detach(), credit.detach())
        )
        if coefficient is None:
            if self.plans:
                raise ValueError(
                    f"{type(self).__name__} treats tokens apart by a coefficient planned over the whole batch: pass"
                    " `coefficient` (Plan.coefficient)"
                )
            coefficient = torch.zeros_like(logprob)
        loss, stats = self.token_loss(logprob, old_logprob, credit, mask, coefficient)
        return zero_off(loss, mask), stats | ratio_stats(logprob.detach(), old_logprob, mask)

    @property
    def needs(self) -> frozenset[str]:
        return needs(self)


@dataclass(frozen=True)
class LogProb(Surrogate):
    """The plain policy gradient: no ratio, no clip; right only for one update per rollout.

    ℓ = −c · log π_θ         Source: REINFORCE (Williams 1992).
    """

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        return -credit * logprob, {}


@dataclass(frozen=True)
class Clip(Surrogate):
    """PPO's clipped ratio.

        ℓ = −min(w c, clip(w, 1 − low, 1 + high) c)          and, with `dual` k and c < 0, ℓ ← min(ℓ, −k c)

    low = high is GRPO's; high > low is DAPO's clip-higher (arXiv:2503.14476 eq. 8); dual = 3 is verl's default for
    every baseline, in none of the papers. Source: PPO (arXiv:1707.06347) eq. 7.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        w = ratio(logprob, old_logprob)
        loss = clipped(w, credit, self.low, self.high)
        return dual_bounded(loss, credit, self.dual), clip_stats(w, credit, mask, self.low, self.high)


@dataclass(frozen=True)
class SequenceClip(Surrogate):
    """One ratio for a whole rollout, clipped.

        ℓ = −min(sᵢ c, clip(sᵢ, 1 − low, 1 + high) c)
        mean="geometric"   sᵢ = exp(1/|oᵢ| Σₜ log wᵢₜ)                     GSPO (arXiv:2507.18071) eq. 5
        mean="arithmetic"  sᵢ = 1/|oᵢ| Σₜ wᵢₜ                              GRPO-S (arXiv:2508.04349v6) eq. 11
        token=True         sᵢₜ = sg[sᵢ] · π_θ(oᵢₜ)/sg[π_θ(oᵢₜ)]
                                                       GSPO-token, eq. 13: the value of sᵢ, each token its own gradient

    With token=False the gradient couples all tokens of a rollout and sees only the mean of its credit: credit that
    varies within a rollout is refused (ValueError) instead of silently lost.
    """

    low: float = 3e-4
    high: float = 4e-4
    mean: str = "geometric"
    token: bool = False

    def __post_init__(self) -> None:
        one_of(self, mean=("geometric", "arithmetic"))

    def coefficient(self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> None:
        low, high = row_min_max(credit, rollouts.mask)
        varies = (high - low) > 1e-5 * torch.maximum(high.abs(), low.abs())
        if not self.token and varies.any():
            raise ValueError(
                "a sequence ratio sees only the mean of a rollout's credit, but the credit of row"
                f" {int(varies.nonzero()[0, 0])} varies from token to token: use SequenceClip(token=True) (method"
                " gspo_token), or a surrogate with token ratios"
            )

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        if self.mean == "geometric":
            s = row_mean(log_ratio(logprob, old_logprob), mask).exp()[:, None]
        else:
            s = row_mean(ratio(logprob, old_logprob), mask)[:, None]
        if self.token:
            s = s.detach() * (logprob - logprob.detach()).exp()
        loss = clipped(s, credit, self.low, self.high)
        return loss, clip_stats(s.expand_as(credit), credit, mask, self.low, self.high)


@dataclass(frozen=True)
class CISPO(Surrogate):
    """Clipped importance weights without a dropped gradient.

        ℓ = −sg[clip(w, floor, cap)] · c · log π_θ

    The cap is on w itself (TRL's reading; verl's and the paper's is 1 + ε): the paper gives no number, 5 is what later
    work uses. Source: MiniMax-M1 (arXiv:2506.13585) eqs. 4-5, whose lower bound is left off as well.
    """

    cap: float = 5.0
    floor: float = 0.0

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        w = ratio(logprob, old_logprob).detach()
        return -w.clamp(self.floor, self.cap) * credit * logprob, {
            "clip_low": token_mean(w < self.floor, mask),
            "clip_high": token_mean(w > self.cap, mask),
            "clip_high_gain": token_mean((w > self.cap) & (credit > 0), mask),
        }


@dataclass(frozen=True)
class SAPO(Surrogate):
    """A soft gate on the ratio in place of a clip.

        ℓ = −(4/τ) σ(τ (w − 1)) c        τ = positive if c > 0 else negative

    Its gradient weight is 4 p (1 − p), p = σ(τ (w − 1)): 1 at w = 1. Source: SAPO (arXiv:2511.20347) eqs. 5-6.
    """

    positive: float = 1.0
    negative: float = 1.05

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        tau = torch.full_like(credit, self.negative).masked_fill(credit > 0, self.positive)
        gate = torch.sigmoid(tau * (ratio(logprob, old_logprob) - 1))
        weight = 4 * (gate * (1 - gate)).detach()
        return -4 / tau * gate * credit, {"gate": token_mean(weight, mask)}


@dataclass(frozen=True)
class GPPO(Surrogate):
    """Clipped tokens keep a bounded gradient, scaled by β, instead of none.

        ℓ = −β₁ (1 − low)/sg[w] · w c      w < 1 − low,  c < 0
            −β₂ (1 + high)/sg[w] · w c     w > 1 + high, c > 0
            −w c                           otherwise

    β = 0 has PPO's gradient. The released recipes: β = (0.5, 1) at 1.5B, (0.75, 1) at 7B. Source: CE-GPPO
    (arXiv:2509.20712), after the released `compute_gppo_loss_general_beta`; its extra dual clip on c < 0 is `dual`, off
    here.
    """

    beta: tuple[float, float] = (0.5, 1.0)
    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        w = ratio(logprob, old_logprob)
        unit = w / w.detach()
        below, above = (w < 1 - self.low) & (credit < 0), (w > 1 + self.high) & (credit > 0)
        gated = torch.where(
            below, self.beta[0] * (1 - self.low) * unit, torch.where(above, self.beta[1] * (1 + self.high) * unit, w)
        )
        loss = -gated * credit
        return dual_bounded(loss, credit, self.dual), clip_stats(w, credit, mask, self.low, self.high)


def clipped(w: Tensor, credit: Tensor, low: float, high: float) -> Tensor:
    """[B, T]: −min(w c, clip(w, 1 − low, 1 + high) c)."""
    return torch.maximum(-w * credit, -w.clamp(1 - low, 1 + high) * credit)


def dual_bounded(loss: Tensor, credit: Tensor, dual: float | None) -> Tensor:
    """[B, T]: the loss of tokens with c < 0, at most −dual · c; None bounds nothing."""
    return loss if dual is None else torch.where(credit < 0, torch.minimum(loss, -dual * credit), loss)


def log_ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    return (logprob - old_logprob).clamp(-20, 20)


def ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    return log_ratio(logprob, old_logprob).exp()


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """0-dim: mean over the tokens of the batch."""
    return zero_off(x.detach().float(), mask).sum() / mask.sum().clamp(min=1)


def row_means(x: Tensor, mask: Tensor) -> Tensor:
    """[B]: mean over the tokens of every rollout; one 0 where there is no rollout."""
    means = zero_off(x.detach().float(), mask).sum(1) / mask.sum(1).clamp(min=1)
    return means if len(means) else means.new_zeros(1)


def clip_stats(w: Tensor, credit: Tensor, mask: Tensor, low: float, high: float) -> Stats:
    """Shares of tokens whose gradient the clip stops: from below (c < 0) and from above (c > 0), of the batch, and the
    least and the largest of a rollout.
    """
    w = w.detach()
    below, above = (w < 1 - low) & (credit < 0), (w > 1 + high) & (credit > 0)
    return {
        "clip_low": token_mean(below, mask),
        "clip_high": token_mean(above, mask),
        "clip_low_min": row_means(below, mask).min(),
        "clip_high_max": row_means(above, mask).max(),
    }


def ratio_stats(logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> Stats:
    w = ratio(logprob, old_logprob)
    ones = torch.where(mask, w, 1)
    return {
        "ratio_mean": token_mean(w, mask),
        "ratio_max": ones.max() if ones.numel() else w.new_ones(()),
        "ratio_min": ones.min() if ones.numel() else w.new_ones(()),
        "kl_old": token_mean(w - 1 - log_ratio(logprob, old_logprob), mask),
    }
