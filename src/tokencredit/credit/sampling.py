"""Training on a random few of the tokens, weighted so that the credit stays right on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokencredit.credit.transform import Transform, needs, one_of
from tokencredit.masked import over
from tokencredit.rollouts import Rollouts


@dataclass(frozen=True)
class TokenSampling(Transform):
    """Every token is kept with a probability of its own, and a kept one weighs the more the less likely that was.

        cᵢₜ ← cᵢₜ / qᵢₜ · 1[uᵢₜ < qᵢₜ]        qᵢₜ = φ + (1 − φ) min(1, κ sᵢₜ)        sᵢₜ = |cᵢₜ| xᵢₜ^power

    κ is such that Σ q = fraction · N over the N tokens of the scope ("batch", "group" or "row") that carry credit;
    where fewer than that have s > 0, those are all kept, and the others share what is left. Over the uniform draw u
    (the score `uniform`) the mean is c itself, whatever x is: tokens that x thinks little of are rare and heavy, by at
    most 1/φ (`floor` φ). A surrogate that is linear in the size of the credit, as all ratio clips are, stays right on
    average too. fraction = 1 is the identity.

    The gradient Σ c g has the least variance with q ∝ |c| ‖g‖ (x = "gradient_norm" or, of the LM head alone,
    "head_norm") and, where q may not depend on the token that was drawn, with q ∝ |c| √tr F (x = "fisher_trace", power
    0.5): Cauchy and Schwarz. As a weight without 1/q the same x would bias the gradient. score=None: x = 1.
    by_credit=False leaves |c| out. Assumes x >= 0. Source: Poisson sampling with inverse-probability weights (Horvitz
    and Thompson 1952).
    """

    score: str | None = None
    fraction: float = 0.2
    power: float = 1.0
    floor: float = 0.02
    by_credit: bool = True
    scope: str = "batch"
    laws: ClassVar[frozenset[str]] = frozenset({"keeps_sign"})

    def __post_init__(self) -> None:
        one_of(self, scope=("batch", "group", "row"))
        if not 0 < self.floor <= self.fraction <= 1:
            raise ValueError(
                f"TokenSampling needs 0 < floor <= fraction <= 1, got floor={self.floor}, fraction={self.fraction}"
            )
        if not self.power >= 0:
            raise ValueError(
                f"TokenSampling.power must not be negative: unlikely tokens would be kept for it; got {self.power}"
            )
        local = {"batch": set(), "group": {"group_local"}, "row": {"group_local", "row_local"}}[self.scope]
        object.__setattr__(self, "laws", frozenset({"keeps_sign"} | local))

    @property
    def needs(self) -> frozenset[str]:
        return needs(self) | {"uniform"}

    def probability(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        """[B, T]: q of every token that carries credit, 0 elsewhere."""
        size = (
            torch.ones_like(credit)
            if self.score is None
            else rollouts.score(self.score).to(credit.dtype).clamp(min=0) ** self.power
        )
        size = size * credit.abs() if self.by_credit else size
        carries = rollouts.mask & (credit != 0)
        index = torch.arange(len(rollouts), device=credit.device) if self.scope == "row" else rollouts.index(self.scope)
        q = torch.zeros_like(credit)
        for population in torch.unique(index):
            chosen = carries & (index == population)[:, None]
            q[chosen] = self._inclusion(size[chosen])
        return q

    def _inclusion(self, size: Tensor) -> Tensor:
        """q [N] of the tokens of one population: the largest k are certain, the others share what is left of the budget
        by size.
        """
        num = len(size)
        if not num:
            return size
        size = over(size, size.max().expand_as(size))
        some = int((size > 0).sum())
        budget = num * (self.fraction - self.floor) / (1 - self.floor) if self.floor < 1 else num
        if some <= budget:
            share = torch.ones_like(size).masked_fill(size == 0, (budget - some) / max(num - some, 1))
        else:
            ordered = size.sort(descending=True).values
            rest = ordered.flip(0).cumsum(0).flip(0)
            left = budget - torch.arange(num, dtype=size.dtype, device=size.device)
            k = int((left * ordered > rest).sum())
            share = (left[k] * size / rest[k]).clamp(max=1)
        q = self.floor + (1 - self.floor) * share
        # A token that is certain but for rounding is certain.
        return q.masked_fill(q > 1 - 1e-4, 1)

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        q = self.probability(credit, rollouts)
        kept = (rollouts.score("uniform") < q) | (q == 1)
        return torch.where(kept, over(credit, q), 0)
