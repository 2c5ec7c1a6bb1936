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
    plans: ClassVar[bool] = True

    def coefficient(self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> Tensor | None:
        mask = rollouts.mask
        cov, w = covariance(logprob, credit, mask), ratio(logprob, old_logprob)
        stopped = ((w < 1 - self.low) & (credit < 0)) | ((w > 1 + self.high) & (credit > 0))
        candidates = torch.nonzero((mask & ~stopped & (cov > self.band[0]) & (cov < self.band[1])).flatten())[:, 0]
        tokens = int(mask.sum())
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + tokens)
        order = torch.randperm(len(candidates), generator=draw)[: portion(self.fraction, tokens)]
        chosen = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
        chosen[candidates[order.to(mask.device)]] = True
        return chosen.view_as(mask).to(logprob.dtype)

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        w = ratio(logprob, old_logprob)
        loss = clipped(w, credit, self.low, self.high)
        stats = {"selected": token_mean(coefficient, mask)} | clip_stats(w, credit, mask, self.low, self.high)
        return loss.masked_fill(coefficient > 0, 0), stats


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
    plans: ClassVar[bool] = True

    def coefficient(self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> Tensor | None:
        mask = rollouts.mask
        cov = covariance(logprob, credit, mask).masked_fill(~mask, -torch.inf).flatten()
        tokens = int(mask.sum())
        chosen = torch.zeros_like(cov, dtype=torch.bool)
        # A stable sort, so that ties fall the same way whatever the padding.
        chosen[cov.sort(descending=True, stable=True).indices[: min(portion(self.fraction, tokens), tokens)]] = True
        return chosen.view_as(mask).to(logprob.dtype)

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        loss = -ratio(logprob, old_logprob) * credit + self.beta * coefficient * (logprob - old_logprob).abs()
        return loss, {"selected": token_mean(coefficient, mask)}


@dataclass(frozen=True)
class LowEntropyKL(Surrogate):
    """Among the tokens of low entropy, those with extreme covariance are tied to the old policy.

        ℓ = PPO's clipped loss + κᵢₜ |log π_θ − log π_old|
        κ = β_top, β_bottom for the ⌊fraction · M⌋ (at least 1) tokens of largest and of smallest Cov(oₜ) among the M =
            ⌊share · N⌋ tokens of lowest entropy, β_rest for the other M, 0 for the rest; means over the M alone

    `beta` is (top, rest, bottom). The released code has (2, 0, ½) times 0.1, no ratio clip for any token (low = 1, high
    = ∞ here) and, beside it, a KL term to the reference, the engine's beta. (β, β, β) penalises all tokens of low
    entropy, as the paper's text does with a KL to the *reference*, which is not this. β = 0 is PPO's clip. As with
    KL-Cov the penalty has no gradient at the first update. Source: SENT (arXiv:2512.04359), released
    `low_entropy_kl_cov_v2`. Differs: that code indexes with an integer mask, so its covariances are those of other
    tokens and the penalised ones in effect drawn at random; here the mask selects, as was meant.
    """

    share: float = 0.8
    fraction: float = 2e-4
    beta: tuple[float, float, float] = (0.2, 0.0, 0.05)
    low: float = 1.0
    high: float = math.inf
    score: str = "entropy"
    plans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.fraction <= 1):
            parts = f"share={self.share}, fraction={self.fraction}"
            raise ValueError(f"LowEntropyKL.share and fraction must be in (0, 1], got {parts}")

    def coefficient(self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> Tensor | None:
        mask = rollouts.mask
        tokens = int(mask.sum())
        kappa = torch.zeros(mask.numel(), dtype=logprob.dtype, device=mask.device)
        entropy = rollouts.score(self.score).masked_fill(~mask, torch.inf).flatten()
        # Stable sorts, so that ties fall the same way whatever the padding.
        calm = entropy.sort(stable=True).indices[: min(portion(self.share, tokens), tokens)].sort().values
        chosen = torch.zeros_like(mask.flatten())
        chosen[calm] = True
        cov = covariance(logprob, credit, chosen.view_as(mask)).flatten()[calm]
        order = calm[cov.sort(stable=True).indices]
        few = portion(self.fraction, len(calm))
        top, rest, bottom = self.beta
        kappa[order] = rest
        kappa[order[:few]] = bottom
        kappa[order[-few:]] = top
        return kappa.view_as(mask)

    def token_loss(
        self, logprob: Tensor, old_logprob: Tensor, credit: Tensor, mask: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Stats]:
        w = ratio(logprob, old_logprob)
        loss = clipped(w, credit, self.low, self.high) + coefficient * (logprob - old_logprob).abs()
        stats = {"selected": token_mean(coefficient > 0, mask)}
        return loss, stats | clip_stats(w, credit, mask, self.low, self.high)
