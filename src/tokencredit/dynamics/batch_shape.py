"""How to split a budget between prompts and rollouts: the least noisy gradient that it pays for.

A batch of P prompts with K rollouts each costs P (c_p + K c_r) and has the variance V(K) / P of `variance_split`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokencredit.dynamics.variance_split import VarianceSplit, loads
from tokencredit.stats import Estimate

NEAR = 1.05


@dataclass(frozen=True)
class Choice:
    """The batch with the least variance that a budget pays for.

    near     fewest and most rollouts of a prompt whose variance is within a twentieth of the least
    exact    the best number of rollouts if numbers need not be whole and the budget is large; inf where more are always
             better
    ignored  parts that were estimated below 0 and counted as 0 here
    """

    prompts: int
    group: int
    cost: float
    variance: Estimate
    near: tuple[int, int]
    exact: float
    ignored: tuple[str, ...]


def best_split(split: VarianceSplit, budget: float, *, cost_prompt: float = 0.0, cost_rollout: float = 1.0) -> Choice:
    """The whole numbers of prompts and rollouts with P (c_p + K c_r) ≤ budget that give the least variance; every K is
    tried.

    ValueError where the budget does not pay for one prompt.
    """
    _check(cost_prompt, cost_rollout)
    groups = np.arange(split.smallest, int((budget - cost_prompt) / cost_rollout + 1e-9) + 1)
    if not len(groups):
        least = cost_prompt + split.smallest * cost_rollout
        raise ValueError(
            f"a budget of {budget:g} does not pay for one prompt with {split.smallest} rollouts: that costs {least:g}"
        )
    prompts = np.floor(budget / (cost_prompt + groups * cost_rollout) + 1e-9).astype(int)
    variance = loads(groups) @ np.maximum(split.parts, 0) / prompts
    near, place = groups[variance <= variance.min() * NEAR], int(variance.argmin())
    p, k = int(prompts[place]), int(groups[place])
    ignored = tuple(name for name in ("between", "rollout", "pair") if getattr(split, name).value < 0)
    return Choice(
        p,
        k,
        p * (cost_prompt + k * cost_rollout),
        split.variance(p, k),
        (int(near.min()), int(near.max())),
        best_group(split, cost_prompt, cost_rollout),
        ignored,
    )


def best_group(split: VarianceSplit, cost_prompt: float, cost_rollout: float) -> float:
    """The K that minimises V(K)(c_p + K c_r), the price of a given variance when the budget is large; inf where more
    are always better.

        τ c_r = (α − β) c_p / K² + β (c_p + c_r) / (K − 1)²

    β = 0: K = √(α c_p / (τ c_r)). c_p = 0: K = 1 + √(β / τ). Parts below 0 count as 0; K is at least `split.smallest`.
    """
    _check(cost_prompt, cost_rollout)
    tau, alpha, beta = parts = np.maximum(split.parts, 0)
    if tau == 0:
        return np.inf if beta or alpha * cost_prompt else float(split.smallest)
    slope = tau * cost_rollout * np.array([1, -2, 1, 0, 0]) - (alpha - beta) * cost_prompt * np.array([0, 0, 1, -2, 1])
    slope[2] -= beta * (cost_prompt + cost_rollout)
    flat = [root.real for root in np.roots(slope) if abs(root.imag) < 1e-9 and root.real > split.smallest]
    return float(min([split.smallest, *flat], key=lambda k: loads(k) @ parts * (cost_prompt + k * cost_rollout)))


def _check(cost_prompt: float, cost_rollout: float) -> None:
    if not (cost_prompt >= 0 and cost_rollout > 0):
        raise ValueError(
            f"a rollout costs something and a prompt nothing or more, got {cost_rollout:g} and {cost_prompt:g}"
        )
