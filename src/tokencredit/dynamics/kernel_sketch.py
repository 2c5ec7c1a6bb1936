"""The Fisher kernel without any token's gradient: random directions pushed forward through the model.

    sₖ(t) = ∇log π(t) · P^-½ uₖ          K̂(t, t') = 1/K Σₖ sₖ(t) sₖ(t')          uₖ Gaussian, E K̂ = K(t, t')

    Var K̂(t, t') = (K(t, t) K(t', t') + K(t, t')²) / K

so a cosine that is 0 comes out with a standard error of 1/√K: 0.06 at 256 directions. Sums, means and the total over senders are far
better than entries; single entries below 3/√K are noise. Directions are dense, since P^-½ u of a direction of rank one has full rank; one
forward-mode pass each, whatever the number of tokens. K̂ is Wishart: symmetric, positive, of rank at most K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokencredit.dynamics.kernel import Features, Preconditioner, chosen
from tokencredit.dynamics.passes import Passes
from tokencredit.lm.distribution import seed_of

FEW = 256
"""Directions below which single entries are mostly noise."""


def sketched_features(passes: Passes, preconditioner: Preconditioner, num: int, seed: int = 0, where: Tensor | None = None,
                      weight: Tensor | None = None) -> Features:  # fmt: skip
    """Φ [N, K] = sₖ/√K of every token, or of those `where` [B, T] is true; with `weight` [B, T] of whole completions, Σₜ wₜ sₖ(t).

    The same seed gives the same directions for any set of completions, so that sets can be compared. ValueError without a direction.
    """
    if num < 1:
        raise ValueError(f"a sketch needs at least one direction, got {num}; take 256 or more where single entries count")
    row, position = _units(passes, where, weight)
    found = torch.zeros(len(row), num, dtype=torch.float64)
    root = preconditioner.root
    for k in range(num):
        generator = torch.Generator().manual_seed(seed_of(seed, k))
        along = {name: x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for name, x in root.items()}
        tangent = passes.forward(along)[0]
        found[:, k] = (weight * tangent).sum(1)[row] if weight is not None else tangent[row, position]
    return Features(found / num**0.5, row, position, num**-0.5)


def _units(passes: Passes, where: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if weight is None:
        return chosen(passes, where)
    rows = (weight != 0).any(1).nonzero()[:, 0]
    return rows, torch.full_like(rows, -1)


def frobenius2(k: Tensor, noise: float) -> float:
    """‖K‖² = Σ K(t, t')², without the part that the noise of a sketch adds to it: E‖K̂‖² = (1 + 1/K) ‖K‖² + (tr K)² / K."""
    share = noise**2
    return float((k.square().sum() - share * k.diagonal().sum().square()) / (1 + share))
