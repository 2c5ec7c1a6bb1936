"""From r to Q* (arXiv:2404.12358): what the implicit reward of a KL-regularised optimum says of a token, on an exact
world with rewards 0 and 1.

    π* = argmax E_π[R] − β KL(π ‖ π_ref)  ⇒  π*(y) ∝ π_ref(y) e^{R(y)/β}
    r̂ₜ = β log π*(aₜ|xₜ) / π_ref(aₜ|xₜ) = V*(xₜ₊₁) − V*(xₜ),    V*(x) = β log(1 + κ V(x)),  κ = e^{1/β} − 1

V is the success probability under π_ref, V* = R where a completion ends. r̂ is the soft advantage: a function of two
success probabilities, which sums to R − V*(x₀), and tends to Q − V as β grows. The closed form is derived here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import expm1, log1p

import torch
from torch import Tensor

from tokencredit.tasks.exact import Enumeration
from tokencredit.theory.rows import WIDE, enumeration_of
from tokencredit.theory.statement import Check, Statement

BETAS = (0.1, 1.0, 100.0)
EXACT = 1e-9
Potential = Callable[[Tensor, float], Tensor]


def soft_value(value: Tensor, beta: float) -> Tensor:
    """V* of success probabilities V under the reference."""
    return beta * torch.log1p(expm1(1 / beta) * value)


def soft_advantage(before: Tensor, after: Tensor, beta: float, potential: Potential = soft_value) -> Tensor:
    """r̂ of tokens, from V before and after each."""
    return potential(after, beta) - potential(before, beta)


def implicit_reward(exact: Enumeration, beta: float) -> Tensor:
    """[N, T]: β log π*/π_ref of every token of every completion, π* by its Gibbs form over whole completions."""
    sequences, mask, reference, reward = exact.completions
    optimum = reference * (reward / beta).exp()
    optimum = optimum / optimum.sum()
    marked = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), torch.where(mask, sequences, -1)], 1)
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for t in range(mask.shape[1]):
        mass = []
        for upto in (t + 1, t + 2):
            _, prefix = marked[:, :upto].unique(dim=0, return_inverse=True)
            sums = torch.zeros(2, int(prefix.max()) + 1, dtype=torch.float64)
            mass.append(sums.index_add_(1, prefix, torch.stack([optimum, reference]))[:, prefix])
        chance = mass[1] / mass[0]
        found[:, t] = torch.where(mask[:, t], beta * (chance[0] / chance[1]).log(), 0.0)
    return found


def check_soft_advantage(claimed: Potential = soft_value) -> Check:
    """The implicit reward of the optimum against the claimed potential, its sum, and Q − V for large β."""
    exact = enumeration_of(WIDE)
    sequences, mask, _, reward = exact.completions
    scores = exact.scores(sequences, mask)
    before, credit = scores["value"], scores["exact_value"]
    figures, conditions = {}, {}
    for beta in BETAS:
        found = implicit_reward(exact, beta)
        told = torch.where(mask, soft_advantage(before, before + credit, beta, claimed), 0.0)
        start = beta * log1p(expm1(1 / beta) * float(exact.success))
        figures[f"largest difference, beta = {beta:g}"] = float((found - told).abs().max())
        figures[f"largest difference from Q - V, beta = {beta:g}"] = float((found - credit).abs().max())
        conditions[f"beta = {beta:g}: the implicit reward is the claimed one"] = bool(
            (found - told).abs().max() < EXACT
        )
        off = (found.sum(1) - (reward - start)).abs().max()
        conditions[f"beta = {beta:g}: it sums to R less the soft value of the prompt"] = bool(off < EXACT)
    conditions["large beta: Q - V"] = figures["largest difference from Q - V, beta = 100"] < 0.01
    conditions["small beta: not Q - V"] = figures["largest difference from Q - V, beta = 0.1"] > 0.1
    return Check(figures, conditions)


STATEMENTS = (
    Statement(
        "soft-advantage",
        "The token reward that DPO learns implicitly, β log π*/π_ref, is the advantage of each token",
        "true of the soft advantage, which is Q − V for large β alone",
        "From r to Q* (arXiv:2404.12358), abstract and second-hand; the closed form is derived here",
        "With rewards 0 and 1: r̂ₜ = β log [(1 + κ Vₜ₊₁)/(1 + κ Vₜ)], κ = e^{1/β} − 1, V under the reference. It adds up"
        " to R − V*(x₀); at small β it is β log Vₜ₊₁/Vₜ, and steps up from a small V count most",
        check_soft_advantage,
    ),
)
