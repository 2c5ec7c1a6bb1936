"""Estimates with intervals. The unit of inference is the prompt (or the seed): tokens and rollouts of one prompt are
not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special, stats


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval (or another `level`), and how many independent units it rests on."""

    value: float
    low: float
    high: float
    num: int
    level: float = 0.95

    def within(self, least: float = -np.inf, most: float = np.inf) -> Estimate:
        """The same of what cannot lie outside of these: the part of the interval that is inside covers as often. Where
        there is no interval (infinite), there is none.
        """
        if np.isinf(self.low) and np.isinf(self.high):
            return self
        return replace(self, low=max(self.low, least), high=min(self.high, most))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at_k(correct: Sequence[int], samples: Sequence[int] | int, k: int) -> np.ndarray:
    """[P]: for every prompt the unbiased estimate of P(at least one of k samples is correct).

        1 − C(n − c, k) / C(n, k)        Source: Chen et al. (arXiv:2107.03374) eq. 1.

    ValueError where a prompt has fewer than k samples.
    """
    c, n = np.broadcast_arrays(np.asarray(correct, float), np.asarray(samples, float))
    if (n < k).any():
        raise ValueError(f"pass@{k} needs at least {k} samples of every prompt; there are as few as {int(n.min())}")
    # In logarithms: C(n - c, k) / C(n, k), which is 0 as soon as fewer than k samples are wrong.
    wrong = np.maximum(n - c, k)
    ratio = np.exp(
        special.gammaln(wrong + 1)
        - special.gammaln(wrong - k + 1)
        - special.gammaln(n + 1)
        + special.gammaln(n - k + 1)
    )
    return 1 - np.where(n - c >= k, ratio, 0.0)


def mean_of_units(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean over independent units (seeds, prompts) with Student's interval; one unit has no interval (infinite)."""
    x = np.asarray(values, float)
    if len(x) == 0:
        raise ValueError("an estimate needs at least one value")
    mean = float(x.mean())
    if len(x) == 1:
        return Estimate(mean, -np.inf, np.inf, 1, level)
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Estimate(mean, mean - half, mean + half, len(x), level)


def share_of_units(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean of per-prompt rates in [0, 1], clustered by prompt: Wilson's interval at the effective number of independent
    prompts.

        n* = p̄ (1 − p̄) / Var(p̄)         Var(p̄) from the spread between prompts

    Stays inside [0, 1] and keeps a width when every prompt agrees (n* = P then). Covers 95 % from about 64 prompts on;
    with fewer, or with fewer than about 5 prompts that differ from the rest, it may cover only 89 %.
    """
    x = np.asarray(values, float)
    if len(x) == 0:
        raise ValueError("an estimate needs at least one value")
    mean = float(x.mean())
    variance = float(x.var(ddof=1) / len(x)) if len(x) > 1 else 0.0
    effective = mean * (1 - mean) / variance if variance > 0 else float(len(x))
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * np.sqrt(mean * (1 - mean) / effective + z * z / (4 * effective**2))
    return Estimate(mean, max(0.0, float(centre - half)), min(1.0, float(centre + half)), len(x), level)


def paired_difference(treatment: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean of treatment − baseline over units that were measured under both (same seed, same prompts)."""
    if len(treatment) != len(baseline):
        raise ValueError(f"paired units: {len(treatment)} of one and {len(baseline)} of the other")
    return mean_of_units(np.asarray(treatment, float) - np.asarray(baseline, float), level)


def difference_of_units(treatment: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean of the treatment less mean of the baseline, over units that are not paired: Welch's interval.

        se² = s₁²/n₁ + s₂²/n₂        ν = se⁴ / (s₁⁴/(n₁²(n₁−1)) + s₂⁴/(n₂²(n₂−1)))          Source: Welch (1947)

    ValueError where one of them has fewer than two units.
    """
    both = [np.asarray(values, float) for values in (treatment, baseline)]
    if min(map(len, both)) < 2:
        raise ValueError(f"a difference needs two units of either side, there are {len(both[0])} and {len(both[1])}")
    gap = float(both[0].mean() - both[1].mean())
    parts = [float(x.var(ddof=1)) / len(x) for x in both]
    scale = sum(part**2 / (len(x) - 1) for part, x in zip(parts, both))
    half = float(stats.t.ppf((1 + level) / 2, sum(parts) ** 2 / scale)) * sum(parts) ** 0.5 if scale > 0 else 0.0
    return Estimate(gap, gap - half, gap + half, min(map(len, both)), level)


@dataclass(frozen=True)
class OverSeedsAndPrompts:
    """The mean over seeds of a statistic of prompts, all seeds measured on the same prompts: other seeds and other
    prompts would differ.

        Var = s² / S + b²        ν = Var² / ((s² / S)² / (S − 1) + b⁴ / (P − 1))

    s² is the variance over the S seeds, b² that of the mean over seeds when the P prompts are drawn again, ν
    Satterthwaite's degrees of freedom of Student's t. The noise of single samples is in both terms, so intervals are a
    little too wide rather than too narrow; with two seeds they may cover only 89 %. With one seed there is no s²: the
    interval is then over prompts alone, and nothing is tested.

    draws   [1 + R, S]: row 0 is the statistic of every seed, the others the same when prompts are drawn with
            replacement
    """

    draws: np.ndarray
    num_prompts: int

    @property
    def num_seeds(self) -> int:
        return int(self.draws.shape[1])

    @property
    def error(self) -> tuple[float, float]:
        """(standard error, degrees of freedom)."""
        prompts = float(self.draws[1:].mean(1).var()) if len(self.draws) > 1 else 0.0
        seeds = float(self.draws[0].var(ddof=1) / self.num_seeds) if self.num_seeds > 1 else 0.0
        scale = sum(
            part**2 / (num - 1) for part, num in ((seeds, self.num_seeds), (prompts, self.num_prompts)) if num > 1
        )
        return float(np.sqrt(seeds + prompts)), (seeds + prompts) ** 2 / scale if scale > 0 else np.inf

    def estimate(self, level: float = 0.95) -> Estimate:
        """The mean over seeds with its interval."""
        mean, (error, freedom) = float(self.draws[0].mean()), self.error
        half = float(stats.t.ppf((1 + level) / 2, freedom) * error)
        return Estimate(mean, mean - half, mean + half, self.num_seeds, level)

    def p_value(self) -> float:
        """Two-sided, of the mean being 0; 1 with a single seed."""
        mean, (error, freedom) = float(self.draws[0].mean()), self.error
        if self.num_seeds < 2 or mean == 0:
            return 1.0
        return float(2 * stats.t.sf(abs(mean) / error, freedom)) if error > 0 else 0.0


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], float],
    clusters: Sequence[int],
    *,
    num: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Percentile interval of statistic(rows), rows [n] int, when whole clusters (prompts) are drawn with replacement.

    Draws in which the statistic is undefined (NaN) are left out; one cluster has no interval (infinite).
    """
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    members = [np.flatnonzero(place == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    value = float(statistic(np.arange(len(clusters))))
    if len(names) < 2:
        return Estimate(value, -np.inf, np.inf, len(names), level)
    draws = np.array(
        [statistic(np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])) for _ in range(num)]
    )
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) if len(draws) else (-np.inf, np.inf)
    return Estimate(value, float(low), float(high), len(names), level)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values: family-wise error over several comparisons with one baseline."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def jackknife(value: float, left_out: Sequence[float], level: float = 0.95) -> Estimate:
    """A statistic with the interval that its values without one unit each give: Student's, at num − 1 degrees of
    freedom.

    se² = (n − 1)/n Σᵢ (θ₍ᵢ₎ − mean θ₍·₎)²          Source: Efron and Stein (1981).
    """
    x = np.asarray(left_out, float)
    half = _student(len(x), level) * float(np.sqrt(_jackknife_covariance(x[None])[0, 0]))
    return Estimate(float(value), float(value) - half, float(value) + half, len(x), level)


def jackknife_ratio(
    numerator: float, denominator: float, left_out: tuple[Sequence[float], Sequence[float]], level: float = 0.95
) -> Estimate:
    """A ratio of two quantities that cannot be negative, with Fieller's interval: every ρ for which numerator − ρ
    denominator may be 0.

    left_out   both statistics without one unit each

    Where the denominator may be 0 the ratio has no upper bound, and the interval says so (inf). An estimate of it that
    is below 0 counts as 0, and the value is inf as well. Source: Fieller (1954).
    """
    cov, n, d = _jackknife_covariance(np.asarray(left_out, float)), float(numerator), max(float(denominator), 0.0)
    num = len(left_out[0])
    cov = _student(num, level) ** 2 * cov
    a, b, c = d * d - cov[1, 1], n * d - cov[0, 1], n * n - cov[0, 0]
    root = np.sqrt(max(b * b - a * c, 0.0))
    # The ends solve a ρ² − 2 b ρ + c = 0; the lower one is c / (b + root) whatever the sign of a.
    low = c / (b + root) if c > 0 and b + root > 0 else 0.0
    high = (b + root) / a if a > 0 else np.inf
    return Estimate(n / d if d > 0 else np.inf, float(low), float(high), num, level)


def _student(num: int, level: float) -> float:
    if num < 2:
        raise ValueError(f"an interval needs at least two units, there is {num}")
    return float(stats.t.ppf((1 + level) / 2, num - 1))


def _jackknife_covariance(left_out: np.ndarray) -> np.ndarray:
    """[S, S] covariance of S statistics from their values [S, n] without one unit each."""
    gap = left_out - left_out.mean(1, keepdims=True)
    return np.asarray((left_out.shape[1] - 1) / left_out.shape[1] * gap @ gap.T)
