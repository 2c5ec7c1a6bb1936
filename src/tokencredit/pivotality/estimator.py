"""Estimates of pivotality from counts of successes: the alternatives-only estimator, and two direct ones to compare it
with.

Every estimate is linear in independent proportions p̂ₕ (one per stratum of alternatives):  θ̂ = C p̂ + a R.  Hence

    Var θ̂ = C diag(p̂(1−p̂)/(n−1)) Cᵀ
                                                                             unbiased, joint over the tokens of a trace
    θ̂ − √Σ c²(p̂ − l)²,  θ̂ + √Σ c²(u − p̂)²  over Wilson's limits [l, u] of each p̂ₕ (u and l change places where c < 0)

The interval is the MOVER interval (Zou and Donner, Statistics in Medicine 27, 2008): unlike ± 1.96 standard errors it
keeps a width where every rollout failed. With rewards between 0 and 1 that are not binary, variances and intervals are
upper bounds. Leading dimensions [...] of the counts are repetitions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from tokencredit.pivotality.allocation import REST, Design
from tokencredit.pivotality.estimands import PathMap, spread_squared


@dataclass(frozen=True)
class Effect:
    """One estimand at every token [..., T]: value, standard error, interval. NaN where it is undefined."""

    value: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float = 0.95

    @property
    def at_most(self) -> np.ndarray:
        """[..., T]: the largest size that the interval allows."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def p_value(self) -> np.ndarray:
        """Two-sided, of no effect: small exactly where the interval leaves out 0."""
        toward = np.where(self.value > 0, self.value - self.low, self.high - self.value)
        z = stats.norm.ppf((1 + self.level) / 2) * np.abs(self.value) / np.where(toward > 0, toward, np.inf)
        return np.where(np.isnan(self.value), np.nan, 2 * stats.norm.sf(z))


@dataclass(frozen=True)
class TraceEstimate:
    """What is known about one trace. value, value_error [..., T+1]: V after 0 … T tokens; v_not [..., T].

    C_replace [T,H] is the linear map of the proportions; `covariance` makes the joint covariance of all tokens of it.
    """

    design: Design
    proportion: np.ndarray
    variance: np.ndarray
    value: np.ndarray
    value_error: np.ndarray
    v_not: np.ndarray
    replace: Effect
    before_after: Effect
    spread: np.ndarray
    spread_error: np.ndarray
    spread_squared: np.ndarray
    spread_missing: np.ndarray
    maps: dict[str, np.ndarray]

    def effect(self, estimand: str) -> Effect:
        """`replace` or `before_after`, by name."""
        return {"replace": self.replace, "before_after": self.before_after}[estimand]

    def covariance(self, estimand: str = "replace") -> np.ndarray:
        """[..., T, T] joint covariance of `replace`, `before_after` or, [..., T+1, T+1], of `value`."""
        C = self.maps[estimand]
        return (C * self.variance[..., None, :]) @ C.T


def wilson(proportion: np.ndarray, num: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's limits of a proportion."""
    z = stats.norm.ppf((1 + level) / 2)
    centre = (proportion + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * np.sqrt(proportion * (1 - proportion) / num + z * z / (4 * num * num))
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


def proportion_variance(proportion: np.ndarray, num: np.ndarray) -> np.ndarray:
    """p̂(1−p̂)/(n−1), unbiased for the variance of p̂; from a single rollout nothing is known and 1/4 is the bound."""
    return np.where(num > 1, proportion * (1 - proportion) / np.maximum(num - 1, 1), 0.25)


def estimate(design: Design, successes: np.ndarray, reward: float, level: float = 0.95) -> TraceEstimate:
    """The alternatives-only estimator: successes [..., H] (sums of rewards in [0, 1]) of a trace whose own reward is
    `reward`.
    """
    p = np.asarray(successes, float) / design.num
    variance = proportion_variance(p, design.num)
    sampled = design.defined
    pi, rest = np.where(sampled, design.pi, 1.0), np.where(sampled, design.rest, 0.0)
    path = PathMap.of(pi, rest)
    W = np.zeros((len(pi), len(design.num)))
    W[design.position, np.arange(len(design.num))] = design.weight
    v_not = np.where(sampled, p @ W.T, np.nan)
    limits = wilson(p, design.num, level)
    maps = {"value": path.B @ W, "replace": path.replace[0] @ W, "before_after": path.before_after[0] @ W}
    effects = {}
    for name, offset in (("replace", path.replace[1]), ("before_after", path.before_after[1])):
        wide = design.bias[1:] if name == "replace" else design.bias[1:] + design.bias[:-1]
        effects[name] = _effect(maps[name], p, variance, limits, offset * reward, sampled, wide, level)
    value = p @ maps["value"].T + path.b * reward
    spread = _spread(design, p, variance, W, maps["replace"], effects["replace"], v_not)
    return TraceEstimate(
        design,
        p,
        variance,
        value,
        np.sqrt(variance @ (maps["value"] ** 2).T),
        v_not,
        effects["replace"],
        effects["before_after"],
        *spread,
        maps,
    )


def _effect(
    C: np.ndarray,
    p: np.ndarray,
    variance: np.ndarray,
    limits: tuple[np.ndarray, np.ndarray],
    offset: np.ndarray,
    defined: np.ndarray,
    bias: np.ndarray,
    level: float,
) -> Effect:
    """θ̂ = C p̂ + offset with its standard error and interval; `bias` [T] widens the interval on both sides."""
    value = p @ C.T + offset
    below, above = (p - limits[0]) ** 2, (limits[1] - p) ** 2
    up, down = (np.maximum(C, 0) ** 2).T, (np.minimum(C, 0) ** 2).T
    low = value - np.sqrt(below @ up + above @ down) - bias
    high = value + np.sqrt(above @ up + below @ down) + bias
    found = value, np.sqrt(variance @ (C**2).T), np.clip(low, -1, 1), np.clip(high, -1, 1)
    return Effect(*(np.where(defined, x, np.nan) for x in found), level)


def _spread(
    design: Design,
    p: np.ndarray,
    variance: np.ndarray,
    W: np.ndarray,
    C: np.ndarray,
    replace: Effect,
    v_not: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(spread, its standard error, spread² unbiased, what that may miss) [..., T]: the others count as one, of their
    mean value.
    """
    pi, rest = design.pi, design.rest
    mean_squared = (p**2 - variance) @ W.T
    not_squared = v_not**2 - variance @ (W**2).T
    squared = spread_squared(pi, rest, replace.value**2 - replace.standard_error**2, mean_squared - not_squared)
    others = np.where(design.token == REST, 1.0, 0.0)
    missing = rest * ((p * (1 - p) + variance) * others @ W.T)
    slope = 2 * (pi * rest * np.nan_to_num(replace.value))[..., None] * C
    slope = slope + 2 * (rest[:, None] * W) * (p[..., None, :] - np.nan_to_num(v_not)[..., None])
    error = np.sqrt((slope**2 * variance[..., None, :]).sum(-1))
    value = np.sqrt(np.maximum(squared, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_error = np.where(value**2 > error, error / (2 * value), np.sqrt(error))
    keep = design.defined
    return tuple(np.where(keep, x, np.nan) for x in (value, spread_error, squared, missing))


def with_without(
    design: Design, successes: np.ndarray, on_path: np.ndarray, num_on_path: np.ndarray, level: float = 0.95
) -> Effect:
    """`replace` from independent rollouts with and without the token: on_path [..., T] successes of num_on_path [T]
    after each token.

    Source: Lin et al. (arXiv:2411.19943), which samples 64 of each. At the last token the reward is known and
    num_on_path may be infinite.
    """
    p, q = np.asarray(successes, float) / design.num, np.asarray(on_path, float) / num_on_path
    W = np.zeros((len(design.pi), len(design.num)))
    W[design.position, np.arange(len(design.num))] = design.weight
    both = np.concatenate([q, p], -1)
    num = np.concatenate([num_on_path, design.num])
    C = np.concatenate([np.eye(len(design.pi)), -W], 1)
    return _effect(
        C, both, proportion_variance(both, num), wilson(both, num, level), 0.0, design.defined, np.zeros(len(W)), level
    )


def before_after(successes: np.ndarray, num: np.ndarray, reward: float, level: float = 0.95) -> Effect:
    """`before_after` from rollouts after every prefix: successes [..., T] of num [T] after 0 … T−1 tokens; the last
    value is the reward.

    What PTS estimates (Abdin et al., arXiv:2412.08905, section 4.3).
    """
    p = np.asarray(successes, float) / num
    C = np.eye(len(num), k=1) - np.eye(len(num))
    offset = np.zeros(len(num))
    offset[-1] = reward
    everywhere = np.ones(len(num), bool)
    return _effect(
        C, p, proportion_variance(p, num), wilson(p, num, level), offset, everywhere, np.zeros(len(num)), level
    )


def discoveries(p_values: np.ndarray, rate: float = 0.05) -> np.ndarray:
    """Tokens found to have an effect, with at most `rate` false ones among them on average (Benjamini and Hochberg);
    undefined are none.
    """
    p = np.asarray(p_values, float)
    known = ~np.isnan(p)
    found = np.zeros(p.shape, bool)
    if known.any():
        found[known] = stats.false_discovery_control(p[known]) <= rate
    return found
