"""T: what minimises variance. Not weights that grow with it, but sampling probabilities that do, with 1/q weights.

combine unbiased estimates of one mean     w ∝ 1 / Var                              (Gauss-Markov)
keep m of n different terms xᵢ of a sum     q ∝ ‖xᵢ‖, weight 1 / (m q)               (Cauchy-Schwarz)
keep tokens before they are drawn          π(x) = min(1, c √E[A² ‖g‖² | x]), weight 1 / π
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from tokencredit.theory.rows import Rows, wide_rows
from tokencredit.theory.statement import Check, Statement

EXACT = 1e-12
POWERS = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0)
SHARE = 0.25
"""Share of tokens that the sampled gradient keeps on average."""


def check_weights(power: float = -2.0) -> Check:
    """Weights ∝ σ^power, summing to 1, combine 12 unbiased estimates of one mean with the least variance."""
    sigma = torch.logspace(-1, 0, 12, dtype=torch.float64)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=12)), dtype=torch.float64)

    def variance(weight: Tensor) -> float:
        """Over all 2¹² outcomes of μ ± σᵢ."""
        return float((signs * sigma @ (weight / weight.sum())).square().mean())

    by_power = {each: variance(sigma**each) for each in POWERS}
    best = float(1 / sigma.pow(-2).sum())
    claimed = variance(sigma**power)
    near = [variance(sigma**power * factor) for factor in _perturbations(12)]
    return Check(
        {
            "variance, equal weights": by_power[0.0],
            "variance, weights ~ sd (T)": by_power[1.0],
            "variance, weights ~ 1/sd": by_power[-1.0],
            "variance, weights ~ 1/Var": by_power[-2.0],
            "least possible": best,
        },
        {
            "claimed weights reach the least variance": abs(claimed - best) <= EXACT,
            "no other weights are better": claimed <= min([*by_power.values(), *near]) + EXACT,
            "T is worse than equal weights": by_power[1.0] > by_power[0.0],
        },
    )


def _perturbations(size: int, num: int = 200) -> Tensor:
    """[num, size] positive factors, from tiny to large changes."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 0, num, dtype=torch.float64)[:, None]
    return (scale * torch.randn(num, size, generator=generator, dtype=torch.float64)).exp()


def check_sampling(power: float = 1.0, rule: str = "rms") -> Check:
    """q ∝ ‖x‖^power with weight 1/(m q) is the best way to keep m terms of a sum; π(x) by `rule` is the best before
    tokens are drawn.
    """
    terms, on_world = _terms(power), _before_drawing(rule)
    return Check(terms.figures | on_world.figures, terms.conditions | on_world.conditions)


def _terms(power: float) -> Check:
    """Six terms in R⁴, two draws with replacement: all 36 outcomes."""
    x = (
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        * torch.logspace(-1, 0.5, 6)[:, None]
    )
    norm, total, m = x.norm(dim=1), x.sum(0), 2
    draws = torch.tensor(list(product(range(6), repeat=m)))

    def moments(q: Tensor) -> tuple[Tensor, float]:
        """Mean and total variance of Σ x/(m q) over the draws."""
        chance, estimate = q[draws].prod(1), (x / (m * q[:, None]))[draws].sum(1)
        return chance @ estimate, float(chance @ (estimate - total).square().sum(1))

    q = norm**power / (norm**power).sum()
    mean, variance = moments(q)
    least = float((norm.sum().square() - total.square().sum()) / m)
    near = [moments(each / each.sum())[1] for each in q * _perturbations(6)]
    close = EXACT * max(least, 1)
    return Check(
        {
            "variance, equal q": moments(torch.full((6,), 1 / 6, dtype=torch.float64))[1],
            "variance, q ~ |x|": moments(norm / norm.sum())[1],
            "variance, q ~ |x|^2": moments(norm.square() / norm.square().sum())[1],
            "least variance, m = 2 of 6": least,
        },
        {
            "1/q weights are unbiased": float((mean - total).abs().max()) <= EXACT,
            "claimed q reach the least variance": abs(variance - least) <= close,
            "no other q are better": variance <= min(near),
        },
    )


def keep_probability(score: Tensor, mass: Tensor, budget: float) -> Tensor:
    """min(1, c · score) with Σ mass · min(1, c · score) = budget, by bisection on log c."""
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(mass @ (score * 2.0**middle).clamp(max=1)) < budget else (low, middle)
    return (score * 2.0**low).clamp(max=1)


def added_variance(rows: Rows, keep: Tensor, baseline: float) -> float:
    """Σ E‖x‖² (1/π − 1): what keeping tokens with probability π (weight 1/π) adds to the variance; π [P], or [P, V] by
    token.
    """
    if keep.dim() == 1:
        keep = keep[:, None].expand_as(rows.p)
    return float((rows.reach[:, None] * rows.p * rows.squares(baseline) * (1 / keep - 1)).sum())


def _before_drawing(rule: str) -> Check:
    """Keep probabilities that depend on the prefix alone, at a budget of SHARE of the tokens, on random policies."""
    found, never_beaten = [], []
    for rows in wide_rows():
        j, budget = rows.success, SHARE * float(rows.reach.sum())
        scores = rows.scores | {"rms": (rows.energy(j) / rows.reach).sqrt()}
        noise = float(rows.energy(j).sum() - rows.gradient.square().sum())
        added = {
            name: added_variance(rows, keep_probability(score, rows.reach, budget), j) / noise
            for name, score in scores.items()
        }
        factors = _perturbations(len(rows.reach), 50)
        near = [
            added_variance(rows, keep_probability(scores[rule] * each, rows.reach, budget), j) / noise
            for each in factors
        ]
        never_beaten.append(added[rule] <= min([*added.values(), *near]) * (1 + 1e-9))
        flat, mass = rows.squares(j).sqrt().flatten(), (rows.reach[:, None] * rows.p).flatten()
        added["drawn"] = added_variance(rows, keep_probability(flat, mass, budget).view_as(rows.p), j) / noise
        found.append(added)
    names = {
        "one": "equal",
        "entropy": "~ H",
        "root_fisher": "~ sqrt(tr F)",
        "rms": "~ rms |x|",
        "drawn": "~ |x| of the drawn token",
    }
    mean = {
        f"added / own variance, pi {told}, mean": sum(each[name] for each in found) / len(found)
        for name, told in names.items()
    }
    worst = {
        f"added / own variance, pi {told}, worst": max(each[name] for each in found) for name, told in names.items()
    }
    return Check(mean | worst, {"no other score of the prefix is better": all(never_beaten)})


STATEMENTS = (
    Statement(
        "T",
        "The per-token weight that minimises variance is ∝ √Var ∇ log π",
        "false",
        "the proposal, theorem",
        "Estimates of one mean: w ∝ 1/Var, and w ∝ sd is worse than equal weights. Terms of a sum: without a constraint"
        " w = 0, and any w ≠ 1 is biased (see shrinkage)",
        check_weights,
    ),
    Statement(
        "sampling",
        "√Var ∇ log π is the best probability of keeping a token, with weight 1/q",
        "true, up to the credit",
        "T, corrected",
        "q ∝ ‖xᵢ‖ with least variance ((Σ‖x‖)² − ‖Σx‖²)/m; before the token is drawn π(x) = min(1, c √E[A²‖g‖² | x]),"
        " which is ∝ √tr F where A² is uncorrelated with ‖g‖² and alike at all prefixes",
        check_sampling,
    ),
)
