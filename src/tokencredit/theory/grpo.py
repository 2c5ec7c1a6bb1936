"""GRPO's effective loss (arXiv:2503.06639): the success probability as a recursion, against the exact problem solved on
an exact world.

    πₙ = argmax E_π[A] − β KL(π ‖ π_ref),   A = (r − pₙ₋₁) / √(pₙ₋₁ (1 − pₙ₋₁) + ε)
    ⇒  logit pₙ = logit p_ref + Δ(pₙ₋₁) / β,   Δ(p) = 1 / √(p (1 − p) + ε)        mean-only: Δ = 1

Δ is the credit of a success less that of a failure. KL and ratios are of whole completions.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from math import comb, exp, inf, log, sqrt

import torch

from tokencredit.credit import Chain, GroupCenter, Outcome
from tokencredit.rollouts import Rollouts
from tokencredit.theory.solver import CLIP, Gain, Solver
from tokencredit.theory.statement import Check, Statement

SOLVED = 1e-6
"""Of a success probability: the objective is flat at its maximum, so float64 finds the place to about the root of
2⁻⁵².
"""
BETA = 1.5
PRACTICE = 0.04
"""β of the GRPO paper."""
ITERATIONS, MIRRORED = 6, 3


def logit(p: float) -> float:
    return log(p / (1 - p))


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x > -700 else 0.0


def whitened(p: float, eps: float = 0.0) -> float:
    """Δ of mean and std normalisation; infinite where the policy is certain."""
    return 1 / sqrt(p * (1 - p) + eps) if p * (1 - p) + eps > 0 else inf


def step(p: float, ref: float, beta: float = BETA, gain: Gain = whitened) -> float:
    """One iteration of the recursion."""
    return sigmoid(logit(ref) + gain(p) / beta)


def clipped_step(p: float, ref: float, beta: float, clip: float = CLIP, gain: Gain = whitened) -> float:
    """One iteration with ratios of completions clipped to 1 ± clip.

    Raising p earns Δ (1 − p) until successes reach ratio 1 + clip, at p (1 + clip), and Δ p until failures reach 1 −
    clip, at p + clip (1 − p). With s still to earn, KL lets the log-odds go to logit p_ref + s/β; the policy stops at
    the first of these points.
    """
    stops = sorted([(p * (1 + clip), gain(p) * (1 - p)), (p + clip * (1 - p), gain(p) * p)])
    left, at = gain(p), 0.0
    for stop, earned in stops:
        at = max(at, sigmoid(logit(ref) + left / beta))
        if at <= stop:
            return at
        left, at = left - earned, stop
    return max(at, ref)


def check_recursion(claimed: Gain = whitened) -> Check:
    """Six iterations of the exact problem follow the recursion with the claimed Δ; with mean-only normalisation, with Δ
    = 1.
    """
    figures, conditions = {}, {}
    for name, gain, told in (
        ("mean and std", whitened, claimed),
        ("eps = 0.05", lambda p: whitened(p, 0.05), lambda p: whitened(p, 0.05)),
        ("mean only", lambda p: 1.0, lambda p: 1.0),
    ):
        solver = Solver()
        ref = p = solver.success
        solved = []
        for _ in range(ITERATIONS):
            solver.solve(gain, BETA)
            p = step(p, ref, BETA, told)
            solved.append((solver.success, p))
        figures |= {f"p after {n} solves, {name}": solved[n - 1][0] for n in (1, ITERATIONS)}
        figures[f"largest difference, {name}"] = max(abs(a - b) for a, b in solved)
        conditions[f"{name}: solved = recursion"] = figures[f"largest difference, {name}"] <= SOLVED
    conditions["mean only: at its fixed point after one solve"] = abs(solved[0][0] - solved[-1][0]) <= SOLVED
    stepper = Solver()
    for _ in range(ITERATIONS):
        stepper.one_step(whitened, BETA)
    return Check(
        {"p_ref": ref, **figures, f"p after {ITERATIONS} batches with one gradient step each": stepper.success},
        conditions,
    )


def fixed_points(ref: float, beta: float, grid: int = 4000) -> list[float]:
    """The p in (0, 1) with logit p = logit p_ref + Δ(p)/β, by sign changes on a grid of log-odds and bisection."""

    def excess(x: float) -> float:
        return x - logit(ref) - whitened(sigmoid(x)) / beta

    points = [-20 + 40 * i / grid for i in range(grid + 1)]
    found = []
    for low, high in pairwise(points):
        if excess(low) * excess(high) < 0:
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if excess(low) * excess(middle) > 0 else (low, middle)
            found.append(sigmoid(low))
    return found


def slope(p: float, beta: float) -> float:
    """h'(p*) at a fixed point: (2p − 1) / (2 β √(p (1 − p))), the recursion's factor of a small deviation."""
    return (2 * p - 1) / (2 * beta * sqrt(p * (1 - p)))


def least_beta(ref: float) -> float:
    """Below this β the recursion has no fixed point in (0, 1), and p goes to 1: the least of 1 / (√(p(1−p)) (logit p −
    logit p_ref)).
    """
    points = (sigmoid(logit(ref) + 20 * (i + 1) / 4000) for i in range(4000))
    return min(whitened(p) / (logit(p) - logit(ref)) for p in points)


def iterate(p: float, ref: float, beta: float, times: int, gain: Gain = whitened) -> float:
    for _ in range(times):
        p = step(p, ref, beta, gain)
    return p


def check_fixed_point(stable: Callable[[float], bool] = lambda s: abs(s) < 1) -> Check:
    """Every fixed point is above p_ref; the recursion comes to rest at one exactly if `stable` of its slope; a hard
    prompt cycles.
    """
    above, agrees = [], []
    for ref in (0.001, 0.01, 0.1, 0.3, 0.5, 0.9):
        for beta in (0.8, 1.5, 2.0, 3.0, 6.0):
            for p in fixed_points(ref, beta):
                above.append(p > ref)
                if abs(abs(slope(p, beta)) - 1) > 0.05:
                    away = iterate(p + 1e-6 * p * (1 - p), ref, beta, 300)
                    agrees.append((abs(away - p) < 1e-7 * p) == stable(slope(p, beta)))
    hard = [iterate(0.001, 0.001, 3.0, times) for times in (1000, 1001, 1002)]
    edge = least_beta(0.3)
    return Check(
        {
            "fixed points found": len(above),
            "p_ref = 0.001, beta = 3: fixed point": fixed_points(0.001, 3.0)[0],
            "its slope": slope(fixed_points(0.001, 3.0)[0], 3.0),
            "the cycle, low": min(hard),
            "the cycle, high": max(hard),
            "least beta with a fixed point below 1, p_ref = 0.3": edge,
            "the same, p_ref = 0.01": least_beta(0.01),
            f"p after one solve, p_ref = 0.01, beta = {PRACTICE}": step(0.01, 0.01, PRACTICE),
        },
        {
            "fixed points are above p_ref": all(above),
            "slope decides convergence": all(agrees),
            "a hard prompt cycles": abs(hard[0] - hard[2]) < 1e-9 and abs(hard[0] - hard[1]) > 0.5,
            "no fixed point below the least beta": (
                not fixed_points(0.3, 0.99 * edge) and len(fixed_points(0.3, 1.01 * edge)) == 2
            ),
            "there p goes to 1": iterate(0.3, 0.3, 0.99 * edge, 2000) > 1 - 1e-9,
        },
    )


def mirrored(p: float, ref: float, beta: float, mirror: float, gain: Gain = whitened) -> float:
    """One iteration with weight `mirror` on KL to the last iterate and β on KL to the reference."""
    return sigmoid((mirror * logit(p) + beta * logit(ref) + gain(p)) / (mirror + beta))


def check_mirror(claimed: Callable[..., float] = mirrored) -> Check:
    """The exact problem with both KLs follows the claimed recursion; it rests where it rests without the mirror, and
    from the claimed weight on it rests where it cycled.
    """
    figures, conditions = {}, {}
    for name, gain, beta, mirror in (
        ("mirror alone", whitened, 0.0, 2.0),
        ("both", whitened, 0.75, 0.75),
        ("both, mean only", lambda p: 1.0, 0.75, 0.75),
    ):
        solver = Solver()
        ref = p = solver.success
        apart = 0.0
        for _ in range(MIRRORED):
            solver.solve(gain, beta, mirror)
            p = claimed(p, ref, beta, mirror, gain)
            apart = max(apart, abs(solver.success - p))
        figures |= {f"p after {MIRRORED} solves, {name}": solver.success, f"largest difference, {name}": apart}
        conditions[f"{name}: solved = recursion"] = apart <= SOLVED
    alone = [0.3]
    for _ in range(10):
        alone.append(claimed(alone[-1], 0.3, 0.0, 4.0))
    rest = fixed_points(0.001, 3.0)[0]
    least = 3.0 * (-slope(rest, 3.0) - 1) / 2
    ends = {}
    for share in (0.95, 1.05):
        p = rest * (1 + 1e-6)
        for _ in range(2000):
            p = claimed(p, 0.001, 3.0, share * least)
        ends[share] = p
    return Check(
        {
            "p_ref": ref,
            **figures,
            "mirror alone, p_ref = 0.3, beta = 4: p after 3": alone[3],
            "p_ref = 0.001, beta = 3: least weight of the mirror that rests": least,
        },
        conditions
        | {
            "the mirror alone goes to 1": alone[-1] > 0.999 and all(a < b for a, b in pairwise(alone)),
            "both rest where the reference alone does": abs(ends[1.05] - rest) < 1e-9,
            "a lighter mirror cycles": abs(ends[0.95] - rest) > 1e-3,
        },
    )


def check_clip(clip: float = CLIP) -> Check:
    """The clipped problem's optimum from a reference and from a trained policy, at two β: no ascent finds a better one.

    At the smaller β Adam coasts past the optimum, where only the weak KL pulls back: its place is compared at the
    larger one.
    """
    figures, beaten, place = {}, [], []
    for beta in (BETA, PRACTICE):
        for trained in (False, True):
            solver = Solver()
            ref = solver.success
            if trained:
                solver.solve(whitened, 3.0)
            old = solver.chances().detach()
            before, p = solver.success, clipped_step(solver.success, ref, beta, clip)
            claimed = old * (solver.reward * p / before + (1 - solver.reward) * (1 - p) / (1 - before))
            solver.ascend(whitened, beta)
            values = [
                float(solver.objective(each.detach(), old, whitened, beta, CLIP))
                for each in (claimed, solver.chances())
            ]
            beaten.append(values[1] > values[0] + 1e-12)
            if beta == BETA:
                place.append(abs(solver.success - p))
            about = f"beta = {beta:g}, from p = {before:.3f}"
            figures |= {f"clipped: p, {about}": p, f"unclipped: p, {about}": step(before, ref, beta)}
    furthest = {p: clipped_step(p, p, PRACTICE, clip) for p in (0.25, 0.75)}
    return Check(
        figures
        | {f"clipped: p, beta = {PRACTICE}, from p_ref = {p}": each for p, each in furthest.items()}
        | {"largest distance of the ascent": max(place)},
        {
            "no ascent beats the claimed optimum": not any(beaten),
            "the ascent comes to the same place": max(place) <= 1e-3,
            "at small beta p stops where both sides are clipped": all(
                abs(each - max(p * (1 + CLIP), p + CLIP * (1 - p))) < 1e-9 for p, each in furthest.items()
            ),
        },
    )


def group_gain(p: float, size: int) -> float:
    """Δ of groups of `size`, std with ddof 1: √((G−1)/G) E √(p̂ (1 − p̂)) / (p (1 − p)), p̂ the group's success rate."""
    spread = sum(comb(size, k) * p**k * (1 - p) ** (size - k) * sqrt(k * (size - k)) / size for k in range(size + 1))
    return sqrt((size - 1) / size) * spread / (p * (1 - p))


def check_groups(claimed: Callable[[float, int], float] = group_gain) -> Check:
    """Δ of finite groups by GroupCenter over all 2^G outcomes; it is finite where the recursion's is not."""
    rates, sizes = (0.01, 0.1, 0.5, 0.9), (2, 4, 8)
    whole = {(p, size): _enumerated(p, size, GroupCenter(eps=0.0)) for p in rates for size in sizes}
    centred = {(p, size): _enumerated(p, size, GroupCenter(scale="none")) for p in rates for size in sizes}
    hard = [iterate(0.001, 0.001, 3.0, times, lambda p: group_gain(p, 8)) for times in (1000, 1001)]
    return Check(
        {
            "delta at p = 0.01, G = 8": group_gain(0.01, 8),
            "delta at p = 0.01, G = 64": group_gain(0.01, 64),
            "delta at p = 0.01, recursion": whitened(0.01),
            "limit p -> 0, G = 8": 7 / sqrt(8),
            "p_ref = 0.001, beta = 3, G = 8: p at rest": hard[0],
        },
        {
            "closed form = enumeration": all(
                abs(claimed(*key) - found) <= 1e-9 * found for key, found in whole.items()
            ),
            "mean only: (G - 1)/G": all(abs(found - (size - 1) / size) <= 1e-9 for (_, size), found in centred.items()),
            "below (G - 1)/G of the recursion's": all(
                found <= (n - 1) / n * whitened(p) * (1 + 1e-9) for (p, n), found in whole.items()
            ),
            "limit is (G - 1)/sqrt(G)": abs(claimed(1e-9, 8) - 7 / sqrt(8)) < 1e-6,
            "groups of 8 do not cycle": abs(hard[0] - hard[1]) < 1e-9,
        },
    )


def _enumerated(p: float, size: int, centre: GroupCenter) -> float:
    """E[A | r = 1] − E[A | r = 0] of the first rollout of a group, over all outcomes of the group."""
    reward = torch.tensor(list(product((0.0, 1.0), repeat=size)), dtype=torch.float64)
    wins = reward.sum(1)
    chance = p**wins * (1 - p) ** (size - wins)
    one_token = torch.ones(reward.numel(), 1, dtype=torch.bool)
    rollouts = Rollouts(reward.flatten(), torch.arange(len(reward)).repeat_interleave(size), one_token)
    credit = Chain(Outcome(), centre)(one_token.double(), rollouts).view_as(reward)[:, 0]
    won = reward[:, 0] > 0
    return float((chance * credit)[won].sum() / p - (chance * credit)[~won].sum() / (1 - p))


STATEMENTS = (
    Statement(
        "GRPO-recursion",
        "pₙ = σ(logit p_ref + 1 / (β √(pₙ₋₁(1 − pₙ₋₁) + ε)))",
        "true of the exact problem without clip",
        "GRPO's effective loss (arXiv:2503.06639)",
        "logit pₙ = logit p_ref + Δ(pₙ₋₁)/β, Δ the credit of a success less that of a failure; mean-only Δ = 1, at rest"
        " after one solve. One gradient step per batch is far from a solve",
        check_recursion,
    ),
    Statement(
        "GRPO-fixed-point",
        "The recursion converges to a fixed point p* > p_ref",
        "p* > p_ref true, convergence false in general",
        "GRPO's effective loss (arXiv:2503.06639)",
        "Every fixed point is above p_ref. It attracts if |2p* − 1| < 2β √(p*(1 − p*)); hard prompts can cycle; with ε"
        " = 0 and small β there is none below 1 and p goes to 1",
        check_fixed_point,
    ),
    Statement(
        "GRPO-mirror",
        "KL to the last policy, alone or beside KL to the reference, gives recursions of the same kind",
        "true of the exact problem without clip",
        "GRPO's effective loss (arXiv:2503.06639, later version: its abstract alone was read)",
        "With weights β₁ to the last policy, β₂ to the reference and λ = logit p − logit p_ref: λₙ = (β₁ λₙ₋₁ +"
        " Δ(pₙ₋₁)) / (β₁ + β₂). Alone (β₂ = 0) p goes to 1; beside the reference it rests at the same points, and one"
        " that was left for its slope h′ < −1 attracts for β₁ > β₂ (|h′| − 1)/2",
        check_mirror,
    ),
    Statement(
        "GRPO-clip",
        "The recursion describes GRPO with its clip",
        "false",
        "GRPO's effective loss (arXiv:2503.06639), with clip",
        "The clip stops p at p(1 + c) (successes) and p + c(1 − p) (failures), the first of these that the remaining"
        " gain cannot pass; at small β the failure rate falls by the factor 1 − c per batch while p < ½",
        check_clip,
    ),
    Statement(
        "GRPO-groups",
        "The recursion describes groups of G rollouts",
        "false, Δ is smaller and bounded",
        "GRPO's effective loss (arXiv:2503.06639)",
        "Δ_G(p) = √((G−1)/G) E√(p̂(1 − p̂)) / (p(1 − p)) ≤ (G−1)/G · 1/√(p(1 − p)), and → (G−1)/√G as p → 0 or 1;"
        " mean-only (G−1)/G",
        check_groups,
    ),
)
