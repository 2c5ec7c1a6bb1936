"""What a token's effect can mean, each with its own name, and how it follows from the values of the alternatives.

    Vᵢ   success probability after i tokens            V₋ᵢ
                                            the same when token i is drawn from π with yᵢ left out, the rest re-sampled
    replace        Vᵢ − V₋ᵢ                            what this token changed against what could have stood there
    before_after   Vᵢ − Vᵢ₋₁ = (1 − πᵢ)(Vᵢ − V₋ᵢ)     what was learnt when it was sampled: Q − V
    spread         sd of V over the next token         how much the position decides, whatever was chosen
    max_alternative   Vᵢ − V(v*), v* the alternative that differs most
    substitute     R − E[R with yᵢ swapped and the written rest kept]      no re-sampling: a different question

All follow from the V₋ᵢ by one linear map, the backward recursion (Vₜ at the end of the trace is its verified reward R):

    Vᵢ₋₁ = πᵢ Vᵢ + (1 − πᵢ) V₋ᵢ        V = B V₋ + b R

On-policy with reward 0 or 1,  E Σᵢ (Vᵢ − Vᵢ₋₁)² = V₀ (1 − V₀): increments of a martingale that ends in the reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PathMap:
    """V [T+1] = B V₋ + b R along a trace of T tokens. Also the map of every linear estimand, as (A [T,T], a [T])."""

    B: np.ndarray
    b: np.ndarray

    @classmethod
    def of(cls, pi: np.ndarray, rest: np.ndarray) -> PathMap:
        """pi [T]: probability of each token; rest [T] = 1 − π, given apart because it may be far below the rounding of
        π.
        """
        num = len(pi)
        B, b = np.zeros((num + 1, num)), np.ones(num + 1)
        for i in range(num - 1, -1, -1):
            B[i], b[i] = pi[i] * B[i + 1], pi[i] * b[i + 1]
            B[i, i] = rest[i]
        return cls(B, b)

    @property
    def replace(self) -> tuple[np.ndarray, np.ndarray]:
        return self.B[1:] - np.eye(len(self.B) - 1), self.b[1:]

    @property
    def before_after(self) -> tuple[np.ndarray, np.ndarray]:
        return self.B[1:] - self.B[:-1], self.b[1:] - self.b[:-1]

    def linear(self, estimand: str) -> tuple[np.ndarray, np.ndarray]:
        """(A, a) of an estimand by its name: "replace" or "before_after"."""
        return {"replace": self.replace, "before_after": self.before_after}[estimand]

    def values(self, v_not: np.ndarray, reward: float) -> np.ndarray:
        """V [..., T+1] from V₋ [..., T]; what stands at a token without alternatives is not used."""
        return np.nan_to_num(v_not) @ self.B.T + self.b * reward


def total_variance(v_start: float) -> float:
    """V₀ (1 − V₀): what the squared increments of on-policy traces sum to, on average."""
    return v_start * (1 - v_start)


def spread_squared(pi: np.ndarray, rest: np.ndarray, replace_squared: np.ndarray, between: np.ndarray) -> np.ndarray:
    """Var of V over the next token: π(1−π) (V − V₋)² + (1−π) Var_{v ≠ y} V(v)."""
    return pi * rest * replace_squared + rest * between
