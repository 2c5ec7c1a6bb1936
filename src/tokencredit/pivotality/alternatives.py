"""What else could have been said: counts per alternative, the alternative that differs most, and swapping a token
without re-sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tokencredit.lm.sampling import Trace
from tokencredit.pivotality.allocation import Design
from tokencredit.pivotality.estimator import Effect, proportion_variance, wilson
from tokencredit.pivotality.verdicts import Judge, judged


@dataclass(frozen=True)
class AlternativeTable:
    """Rollouts per alternative of one trace. position, token [K]; num, successes [K,2]: in two independent halves."""

    position: np.ndarray
    token: np.ndarray
    num: np.ndarray
    successes: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, float]]) -> AlternativeTable:
        """From rollouts (position, alternative, half, reward)."""
        names = sorted({(position, token) for position, token, _, _ in rows})
        at = {name: k for k, name in enumerate(names)}
        num, successes = np.zeros((2, len(names), 2))
        for position, token, half, reward in rows:
            num[at[position, token], half] += 1
            successes[at[position, token], half] += reward
        table = np.array(names, int).reshape(-1, 2)
        return cls(table[:, 0], table[:, 1], num.astype(int), successes)

    def at(self, position: int) -> np.ndarray:
        """Rows of a position."""
        return np.flatnonzero(self.position == position)


def max_alternative(
    table: AlternativeTable, value: np.ndarray, value_error: np.ndarray, level: float = 0.95
) -> tuple[Effect, np.ndarray]:
    """`max_alternative` [T] and the alternatives' token ids [T] (−1: no alternative was sampled often enough).

        Vᵢ − V(v*),  v* = argmax |Vᵢ − V̂(v)| on one half of the rollouts, V(v*) estimated on the other

    value, value_error [T+1] as in `Estimate`. Taking the largest of many noisy differences and reporting the same
    numbers would overstate it. Only alternatives with two rollouts in the second half and one in the first can be v*.
    """
    num = len(value) - 1
    found, error, low, high, token = *np.full((4, num), np.nan), np.full(num, -1)
    z = stats.norm.ppf((1 + level) / 2)
    for i in range(num):
        rows = table.at(i)
        rows = rows[(table.num[rows, 0] >= 1) & (table.num[rows, 1] >= 2)]
        if not len(rows):
            continue
        first = table.successes[rows, 0] / table.num[rows, 0]
        best = rows[np.argmax(np.abs(value[i + 1] - first))]
        n, p = table.num[best, 1], table.successes[best, 1] / table.num[best, 1]
        l, u = wilson(p, n, level)
        found[i], token[i] = value[i + 1] - p, table.token[best]
        error[i] = np.sqrt(value_error[i + 1] ** 2 + proportion_variance(p, n))
        low[i] = found[i] - np.hypot(z * value_error[i + 1], u - p)
        high[i] = found[i] + np.hypot(z * value_error[i + 1], p - l)
    return Effect(found, error, np.clip(low, -1, 1), np.clip(high, -1, 1), level), token


def substitute(
    k: int,
    trace: Trace,
    reward: float,
    design: Design,
    drawn: Sequence[tuple[int, int]],
    judge: Judge,
    ends: Sequence[int],
    level: float = 0.95,
) -> Effect:
    """`substitute` [T] of trace k: its reward minus the mean reward with the token swapped and everything written after
    it kept.

    drawn   (stratum, token) of every alternative that a stage drew. An end token ends the completion there; a
            completion whose last token was the end token and is swapped counts as truncated. Nothing is sampled: the
            standard error is that of the draws alone.
    """
    totals: dict[int, list[float]] = {}
    known: dict[tuple[int, int], float] = {}
    for h, token in drawn:
        i = int(design.position[h])
        if (i, token) not in known:
            ids = trace.completion[:i] + (token,) + (() if token in ends else trace.completion[i + 1 :])
            known[i, token] = judged(judge, k, ids, ids[-1] not in ends)[0]
        totals.setdefault(h, []).append(known[i, token])
    num = len(trace.completion)
    mean, var, low, high = np.zeros((4, num))
    for h, values in totals.items():
        i, w, p, n = design.position[h], design.weight[h], float(np.mean(values)), len(values)
        mean[i] += w * p
        if design.token[h] < 0:  # a stratum of one token has one reward, known without error
            l, u = wilson(p, n, level)
            var[i], low[i], high[i] = w * w * proportion_variance(p, n), w * (p - l), w * (u - p)
    effect = reward - mean, np.sqrt(var), reward - mean - high, reward - mean + low
    return Effect(*(np.where(design.defined, x, np.nan) for x in effect), level)
