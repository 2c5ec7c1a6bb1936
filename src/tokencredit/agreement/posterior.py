"""P(|effect| ≥ τ | rollouts): an empirical-Bayes posterior of every V₋, carried through the recursion.

    V₋ᵢ = Vᵢ  with probability q₀ (the choice did not matter),   else  V₋ᵢ = one of GRID with probabilities q
    successes at i ~ Binomial(nᵢ, V₋ᵢ)

From the end of a completion backwards a V₋ is drawn given V and the counts, then V_{i−1} follows: a particle filter
with a fixed lag. q₀ and q are fitted by expectation maximisation over such draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from tokencredit.agreement.ranks import spearman
from tokencredit.agreement.rollouts import AlternativeRollouts

GRID = np.concatenate([[0.0, 0.005, 0.02], np.linspace(0.05, 0.95, 19), [0.98, 0.995, 1.0]])
ITERATIONS = 12
LAG = 32  # tokens


@dataclass(frozen=True)
class Posterior:
    """Draws [D,N] of the effects; `prior` [1 + G] holds q₀ and q. NaN where an effect is undefined."""

    replace: np.ndarray
    before_after: np.ndarray
    value: np.ndarray
    prior: np.ndarray

    @classmethod
    def fit(cls, rollouts: AlternativeRollouts, draws: int = 200, seed: int = 0) -> Posterior:
        """Rewards must be 0 or 1."""
        seen = rollouts.rewards[np.isfinite(rollouts.rewards)]
        if not np.isin(seen, (0, 1)).all():
            raise ValueError("the posterior of a success probability needs rewards of 0 and 1")
        rng, prior = np.random.default_rng(seed), np.full(1 + len(GRID), 0.5 / len(GRID))
        prior[0] = 0.5
        for _ in range(ITERATIONS):
            prior = _sweep(rollouts, prior, max(32, draws // 4), rng)[2]
        v, other, _ = _sweep(rollouts, prior, draws, rng)
        return cls(v - other, (1 - rollouts.pi) * (v - other), other, prior)

    def size(self, estimand: str) -> np.ndarray:
        """[D,N]: |effect|."""
        return np.abs(getattr(self, estimand))

    def label(self, estimand: str, threshold: float) -> np.ndarray:
        """[N]: P(|effect| ≥ threshold | rollouts)."""
        return (self.size(estimand) >= threshold).mean(0)


def _likelihood(successes: np.ndarray, count: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.exp(special.xlogy(successes, p) + special.xlog1py(count - successes, -p))


def _sweep(
    rollouts: AlternativeRollouts, prior: np.ndarray, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(V after [D,N], V₋ [D,N], expected prior [1 + G]): particles go backwards through all completions at once.

    A particle's weight is the likelihood of the counts under the prior and its V; where the weights of a completion
    become uneven its particles are drawn again, with what they said about the last LAG tokens, so that rollouts at
    earlier tokens correct later ones.
    """
    row, column = rollouts.places
    shape = (len(rollouts.reward), int(column.max()) + 1)
    count, successes, pi = np.zeros(shape), np.zeros(shape), np.ones(shape)
    count[row, column], successes[row, column], pi[row, column] = (
        rollouts.count,
        np.nansum(rollouts.rewards, 1),
        rollouts.pi,
    )
    after, other, picked = np.full((3, draws, *shape), np.nan)
    value = np.repeat(rollouts.reward[None].astype(float), draws, 0)
    log_weight = np.zeros((draws, len(rollouts.reward)))
    for at in range(shape[1] - 1, -1, -1):
        here = np.flatnonzero(count[:, at] > 0)
        after[:, :, at] = value
        s, n, v = successes[here, at], count[here, at], value[:, here]
        slab = np.broadcast_to(_likelihood(s[:, None], n[:, None], GRID) * prior[1:], (draws, len(here), len(GRID)))
        odds = np.concatenate([(prior[0] * _likelihood(s, n, v))[..., None], slab], -1)
        evidence = odds.sum(-1)
        odds = odds / evidence[..., None]
        log_weight[:, here] += np.log(evidence)
        weight = _normalised(log_weight)
        picked[:, here, at] = pick = (odds.cumsum(-1) < rng.random((draws, len(here), 1))).sum(-1).clip(max=len(GRID))
        other[:, here, at] = np.where(pick == 0, v, GRID[np.maximum(pick - 1, 0)])
        value[:, here] = pi[here, at] * v + (1 - pi[here, at]) * other[:, here, at]
        uneven = np.flatnonzero((1 / (weight**2).sum(0) < draws / 2) | (at == 0))
        recent = slice(at, at + LAG)
        keep = _systematic(weight[:, uneven], rng)
        value[:, uneven] = np.take_along_axis(value[:, uneven], keep, 0)
        for array in (after, other, picked):
            array[:, uneven, recent] = np.take_along_axis(array[:, uneven, recent], keep[..., None], 0)
        log_weight[:, uneven] = 0
    expected = np.bincount(picked[np.isfinite(picked)].astype(int), minlength=len(prior)) / draws + 1e-2
    return after[:, row, column], other[:, row, column], expected / expected.sum()


def _normalised(log_weight: np.ndarray) -> np.ndarray:
    weight = np.exp(log_weight - log_weight.max(0))
    return weight / weight.sum(0)


def _systematic(weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[D,B] indices drawn in proportion to weight [D,B], each as evenly as possible."""
    draws = len(weight)
    points = (np.arange(draws)[:, None] + rng.random(weight.shape[1])) / draws
    edges = weight.cumsum(0)
    found = [np.searchsorted(edges[:, b], points[:, b] * edges[-1, b]) for b in range(weight.shape[1])]
    return np.stack(found, 1).clip(max=draws - 1) if found else np.zeros((draws, 0), int)


def ceiling_draws(
    rollouts: AlternativeRollouts, posterior: Posterior, estimand: str, tokens: np.ndarray, seed: int = 0, num: int = 50
) -> np.ndarray:
    """[num]: Spearman of |effect| with its own estimate at this budget, when a posterior draw is the truth: no proxy
    can do better.
    """
    rng, found, ones = np.random.default_rng(seed), [], np.ones((1, int(tokens.sum())))
    for draw in rng.integers(len(posterior.value), size=num):
        truth = np.nan_to_num(posterior.value[draw])
        estimate = redraw(rollouts, truth, rng)
        _, after = rollouts.recurse(estimate, rollouts.reward)
        size = np.abs(after - estimate) * (1 if estimand == "replace" else 1 - rollouts.pi)
        found.append(spearman(posterior.size(estimand)[draw][tokens], size[tokens], ones)[0])
    return np.array(found)


def redraw(rollouts: AlternativeRollouts, p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[N]: means of fresh rollouts, as many as there were, that succeed with probability p [N]; NaN where there were
    none.
    """
    count = rollouts.count
    return np.where(count > 0, rng.binomial(count, np.clip(p, 0, 1)) / np.maximum(count, 1), np.nan)
