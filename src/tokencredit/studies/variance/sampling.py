"""What it costs to keep only some of the tokens at random: variance added, per token kept, and the theory's optimum.

Tokens are kept independently with probability qₜ and weigh 1/qₜ (Horvitz and Thompson 1952): the gradient stays right
on average, and

    added = Σₜ |xₜ|² (1 − qₜ) / qₜ          xₜ = κₜ ∇log πₜ          least at q = min(1, c |xₜ|) for a given Σ q

whatever the correlation of the terms. It needs their squared norms alone, so nothing has to be drawn. What is drawn is
the check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencredit.credit import TokenSampling
from tokencredit.dynamics.batch import Batch
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.vectors import dot, large, trained
from tokencredit.masked import over
from tokencredit.rollouts import Rollouts
from tokencredit.stats import Estimate, mean_of_units
from tokencredit.studies.variance.estimators import GradientMoments, interval, mean

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
CHECKED, GROUPS, FEW = 0.2, 32, 2
"""The fraction that is drawn as well, and of how many groups; of a large model."""


@dataclass(frozen=True)
class Scheme:
    """How likely a token is to be kept: q ∝ |κ|^by_credit · score^power, none for 1; a part `floor` of the budget goes
    to all alike.
    """

    score: str | None = None
    power: float = 1.0
    by_credit: bool = True
    floor: float = 0.1

    def probability(self, weight: Tensor, rollouts: Rollouts, fraction: float) -> Tensor:
        """q [B, T] of the tokens with weight, 0 elsewhere; Σ q is `fraction` of their number."""
        sampling = TokenSampling(self.score, fraction, self.power, self.floor * fraction, self.by_credit)
        return sampling.probability(weight, rollouts)


SCHEMES = {
    "uniform": Scheme(by_credit=False),
    "entropy": Scheme("entropy", by_credit=False),
    "credit × entropy": Scheme("entropy"),
    "credit × √Fisher trace": Scheme("fisher_trace", 0.5),
    "credit × head norm": Scheme("head_norm"),
    "optimum: credit × gradient norm": Scheme("gradient_norm", floor=1e-6),
}


def added_variance(weight: Tensor, rollouts: Rollouts, q: Tensor) -> Tensor:
    """[groups]: what keeping tokens with probability q adds to E|x|² of a group's gradient, x as `variance_gradients`
    scales it.
    """
    groups = int(rollouts.group_index.max()) + 1
    square = (groups * weight * rollouts.score("gradient_norm")).square()
    rows = (square * over(1 - q, q)).sum(1)
    return torch.zeros(groups, dtype=torch.float64).index_add_(0, rollouts.group_index, rows)


Curve = list[dict[str, Estimate]]


def curves(
    weight: Tensor, rollouts: Rollouts, own: GradientMoments, fractions: Sequence[float] = FRACTIONS
) -> dict[str, Curve]:
    """{scheme: one entry per fraction}: `added`, over tr Cov of the whole gradient, and `cost`, fraction · (1 + added):
    tokens that a given variance costs, against keeping all. Groups g and g + N/2 share a prompt."""
    found = {}
    for name, scheme in SCHEMES.items():
        found[name] = []
        for fraction in fractions:
            q = scheme.probability(weight, rollouts, fraction)
            per_prompt = added_variance(weight, rollouts, q).unflatten(0, (2, -1)).mean(0).numpy()
            ratio = mean(per_prompt) / own.noise
            kept = float(q.sum() / (q > 0).sum())
            found[name].append({"added": interval(ratio), "cost": interval(kept * (1 + ratio))})
    return found


def num_checked(checkpoint: Checkpoint) -> int:
    """Groups on which the formula is checked, at most."""
    return FEW if large(trained(checkpoint.model)) else GROUPS


def drawn_check(
    checkpoint: Checkpoint,
    batch: Batch,
    weight: Tensor,
    draws: int,
    seed: int,
    heard: Callable[[int], Any] | None = None,
) -> dict[str, Estimate]:
    """{scheme: |gradient of the tokens kept − gradient of all|², as drawn, over what the formula says}: 1 but for
    noise, over draws; `heard` is told of each.

    Rare tokens with large weights make it heavy-tailed. What they add to Σ|xₜ|² (kept/q − 1)², whose mean is the
    formula's, is known for every draw and taken out (a control variate); real gradients remain on both sides.
    """
    group = batch.rollouts.group_index
    few = torch.isin(group, torch.unique(group[weight.any(1)])[: num_checked(checkpoint)])
    batch, weight = batch.take(few), weight[few]
    passes, rollouts, found = batch.passes(checkpoint), batch.rollouts, {}
    square = (weight * rollouts.score("gradient_norm")).square()
    generator = torch.Generator().manual_seed(seed)
    for name, scheme in SCHEMES.items():
        q = scheme.probability(weight, rollouts, CHECKED)
        expected = float((square * over(1 - q, q)).sum())
        ratios = []
        for _ in range(draws):
            kept = torch.rand(q.shape, generator=generator, dtype=torch.float64) < q
            excess = torch.where(q > 0, over(kept.double(), q) - 1, 0.0)
            error = passes.reverse(weight * excess)
            ratios.append(1 + (dot(error, error) - float((square * excess.square()).sum())) / expected)
            if heard:
                heard(1)
        found[name] = mean_of_units(ratios)
    return found
