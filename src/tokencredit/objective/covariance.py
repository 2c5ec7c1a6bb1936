"""Covariance control of entropy: the few tokens whose log-prob and credit rise together most are held back.

    Cov(oₜ) = (log π_θ(oₜ) − mean log π_θ) · (cₜ − mean c)          means over the N tokens of the whole rollout batch

Source: the entropy mechanism (arXiv:2505.22617) eqs. 10-14 and its released code, whose means and selections run over
micro-batches; here they run over the whole rollout batch, chosen once, when current and old policy agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokencredit.masked import pool_deviation
from tokencredit.objective.surrogates import Stats, Surrogate, clip_stats, clipped, ratio, token_mean
from tokencredit.rollouts import Rollouts


def covariance(logprob: Tensor, credit: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: each token's term of the covariance of log-prob and credit over the batch; 0 off the mask."""
    index = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
    return pool_deviation(logprob.detach(), mask, index) * pool_deviation(credit.to(logprob.dtype), mask, index)


def portion(fraction: float, tokens: int) -> int:
    """⌊fraction · tokens⌋, at least 1; the product's rounding is allowed for (0.29 · 100 is 29)."""
    return max(math.floor(fraction * tokens * (1 + 1e-12)), 1)


@dataclass(frozen=True)
class ClipCov(Surrogate):
    """Of the tokens whose covariance lies in a band, a few drawn at random get no gradient.

        ℓ = PPO's clipped loss; 0 for ⌊fraction · N⌋ (at least 1) tokens drawn uniformly among low < Cov(oₜ) < high

    The released recipes switch the ratio clip practically off (low_clip = high_clip = 1) and leave out of the draw the
    tokens that it stops. The draw is seeded: the same batch gives the same tokens. Source: arXiv:2505.22617 eqs. 11-12.
    """

    fraction: float = 2e-4
    band: tuple[float, float] = (1.0, 5.0)
    low: float = 1.0
    high: float = 1.0
    seed: int = 0
    selects: ClassVar[bool] = True

    def select(self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> Tensor:
        mask = rollouts.mask
        cov, w = covariance(logprob, credit, mask), ratio(logprob, old_logprob)
        stopped = ((w < 1 - self.low) & (credit < 0)) | ((w > 1 + self.high) & (credit > 0))
        candidates = torch.nonzero((mask & ~stopped & (cov > self.band[0]) & (cov < self.band[1])).flatten())[:, 0]
        tokens = int(mask.sum())
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + tokens)
        order = torch.randperm(len(candidates), generator=draw)[: portion(self.fraction, tokens)]
        chosen = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
        chosen[candidates[order.to(mask.device)]] = True
        return chosen.view_as(mask)

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, selected: Tensor
    ) -> tuple[Tensor, Stats]:
        w = ratio(logprob, old_logprob)
        loss = clipped(w, credit, self.low, self.high)
        return loss.masked_fill(selected, 0), {"selected": token_mean(selected, mask)} | clip_stats(
            w, credit, mask, self.low, self.high
        )


@dataclass(frozen=True)
class KLCov(Surrogate):
    """The tokens with the largest covariance are tied to the old policy.

        ℓ = −w c + β |log π_θ − log π_old| for the ⌊fraction · N⌋ (at least 1) tokens of largest Cov(oₜ);
                                                                                                    −w c for the others

    No ratio clip for any token. The paper writes a KL divergence, the released code takes the absolute log ratio: the
    code is followed. On-policy the penalty has no gradient: it acts from the second update on a batch. Where old
    log-probs come from another forward pass, rounding sets the sign of the first update's penalty, as it does in the
    released code. fraction = 2e-3 (7B; 2e-4 for 32B), β = 1 (verl's default is 0.1). Source: arXiv:2505.22617 eqs.
    13-14.
    """

    fraction: float = 2e-3
    beta: float = 1.0
    selects: ClassVar[bool] = True

    def select(self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> Tensor:
        mask = rollouts.mask
        cov = covariance(logprob, credit, mask).masked_fill(~mask, -torch.inf).flatten()
        tokens = int(mask.sum())
        chosen = torch.zeros_like(cov, dtype=torch.bool)
        # A stable sort, so that ties fall the same way whatever the padding.
        chosen[cov.sort(descending=True, stable=True).indices[: min(portion(self.fraction, tokens), tokens)]] = True
        return chosen.view_as(mask)

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, selected: Tensor
    ) -> tuple[Tensor, Stats]:
        penalty = self.beta * (logprob - old_logprob).abs()
        return -ratio(logprob, old_logprob) * credit + torch.where(selected, penalty, 0), {
            "selected": token_mean(selected, mask)
        }
