"""Controls of a correlation with a noisy size: noise alone, permutation within completions, and the budget curve.

All of them take tokens [N] (True where the token counts), x [N] a proxy, and Spearman's correlation with the naive
size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokencredit.agreement.ranks import midranks, spearman_matrix
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.agreement.rollouts import AlternativeRollouts

DRAWS = 200


@dataclass(frozen=True)
class Null:
    """Where a statistic lies when there is nothing to find: mean and central 95 % of its draws."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> Null:
        draws = draws[np.isfinite(draws)]
        if not len(draws):
            return cls(np.nan, np.nan, np.nan)
        low, high = np.quantile(draws, [0.025, 0.975])
        return cls(float(draws.mean()), float(low), float(high))


def _standard_ranks(columns: np.ndarray) -> np.ndarray:
    """[K,N]: ranks with mean 0 and length 1, so that products are Spearman correlations; a constant column
    gives NaN.
    """
    ranks = np.stack([midranks(x, np.ones((1, len(x))))[0] for x in columns])
    ranks -= ranks.mean(1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    return ranks / np.where(length > 0, length, np.nan)


def noise_only(
    rollouts: AlternativeRollouts,
    proxies: Mapping[str, np.ndarray],
    estimands: Sequence[str],
    tokens: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, dict[str, np.ndarray]]:
    """{estimand: {proxy: [draws]}}: Spearman with the size of an estimate that is noise alone.

    Every alternative is given the value of what was written (V₋ᵢ := V̂ᵢ, no effect anywhere), as many rollouts are
    drawn again, and their errors go through the recursion: V̂₋ᵢ − V₋ᵢ in place of V̂₋ᵢ and 0 in place of R. Feeding the
    redrawn means themselves would not be free of effects: the recursion starts from R, while the V̂ᵢ jump wherever
    there was an effect.
    """
    rng = np.random.default_rng(seed)
    level = np.clip(rollouts.effects().after, 0, 1)
    ranks = _standard_ranks(np.stack([x[tokens] for x in proxies.values()]))
    found = {name: np.empty((draws, len(ranks))) for name in estimands}
    for draw in range(draws):
        rewards = np.where(np.isfinite(rollouts.rewards), rng.random(rollouts.rewards.shape) < level[:, None], np.nan)
        effects = rollouts.with_rewards(rewards).effects(level=level)
        for name in estimands:
            found[name][draw] = ranks @ _standard_ranks(effects.size(name)[None, tokens])[0]
    return {name: dict(zip(proxies, values.T)) for name, values in found.items()}


def permuted(
    trace: np.ndarray, proxies: Mapping[str, np.ndarray], size: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """{proxy: [draws]}: Spearman when the proxy's values are shuffled within each completion: what differences between
    them explain.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(trace, kind="stable")
    ranks, target = _standard_ranks(np.stack(list(proxies.values())))[:, order], _standard_ranks(size[None])[0][order]
    found = np.empty((draws, len(ranks)))
    for draw in range(draws):
        shuffled = np.lexsort((rng.random(len(trace)), trace[order]))
        found[draw] = ranks[:, shuffled] @ target
    return dict(zip(proxies, found.T))


@dataclass(frozen=True)
class BudgetCurve:
    """Spearman at thinned budgets: rollouts [K], draws {proxy: [K, 1 + num]}, and the fit's limit {proxy: [1 + num]}
    and c {proxy}.

    ρ(n) = ρ∞ / √(1 + c / n)
    """

    rollouts: list[int]
    draws: dict[str, np.ndarray]
    limit: dict[str, np.ndarray]
    constant: dict[str, float]


def budget_curve(
    rollouts: AlternativeRollouts,
    proxies: Mapping[str, np.ndarray],
    estimand: str,
    tokens: np.ndarray,
    bootstrap: Bootstrap,
    *,
    thinnings: int = 4,
    seed: int = 0,
) -> BudgetCurve:
    """The correlation at n, n/2, n/4 rollouts per token (as far as 4 are left), each thinner one averaged over random
    thinnings.
    """
    full = int(rollouts.count.max())
    columns = np.stack([x[tokens] for x in proxies.values()])
    budgets, draws = [], []
    for parts in (4, 2, 1):
        if full // parts < 4 and parts > 1:
            continue
        kept = rollouts.subsets(parts, 1 if parts == 1 else -(-thinnings // parts), seed)
        sizes = rollouts.effects(kept.reshape(-1, *rollouts.rewards.shape)).size(estimand)[:, tokens]
        each = [spearman_matrix(np.concatenate([columns, size[None]]), bootstrap.weights)[:, :-1, -1] for size in sizes]
        budgets.append(full // parts)
        draws.append(np.mean(each, 0))
    stacked = np.stack(draws)  # [K, 1 + num, proxies]
    by_proxy = {name: stacked[..., place] for place, name in enumerate(proxies)}
    fits = {name: fit_limit(np.array(budgets, float), values) for name, values in by_proxy.items()}
    limit, constant = (
        {name: fit[0] for name, fit in fits.items()},
        {name: float(fit[1][0]) for name, fit in fits.items()},
    )
    return BudgetCurve(budgets, by_proxy, limit, constant)


def fit_limit(budgets: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ρ∞ [R], c [R]) by least squares for values [K,R] at budgets [K]; c is searched on a grid, ρ∞ follows. With one
    budget c = 0.
    """
    grid = np.concatenate([[0.0], np.geomspace(0.05, 500, 120)]) if len(budgets) > 1 else np.zeros(1)
    shape = 1 / np.sqrt(1 + grid[:, None] / budgets)  # [G,K]
    limit = shape @ values / (shape**2).sum(1, keepdims=True)
    loss = ((values[None] - limit[:, None] * shape[:, :, None]) ** 2).sum(1)
    best = np.where(np.isfinite(loss), loss, np.inf).argmin(0)
    return limit[best, np.arange(values.shape[1])], grid[best]
