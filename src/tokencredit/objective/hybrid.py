"""Two ratios in one surrogate: a token's own and its rollout's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencredit.credit.transform import one_of
from tokencredit.masked import over, row_mean, row_min_max, zero_off
from tokencredit.objective.surrogates import Stats, Surrogate, clip_stats, log_ratio, ratio
from tokencredit.rollouts import Rollouts


@dataclass(frozen=True)
class HybridClip(Surrogate):
    """A token's ratio and its rollout's, each clipped in its own range, mixed.

        w̃ = clip(wᵢₜ, 1 − low, 1 + high)        s̃ = clip(sᵢₜ, 1 − seq_low, 1 + seq_high)        sᵢₜ as in GSPO-token
        outer="min_of_mixes"   ℓ = −min((λ w + (1 − λ) s) c, (λ w̃ + (1 − λ) s̃) c)
        outer="mix_of_mins"    ℓ = −λ min(w c, w̃ c) − (1 − λ) min(s c, s̃ c)
        outer="mix_of_clips"   ℓ = −(λ w̃ + (1 − λ) s̃) c           stops clipped tokens whatever the sign of c
        mix     λ, a number, or "entropy": (H − minᵢ H) / (maxᵢ H − minᵢ H) over the rollout, ½ where all H are equal
        entropy_to   the branch that tokens of high entropy go to, "token" or "sequence"

    λ = 1 is GRPO's clip, λ = 0 GSPO-token's. Inside both ranges the three readings agree; they differ where the
    branches are clipped in opposite directions. Source: DHPO (arXiv:2601.05607), abstract and a third party's notes:
    that each branch is clipped before they are mixed, the average and the entropy mix are theirs; λ's branch and its
    range, the bounds and the outer form are not known. A reconstruction.

        HybridClip()(logprob, old_logprob, credit, mask)     # w 0.5, s 1.2, c 1 -> −0.85; the others −0.7502, −0.9002
    """

    low: float = 0.2
    high: float = 0.2
    seq_low: float = 3e-4
    seq_high: float = 4e-4
    mix: float | str = 0.5
    entropy_to: str = "token"
    outer: str = "min_of_mixes"
    score: str = "entropy"

    def __post_init__(self) -> None:
        one_of(self, entropy_to=("token", "sequence"), outer=("min_of_mixes", "mix_of_mins", "mix_of_clips"))
        if isinstance(self.mix, str):
            one_of(self, mix=("entropy",))
        elif not 0 <= self.mix <= 1:
            raise ValueError(f"HybridClip.mix must be in [0, 1] or 'entropy', got {self.mix}")
        object.__setattr__(self, "plans", isinstance(self.mix, str))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.score}) if self.plans else frozenset()

    def coefficient(self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> Tensor | None:
        """λ of tokens whose rollout has credit: the others have no loss."""
        if not self.plans:
            return None
        x, mask = rollouts.score(self.score).to(logprob.dtype), rollouts.mask
        low, high = row_min_max(x, mask)
        share = over(x - low[:, None], (high - low)[:, None].expand_as(x), empty=0.5)
        share = share if self.entropy_to == "token" else 1 - share
        return zero_off(share, mask & (credit != 0).any(1, keepdim=True))

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        share = coefficient if isinstance(self.mix, str) else torch.full_like(logprob, self.mix)
        w = ratio(logprob, old_logprob)
        s = row_mean(log_ratio(logprob, old_logprob), mask).exp()[:, None].detach()
        s = s * (logprob - logprob.detach()).exp()
        near, far = w.clamp(1 - self.low, 1 + self.high), s.clamp(1 - self.seq_low, 1 + self.seq_high)
        mixed, clips = share * w + (1 - share) * s, share * near + (1 - share) * far
        if self.outer == "min_of_mixes":
            loss = torch.maximum(-mixed * credit, -clips * credit)
        elif self.outer == "mix_of_mins":
            loss = share * torch.maximum(-w * credit, -near * credit)
            loss = loss + (1 - share) * torch.maximum(-s * credit, -far * credit)
        else:
            loss = -clips * credit
        sequence = clip_stats(s, credit, mask, self.seq_low, self.seq_high)
        stats = clip_stats(w, credit, mask, self.low, self.high)
        return loss, stats | {f"sequence_{name}": value for name, value in sequence.items()}
