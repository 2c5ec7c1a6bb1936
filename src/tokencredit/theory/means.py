"""GTPO's variance proposition (arXiv:2508.04349v6, appendix B.1-B.2): the token-level against the sequence-level mean
of rewards.

    R̂₁ = Σ rᵢ / G        R̂₂ = Σ |oᵢ| rᵢ / Σ |oᵢ|

With variance σ² of a token's reward and correlation ρ within a rollout, and N = Σ nᵢ,

    Var R̂₁ = σ²/G² Σ (1 + (nᵢ − 1) ρ)/nᵢ        Var R̂₂ = σ²/N² Σ nᵢ (1 + (nᵢ − 1) ρ)

The proposition has ρ = 0. The tokens of a rollout share one reward: ρ = 1.
"""

from __future__ import annotations

from itertools import product
from math import comb

import torch
from torch import Tensor

from tokencredit.theory.rows import SMALL, enumeration_of
from tokencredit.theory.statement import Check, Statement

EXACT = 1e-12
STEP = 0.01


def threshold(lengths: Tensor) -> float:
    """ρ* = δ₁ / (δ₁ + δ₂): Var R̂₂ < Var R̂₁ exactly for correlations below it.

    δ₁ = Σ 1/nᵢ / G² − 1/N        δ₂ = Σ nᵢ² / N² − 1/G
    """
    n, num = lengths.double(), len(lengths)
    first, second = (1 / n).sum() / num**2 - 1 / n.sum(), n.square().sum() / n.sum().square() - 1 / num
    return float(first / (first + second))


def check_means(rho_star: float | None = None) -> Check:
    """Both variances by enumeration of token rewards that are one draw per rollout with probability ρ; then on the
    exact world.
    """
    lengths = torch.tensor([1, 2, 5])
    star = threshold(lengths) if rho_star is None else rho_star
    variance = {rho: variances(lengths, rho) for rho in (0.0, star - STEP, star, star + STEP, 1.0)}
    world, j = _on_world(), float(enumeration_of(SMALL).success)
    return Check(
        {
            "rho* of lengths 1, 2, 5": star,
            "rho* of lengths 200, 500, 1000, 4000": threshold(torch.tensor([200, 500, 1000, 4000])),
            **{f"Var R2 / Var R1, rho = {rho:g}": variance[rho][1] / variance[rho][0] for rho in (0.0, 1.0)},
            "J, exact world": j,
            **world,
        },
        {
            "token mean better below rho*": all(variance[rho][1] < variance[rho][0] for rho in (0.0, star - STEP)),
            "equal at rho*": abs(variance[star][1] - variance[star][0]) <= EXACT,
            "token mean worse above rho*, and at rho = 1": all(
                variance[rho][1] > variance[rho][0] for rho in (star + STEP, 1.0)
            ),
            "sequence mean is unbiased": abs(world["E R1, exact world"] - j) <= EXACT,
            "token mean is biased where length goes with reward": abs(world["E R2, exact world"] - j) > 0.01,
        },
    )


def variances(lengths: Tensor, rho: float, mean: float = 0.5) -> tuple[float, float]:
    """(Var R̂₁, Var R̂₂), exact: with probability ρ a rollout's tokens share one draw of their 0/1 reward, else each
    has its own.
    """
    laws = []
    for n in lengths.tolist():
        own = [comb(n, k) * mean**k * (1 - mean) ** (n - k) for k in range(n + 1)]
        laws.append(
            [(1 - rho) * chance + rho * (mean * (k == n) + (1 - mean) * (k == 0)) for k, chance in enumerate(own)]
        )
    first, second = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for sums in product(*(range(len(law)) for law in laws)):
        chance = torch.tensor([law[k] for law, k in zip(laws, sums)], dtype=torch.float64).prod()
        total = torch.tensor(sums, dtype=torch.float64)
        values = torch.stack([(total / lengths).mean(), total.sum() / lengths.sum()])
        first, second = first + chance * values, second + chance * values.square()
    return tuple((second - first.square()).tolist())


def _on_world(size: int = 3) -> dict[str, float]:
    """Mean and variance of both means over all groups of three rollouts."""
    _, mask, chance, reward = enumeration_of(SMALL).completions
    groups = torch.cartesian_prod(*[torch.arange(len(chance))] * size)
    p, r, n = chance[groups].prod(1), reward[groups], mask.sum(1)[groups].double()
    found = {}
    for name, x in {"R1": r.mean(1), "R2": (n * r).sum(1) / n.sum(1)}.items():
        found |= {
            f"E {name}, exact world": float(p @ x),
            f"Var {name}, exact world": float(p @ x.square() - (p @ x).square()),
        }
    return found


STATEMENTS = (
    Statement(
        "GTPO-B.1",
        "Var R̂₂ ≤ Var R̂₁: the token-level mean of rewards has the lower variance",
        "true for i.i.d. token rewards, false for GRPO's",
        "GTPO (arXiv:2508.04349v6) sec. 2.1, appendix B.1-B.2",
        "Var R̂₂ < Var R̂₁ exactly if the correlation within a rollout is below ρ* = δ₁/(δ₁ + δ₂); rewards of a rollout"
        " have ρ = 1, where Var R̂₂ = σ² Σ|oᵢ|²/(Σ|oᵢ|)² ≥ σ²/G = Var R̂₁; and R̂₂ estimates E[|o| r]/E|o|",
        check_means,
    ),
)
