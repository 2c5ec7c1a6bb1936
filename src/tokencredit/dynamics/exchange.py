"""What entropy costs in reward: changes of both with their joint uncertainty, differences of methods, and ratios that
may be undefined.

    ρ = (dH − dH₀) / (dJ₀ − dJ)        entropy kept per reward given up, against a baseline on the same rollouts
    σ = dH / dJ                        entropy per reward gained, of one step; its length drops out

A ratio whose denominator may be 0 has no bounded interval: it is None here, never a number. Intervals are Fieller's
(1954).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tokencredit.dynamics.attribution import GOALS
from tokencredit.stats import Estimate

THIS, ANY = "this batch", "any batch"
STEP_KINDS = ("whole", "fresh", "equal")
NEAR = 0.02
"""Differences that are within this share of the baseline's changes, interval and all, are no difference to anybody."""


@dataclass(frozen=True, eq=False)
class Change:
    """dH and dJ of a step or of a difference of steps.

    goals   {goal: [P]}, whose mean is the change; each goal has prompts of its own
    update  [2, U], by prompt of the rollouts that the step is made of, gain held fixed: their sum is what depends on
            these rollouts

    Over `THIS` batch only the gradients of H and J are uncertain; over `ANY` batch of the policy the rollouts of the
    step are too.
    """

    goals: Mapping[str, np.ndarray]
    update: np.ndarray

    @classmethod
    def of(cls, found: Mapping[str, np.ndarray], step: str, baseline_length: float) -> Change:
        """From `counterfactual.consequences`: the "whole" step, its "fresh" part, or that part at "equal" length."""
        length = float(found["length"])
        factor = baseline_length / length if step == "equal" and length else 1.0
        rest = {goal: found[f"rest/{goal}"] if step == "whole" else 0.0 for goal in GOALS}
        shares = factor * np.stack([found[f"shares/{goal}"] for goal in GOALS])
        return cls({goal: factor * found[f"fresh/{goal}"] + rest[goal] for goal in GOALS}, shares)

    def __sub__(self, other: Change) -> Change:
        return Change({goal: self.goals[goal] - other.goals[goal] for goal in GOALS}, self.update - other.update)

    @property
    def value(self) -> np.ndarray:
        """[2]: dH, dJ."""
        return np.array([self.goals[goal].mean() for goal in GOALS])

    def same(self, other: Change) -> bool:
        return np.array_equal(self.update, other.update) and all(
            np.array_equal(self.goals[goal], other.goals[goal]) for goal in GOALS
        )

    def covariance(self, over: str) -> np.ndarray:
        """[2, 2]."""
        found = np.diag([self.goals[goal].var(ddof=1) / len(self.goals[goal]) for goal in GOALS])
        return found + self.update.shape[1] * np.cov(self.update) if over == ANY else found

    def num(self, over: str) -> int:
        """Prompts that the scarcest part of the evidence comes from."""
        return min(*(len(values) for values in self.goals.values()), self.update.shape[1] if over == ANY else 1 << 62)

    def estimate(self, goal: str, over: str = THIS, level: float = 0.95) -> Estimate:
        place = list(GOALS).index(goal)
        value = float(self.value[place])
        half = self._quantile(over, level) * float(self.covariance(over)[place, place]) ** 0.5
        return Estimate(value, value - half, value + half, self.num(over), level)

    def slope(self, over: str = THIS, level: float = 0.95) -> Estimate | None:
        """dH / dJ; None where dJ is not resolved."""
        top, bottom = self.value
        ends = fieller(top, bottom, self._quantile(over, level) ** 2 * self.covariance(over))
        return None if ends is None else Estimate(float(top / bottom), *ends, self.num(over), level)

    def sign(self, goal: str, over: str = THIS) -> int:
        """+1 or −1 where the interval excludes 0, else 0."""
        found = self.estimate(goal, over)
        return int(found.low > 0) - int(found.high < 0)

    def _quantile(self, over: str, level: float) -> float:
        return float(stats.t.ppf((1 + level) / 2, self.num(over) - 1))


def fieller(top: float, bottom: float, covariance: np.ndarray) -> tuple[float, float] | None:
    """Ends of {ρ: (top − ρ bottom)² ≤ (1, −ρ) C (1, −ρ)ᵀ}, C the covariance times the squared quantile. None where
    bottom may be 0.
    """
    a = bottom**2 - covariance[1, 1]
    if a <= 0:
        return None
    b, c = top * bottom - covariance[0, 1], top**2 - covariance[0, 0]
    root = max(b * b - a * c, 0.0) ** 0.5
    return float((b - root) / a), float((b + root) / a)


def rate(method: Change, baseline: Change, over: str = THIS) -> Estimate | None:
    """Entropy kept per reward given up against the baseline; None where the difference in reward is not resolved."""
    found = (method - baseline).slope(over)
    return None if found is None else Estimate(-found.value, -found.high, -found.low, found.num, found.level)


VERDICTS = {
    (1, 1): "more entropy and more reward",
    (1, 0): "more entropy, reward not told apart",
    (1, -1): "entropy kept, reward given up",
    (0, 1): "more reward, entropy not told apart",
    (0, 0): "not told apart",
    (0, -1): "less reward, entropy not told apart",
    (-1, 1): "reward gained, entropy spent",
    (-1, 0): "less entropy, reward not told apart",
    (-1, -1): "less entropy and less reward",
}


def verdict(method: Change, baseline: Change, over: str = THIS) -> str:
    """In which of the two a method differs from the baseline, as far as the intervals tell."""
    difference = method - baseline
    ends = {goal: difference.estimate(goal, over) for goal in GOALS}
    if all(
        max(abs(ends[goal].low), abs(ends[goal].high)) <= NEAR * abs(value)
        for goal, value in zip(GOALS, baseline.value)
    ):
        return f"within {100 * NEAR:.0f} % of the baseline"
    return VERDICTS[difference.sign("entropy", over), difference.sign("reward", over)]
