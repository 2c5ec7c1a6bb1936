"""What is unbiased at any budget: second moments of effects from independent halves of the rollouts.

    U = effect̂² − Var̂(effect̂)           E[U] = effect²
    ρ(effect², x) = Cov(U, x) / (sd(x) √Cov(U_A, U_B))
                                                         U_A, U_B from disjoint halves, averaged over random partitions

The size of a noisy effect is not a noisy size: |effect̂| carries V(1 − V), π and the number of rollouts as hidden
variables, and any proxy that knows one of them correlates with it in a world without effects, at every budget. U does
not. When Cov(U_A, U_B) is not clearly a good part of Var(U), the effects' own variance is not resolved, there is
nothing to divide by, and the correlation is refused. Clearly above zero would not do: U has heavy tails, and a few
rollouts with large weights can be in numerator and denominator at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tokencredit.agreement.ranks import midranks
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.agreement.rollouts import AlternativeRollouts

PARTITIONS = 24
UNRESOLVED = "unresolved at this budget"
OWN = 0.25
"""Least share of Var(U) that has to be the effects' own, at its one-sided lower bound over prompts."""
NEEDED = {"spread": 16}
"""Fewest rollouts at a token. spread² is made of pairs of rollouts that start alike: in halves of 4 there are six at
most. In enumerated worlds 87 of 94 figures that pass with 8 rollouts hold the exact one, with 16 rollouts 283 of 284
(`benchmarks/spread_coverage.py`).
"""


@dataclass(frozen=True)
class Squares:
    """Unbiased squares of one estimand: `whole` [N] from all rollouts, `halves` [S,2,N] from S random partitions;
    `enough` where every token has the rollouts that this estimand needs.
    """

    whole: np.ndarray
    halves: np.ndarray
    enough: bool = True

    @classmethod
    def of(
        cls, rollouts: AlternativeRollouts, estimands: tuple[str, ...], seed: int = 0, partitions: int = PARTITIONS
    ) -> dict[str, Squares]:
        """One for each estimand, from the same partitions."""
        whole = rollouts.effects()
        split = [rollouts.effects(keep) for keep in rollouts.subsets(2, partitions, seed)]
        fewest = min(rollouts.count[rollouts.defined], default=0)
        return {
            name: cls(
                whole.square(name), np.stack([half.square(name) for half in split]), fewest >= NEEDED.get(name, 0)
            )
            for name in estimands
        }

    def at(self, tokens: np.ndarray) -> Squares:
        return replace(self, whole=self.whole[tokens], halves=self.halves[..., tokens])


def variance_draws(squares: Squares, bootstrap: Bootstrap) -> np.ndarray:
    """[1 + num]: Cov(U_A, U_B), the variance of effect² over tokens."""
    a, b = squares.halves[:, 0].T, squares.halves[:, 1].T
    sums = bootstrap.sums(np.stack([np.ones_like(a), a, b, a * b], 1))
    n = sums[:, 0]
    return (sums[:, 3] / n - sums[:, 1] * sums[:, 2] / n**2).mean(1)


def resolved(squares: Squares, bootstrap: Bootstrap, level: float = 0.95) -> bool:
    """Are there enough rollouts, and is Cov(U_A, U_B) clearly more than `OWN` of Var(U): at its one-sided lower bound
    over prompts?
    """
    share = own_share(squares, bootstrap)
    others = share[1:][np.isfinite(share[1:])]  # a draw of prompts in which nothing varies has no share
    return bool(
        squares.enough
        and share[0] > OWN
        and len(others) > level * bootstrap.num
        and np.quantile(others, 1 - level) > OWN
    )


def own_share(squares: Squares, bootstrap: Bootstrap) -> np.ndarray:
    """[1 + num]: Cov(U_A, U_B) / Var(U), the share of the variance of U that is the effects' own."""
    return variance_draws(squares, bootstrap) / _variance(squares.whole, bootstrap)


def corrected_draws(x: np.ndarray, squares: Squares, bootstrap: Bootstrap, *, ranks: bool = False) -> np.ndarray | None:
    """[1 + num]: the noise-corrected correlation of effect² with x [N] (or with its ranks); None where it is
    unresolved.

    A value above 1 is left as it is: it says how noisy the estimate still is.
    """
    if not resolved(squares, bootstrap):
        return None
    variance = variance_draws(squares, bootstrap)
    x = midranks(x, np.ones((1, len(x))))[0] if ranks else x
    x = (x - x.mean()) / (x.std() or np.nan)  # its scale drops out; centred sums are exact
    n, sx, sxx, su, sux = bootstrap.sums(np.stack([np.ones_like(x), x, x * x, squares.whole, squares.whole * x], 1)).T
    covariance, spread = sux / n - sx * su / n**2, sxx / n - (sx / n) ** 2
    with np.errstate(invalid="ignore"):
        return covariance / np.sqrt(spread * np.where(variance > 0, variance, np.nan))


def exact_draws(x: np.ndarray, effect: np.ndarray, bootstrap: Bootstrap, *, ranks: bool = False) -> np.ndarray:
    """[1 + num]: what `corrected_draws` estimates, where the effects [N] are known."""
    x = midranks(x, np.ones((1, len(x))))[0] if ranks else x
    x, u = x - x.mean(), effect**2 - (effect**2).mean()
    n, sx, su, sxx, suu, sxu = bootstrap.sums(np.stack([np.ones_like(x), x, u, x * x, u * u, x * u], 1)).T
    scale = (sxx / n - (sx / n) ** 2) * (suu / n - (su / n) ** 2)
    return (sxu / n - sx * su / n**2) / np.sqrt(np.where(scale > 0, scale, np.nan))


def reliability(
    rollouts: AlternativeRollouts, estimand: str, tokens: np.ndarray, bootstrap: Bootstrap
) -> dict[str, np.ndarray]:
    """Draws of two shares: how much of the variance over tokens is the effects' own and not the rollouts' noise.

    signed    1 − mean Var̂(effect̂) / Var(effect̂), of the signed effect (not for `spread`, which has no sign)
    squared   Cov(U_A, U_B) / Var(U), of its unbiased square
    """
    effects = rollouts.effects()
    squares = Squares.of(rollouts, (estimand,))[estimand].at(tokens)
    found = {"squared": own_share(squares, bootstrap)}
    if estimand != "spread":
        noise = getattr(effects, f"{estimand}_variance")[tokens]
        sums = bootstrap.sums(np.stack([np.ones_like(noise), noise], 1))
        found["signed"] = 1 - sums[:, 1] / sums[:, 0] / _variance(getattr(effects, estimand)[tokens], bootstrap)
    return found


def _variance(values: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    n, s, ss = bootstrap.sums(np.stack([np.ones_like(values), values, values**2], 1)).T
    return np.where(ss / n - (s / n) ** 2 > 0, ss / n - (s / n) ** 2, np.nan)


def budget_law(rollouts: AlternativeRollouts, reached: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Σᵢ before_after², V̂₀(1 − V̂₀)) per completion [B], both unbiased; on-policy their means agree: E Σ (Vᵢ −
    V_{i−1})² = V₀(1 − V₀).

    reached [N]   tokens that count (all, unless a completion was cut);  prompt [B]
                                                                                 completions of one prompt share V₀, so
                  V₀(1 − V₀) is taken from the rewards of its completions where it has two or more, NaN otherwise
    """
    square = np.nan_to_num(rollouts.effects().square("before_after")) * reached
    total = np.bincount(rollouts.trace, square, minlength=len(rollouts.reward))
    spread = np.full(len(rollouts.reward), np.nan)
    for name in np.unique(prompt):
        mine = prompt == name
        if mine.sum() > 1:
            spread[mine] = rollouts.reward[mine].var(ddof=1)
    return total, spread
