"""Numbers made of sums over prompts, each with what every prompt contributes to its error, so that anything made of
them has an interval.

    se² = Σ_p (Σ_{i∈p} uᵢ)²          uᵢ = √((n−1)/n) (mean θ₍·₎ − θ₍ᵢ₎)          θ₍ᵢ₎ without unit i: the jackknife

Functions of several such numbers take their influences through the gradient. A prompt that occurs in several of them is
one cluster. Source: Efron and Stein (1981); Miller, arXiv:2411.00640, for the clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from tokencredit.stats import Estimate

FEW = 8
"""Prompts below which no interval is given."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A value; the influence [n] of units on it; and the prompt [n] (an integer) that each belongs to."""

    value: float
    influence: np.ndarray
    prompt: np.ndarray

    @cached_property
    def error(self) -> float:
        """Its standard error, clustered by prompt."""
        names, index = np.unique(self.prompt, return_inverse=True)
        return float(np.sqrt(np.square(np.bincount(index, self.influence, len(names))).sum()))

    @cached_property
    def carriers(self) -> float:
        """How many prompts carry the error: (Σ u²)² / Σ u⁴. With few the tails are heavy, and an interval may be too
        narrow.
        """
        names, index = np.unique(self.prompt, return_inverse=True)
        square = np.square(np.bincount(index, self.influence, len(names)))
        return float(square.sum() ** 2 / np.square(square).sum()) if square.any() else float(len(names))

    @property
    def resolved(self) -> bool:
        """Is it at least two standard errors from 0?"""
        return abs(self.value) > 2 * self.error

    def estimate(self, level: float = 0.95) -> Estimate:
        """With Student's interval at the number of prompts less one."""
        num = len(np.unique(self.prompt))
        half = float(stats.t.ppf((1 + level) / 2, num - 1)) * self.error
        return Estimate(self.value, self.value - half, self.value + half, num, level)


def jackknifed(statistic: Callable[..., np.ndarray], sums: Sequence[np.ndarray], prompt: np.ndarray) -> Measured:
    """statistic(*totals) of sums [n] over units, each left out once. ValueError with fewer than `FEW` prompts."""
    if (num := len(np.unique(prompt))) < FEW:
        raise ValueError(f"{num} prompts are too few for an interval: take at least {FEW}")
    totals, n = [float(x.sum()) for x in sums], len(prompt)
    left_out = statistic(*(total - x for total, x in zip(totals, sums)))
    return Measured(float(statistic(*totals)), np.sqrt((n - 1) / n) * (left_out.mean() - left_out), prompt)


def combined(function: Callable[[np.ndarray], float], parts: Sequence[Measured]) -> Measured:
    """function(values [K]) of several numbers, which may share prompts; its gradient by symmetric differences of 1e-3
    standard errors.
    """
    values = np.array([part.value for part in parts])
    influences = []
    for k, part in enumerate(parts):
        step = np.zeros_like(values)
        step[k] = 1e-3 * part.error
        slope = (function(values + step) - function(values - step)) / (2 * step[k]) if step[k] else 0.0
        influences.append(slope * part.influence)
    return Measured(
        float(function(values)), np.concatenate(influences), np.concatenate([part.prompt for part in parts])
    )


def mean(parts: Sequence[Measured]) -> Measured:
    """Their mean; exact, as it is linear."""
    return Measured(
        float(np.mean([part.value for part in parts])),
        np.concatenate([part.influence for part in parts]) / len(parts),
        np.concatenate([part.prompt for part in parts]),
    )


def ratio(above: Measured, below: Measured, level: float = 0.95) -> Estimate:
    """above / below with Fieller's interval; without end where `below` may be 0. Source: Fieller (1954)."""
    num = len(np.unique(np.concatenate([above.prompt, below.prompt])))
    t2 = float(stats.t.ppf((1 + level) / 2, num - 1)) ** 2
    both = combined(lambda x: x.sum(), [above, below])
    covariance = (both.error**2 - above.error**2 - below.error**2) / 2
    a, b, c = (
        below.value**2 - t2 * below.error**2,
        above.value * below.value - t2 * covariance,
        above.value**2 - t2 * above.error**2,
    )
    if a <= 0:
        return Estimate(above.value / below.value, -np.inf, np.inf, num, level)
    root = np.sqrt(max(b * b - a * c, 0.0))
    return Estimate(above.value / below.value, float((b - root) / a), float((b + root) / a), num, level)
