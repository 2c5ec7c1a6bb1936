"""The Fisher kernel without any token's gradient: random directions pushed forward through the model.

    sₖ(t) = ∇log π(t) · P^-½ uₖ          K̂(t, t') = 1/K Σₖ sₖ(t) sₖ(t')          uₖ Gaussian, E K̂ = K(t, t')

    Var K̂(t, t') = (K(t, t) K(t', t') + K(t, t')²) / K

so a cosine that is 0 comes out with a standard error of 1/√K, 0.06 at 256 directions, and single entries below 3/√K are
noise. Means over many pairs and the large eigenvalues are good. The sum over senders is not: what t' gets of them has
the error √(K(t', t') κᵀKκ / K), more than the sum itself where gradients are nearly orthogonal. For that there is one
forward pass along the step, which is exact.

Directions are dense, since P^-½ u of a direction of rank one has full rank: one forward-mode pass each, whatever the
number of tokens. K̂ is Wishart: symmetric, positive, of rank at most K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokencredit.dynamics.kernel import Features, Heard, Preconditioner, chosen
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.vectors import Derived
from tokencredit.lm.distribution import seed_of


def sketched_features(
    passes: Passes,
    preconditioner: Preconditioner,
    num: int,
    seed: int = 0,
    where: Tensor | None = None,
    *,
    heard: Heard | None = None,
) -> Features:
    """Φ [N, K] = sₖ/√K of every token, or of those `where` [B, T] is true; their `by_row` sums are those of
    completions.

    The same seed gives the same directions for any set of completions, so that sets can be compared. `heard` is told of
    every direction. ValueError without one.
    """
    if num < 1:
        raise ValueError(
            f"a sketch needs at least one direction, got {num}; take 256 or more where single entries count"
        )
    row, position = chosen(passes, where)
    found = torch.zeros(len(row), num, dtype=torch.float64)
    root = preconditioner.root if passes.large else dict(preconditioner.root)
    for k in range(num):
        generator = torch.Generator().manual_seed(seed_of(seed, k))
        found[:, k] = passes.forward(Derived(root, lambda name: _turned(root[name], generator)))[0][row, position]  # noqa: B023
        if heard:
            heard(1)
    return Features(found / num**0.5, row, position, num**-0.5)


def _turned(root: Tensor, generator: torch.Generator) -> Tensor:
    """An entry of P^-½ u."""
    return root * torch.randn(root.shape, generator=generator, dtype=torch.float64).to(root.device)


def without_noise(square: Any, trace: Any, noise: float) -> Any:
    """‖K‖² = Σ K(t, t')² from that of K̂ and tr K̂, less what the noise of a sketch adds: E‖K̂‖² = (1 + 1/K) ‖K‖² + (tr
    K)² / K.
    """
    return (square - noise**2 * trace**2) / (1 + noise**2)
