"""Rollouts of alternatives -> effects with their exact variances.

    V_{i−1} = πᵢ Vᵢ + (1 − πᵢ) V₋ᵢ,   V_T = R
                                      backward, exact; V₋ᵢ is the mean reward of rollouts that start with another token
    replaceᵢ = Vᵢ − V₋ᵢ        before_afterᵢ = Vᵢ − V_{i−1} = (1 − πᵢ) replaceᵢ
    spreadᵢ² = πᵢ Vᵢ² + (1 − πᵢ) Σᵥ wᵥ V(v)² − V_{i−1}²        w: π without yᵢ, renormalised

The map is linear, so the variance of every effect is exact given those of the V₋. Any subset of rollouts gives an
estimate of its own; two disjoint subsets give independent ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

ESTIMANDS = ("replace", "before_after", "spread")


@dataclass(frozen=True)
class Effects:
    """Arrays [..., N]. `replace` and `before_after` with their variances; `spread_squared` is unbiased and may be
    negative.
    """

    before: np.ndarray
    after: np.ndarray
    replace: np.ndarray
    replace_variance: np.ndarray
    before_after: np.ndarray
    before_after_variance: np.ndarray
    before_variance: np.ndarray
    spread_squared: np.ndarray

    def size(self, estimand: str) -> np.ndarray:
        """The naive size: |effect|, or √max(spread², 0). Noise makes it too large on average."""
        return np.sqrt(np.maximum(self.spread_squared, 0)) if estimand == "spread" else np.abs(getattr(self, estimand))

    def square(self, estimand: str) -> np.ndarray:
        """Unbiased for effect²: the product of two independent halves, averaged over every split into halves.

        effect̂² − Var̂(effect̂)
        """
        if estimand == "spread":
            return self.spread_squared
        return getattr(self, estimand) ** 2 - getattr(self, f"{estimand}_variance")


@dataclass(frozen=True)
class AlternativeRollouts:
    """The tokens of several completions, one after the other, and the rollouts that started with something else at
    each.

    trace [N]          number of the completion, ascending; tokens in their order
    pi [N]             sampler's probability of the token that was written
    reward [B]         of the completions, by number
    rewards [N,n]      of the rollouts; NaN where there are fewer than n. A token without alternative (π = 1), or
                       skipped, has none: its effect is undefined and V passes through it
    alternative [N,n]  token id that the rollout starts with
    share [N,n]        its probability among the alternatives, w
    """

    trace: np.ndarray
    pi: np.ndarray
    reward: np.ndarray
    rewards: np.ndarray
    alternative: np.ndarray
    share: np.ndarray

    def __post_init__(self) -> None:
        count = self.count
        if ((count > 0) & (count < 4)).any():
            raise ValueError(
                f"a token has {int(count[count > 0].min())} rollouts; halves with a variance each need at least 4, or"
                " none"
            )

    @property
    def count(self) -> np.ndarray:
        """[N]: rollouts at each token."""
        return np.isfinite(self.rewards).sum(1)

    @property
    def defined(self) -> np.ndarray:
        """[N]: tokens with an effect."""
        return self.count > 0

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(completion, position in it) of every token [N]."""
        first = np.flatnonzero(np.r_[True, np.diff(self.trace) > 0])
        row = np.cumsum(np.r_[0, np.diff(self.trace) > 0])
        return row, np.arange(len(self.trace)) - first[row]

    @cached_property
    def _pairs(self) -> np.ndarray:
        """[N,n,n]: 1 / w where two different rollouts start with the same alternative, else 0."""
        same = (self.alternative[:, :, None] == self.alternative[:, None, :]) & ~np.eye(
            self.rewards.shape[1], dtype=bool
        )
        return np.where(same, 1 / np.maximum(self.share, 1e-300)[:, :, None], 0.0)

    def recurse(self, alternatives: np.ndarray, reward: np.ndarray, power: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(before, after) [..., N] of  b = πᵏ a + (1 − π)ᵏ x  from x = alternatives [..., N] and a = reward [B] at the
        end; k is `power`: 2 carries variances. Where x is NaN nothing is added and b = a."""
        row, column = self.places
        grid = np.full((*alternatives.shape[:-1], len(self.reward), int(column.max()) + 1), np.nan)
        grid[..., row, column] = alternatives
        pi = np.ones(grid.shape[-2:])
        pi[row, column] = self.pi
        before, after = np.empty_like(grid), np.empty_like(grid)
        value = np.broadcast_to(reward, grid.shape[:-1])
        for at in range(grid.shape[-1] - 1, -1, -1):
            after[..., at] = value
            rest = 1 - pi[:, at]
            # Written so that equal values stay equal to the last bit: rounding errors have ranks too.
            mixed = (
                value + rest * (grid[..., at] - value)
                if power == 1
                else pi[:, at] ** power * value + rest**power * grid[..., at]
            )
            value = np.where(np.isnan(grid[..., at]), value, mixed)
            before[..., at] = value
        return before[..., row, column], after[..., row, column]

    def effects(self, keep: np.ndarray | None = None, level: np.ndarray | None = None) -> Effects:
        """Effects from all rollouts, or from those in keep [..., N, n]; NaN where a token has no alternative.

        With `level` [N] the rewards are noise about it: their errors alone go through the recursion, and nothing has an
        effect.
        """
        seen = np.isfinite(self.rewards) if keep is None else keep & np.isfinite(self.rewards)
        value = np.where(seen, np.nan_to_num(self.rewards), 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            count = seen.sum(-1)
            mean = value.sum(-1) / count
            variance = ((value**2).sum(-1) - count * mean**2) / (count - 1) / count
            before, after = (
                self.recurse(mean, self.reward)
                if level is None
                else (error + level for error in self.recurse(mean - level, np.zeros(len(self.reward))))
            )
            before_noise, after_noise = self.recurse(np.maximum(variance, 0), np.zeros(len(self.reward)), 2)
            rest = 1 - self.pi
            noise = after_noise + variance
            # Σ w V(v)² from pairs of rollouts with one alternative, about V: independent of these rollouts, so
            # unbiased, and much quieter.
            away = np.where(seen, value - after[..., None], 0.0)
            second = np.einsum("...ni,nij,...nj->...n", away, self._pairs, away, optimize=True) / (count * (count - 1))
            second = second + 2 * after * mean - after**2
            square = after**2 - after_noise
            spread = square - (before**2 - before_noise) + rest * (second - square)
        undefined = np.where(count > 0, 0.0, np.nan)
        return Effects(
            before,
            after,
            after - mean,
            noise + undefined,
            rest * (after - mean),
            rest**2 * noise + undefined,
            before_noise,
            spread + undefined,
        )

    def subsets(self, parts: int, num: int, seed: int) -> np.ndarray:
        """[num, parts, N, n]: `num` random partitions of every token's rollouts into `parts` of equal size (a remainder
        is left out).
        """
        rng = np.random.default_rng(seed)
        keys = np.where(np.isfinite(self.rewards), rng.random((num, *self.rewards.shape)), np.inf)
        rank = keys.argsort(-1).argsort(-1)
        size = self.count[:, None] // parts
        return np.stack([(rank >= part * size) & (rank < (part + 1) * size) for part in range(parts)], 1)

    def with_rewards(self, rewards: np.ndarray) -> AlternativeRollouts:
        """The same rollouts with other rewards [N,n], undefined at the same places."""
        other = replace(self, rewards=rewards)
        other.__dict__["_pairs"] = self._pairs  # it depends on the alternatives alone, and is large
        return other

    def at(self, tokens: np.ndarray) -> AlternativeRollouts:
        """Only some completions: `tokens` [N] is True at all tokens of those that stay."""
        traces = np.unique(self.trace[tokens])
        numbers = np.searchsorted(traces, self.trace[tokens])
        return replace(
            self,
            trace=numbers,
            pi=self.pi[tokens],
            reward=self.reward[traces],
            rewards=self.rewards[tokens],
            alternative=self.alternative[tokens],
            share=self.share[tokens],
        )
