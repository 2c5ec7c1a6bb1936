"""How much of a token's predicted change its own term makes, and how much comes from others.

    δ log π(t') = Σₜ C(t', t)          C(t', t) = −f s K(t', t) κₜ          own: C(t', t')

The covariance between log-probability and advantage stands for the change of entropy only in a tabular policy, where δ
log π(t) follows from A(t) alone: the diagonal of the kernel. Here its part is measured four ways, because tokens differ
by orders of magnitude:

    share       Σ own·total / Σ total²: of the squared change; the parts' shares add up to 1, one may exceed it and
                others be negative
    mass        Σ |own| / Σ |C|: of all that pushes, before it cancels
    token       mean over tokens of |own(t')| / Σₜ |C(t', t)|: for the token as such, whatever its size
    sign        how often own and total have the same sign

A prompt left out by the jackknife leaves as a receiver and as a sender; P and s stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from tokencredit.dynamics.influence import interval
from tokencredit.dynamics.kernel_pairs import SCOPES, Units
from tokencredit.stats import Estimate

EDGES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
"""Probabilities that part the tokens."""
RANGES = {"share": (-math.inf, math.inf), "correlation": (-1, 1), "rank_correlation": (-1, 1)} | dict.fromkeys(
    ("mass", "token", "sign", "tokens", "of_squared_change"), (0, 1)
)


@dataclass(frozen=True, eq=False)
class SharedChange:
    """The predicted change of N senders: parts {own, every scope: [N]}; by_prompt and, of |C|, mass [N, P], by the
    prompt that sends.
    """

    parts: dict[str, np.ndarray]
    by_prompt: np.ndarray
    mass: np.ndarray
    units: Units

    @classmethod
    def of(cls, contribution: Tensor, units: Units) -> SharedChange:
        """From C [N, N]."""
        c = contribution.numpy()
        parts = {"own": c.diagonal().copy()} | {scope: (c * inside).sum(1) for scope, inside in units.scopes().items()}
        if len(np.unique(units.row)) == len(units):
            del parts[SCOPES[0]]
        return cls(parts, c @ units.member, np.abs(c) @ units.member, units)

    @property
    def total(self) -> np.ndarray:
        return self.by_prompt.sum(1)

    def without(self, prompt: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """(parts, Σ |C|, which units are left) when a prompt neither receives nor sends."""
        left = self.units.member[:, prompt] == 0
        parts = {name: x[left] for name, x in self.parts.items()}
        parts[SCOPES[2]] = parts[SCOPES[2]] - self.by_prompt[left, prompt]
        return parts, self.mass[left].sum(1) - self.mass[left, prompt], left


def share_figures(
    change: SharedChange, credit: np.ndarray, probability: np.ndarray | None = None
) -> dict[str, Estimate]:
    """Every figure with its interval over prompts. credit [N] is −κ: what a tabular policy would follow; with
    `probability` [N] also the own share and the agreement of signs of the tokens between EDGES."""
    every = np.ones(len(credit), bool)
    whole = _figures(change.parts, change.mass.sum(1), credit, probability, every)
    left_out = []
    for prompt in range(change.by_prompt.shape[1]):
        parts, mass, left = change.without(prompt)
        left_out.append(_figures(parts, mass, credit, probability, left))
    return {
        name: interval(value, [each[name] for each in left_out], RANGES[name.split("/")[0]])
        for name, value in whole.items()
    }


def _figures(
    parts: dict[str, np.ndarray], mass: np.ndarray, credit: np.ndarray, probability: np.ndarray | None, left: np.ndarray
) -> dict:
    total, own = sum(parts.values()), parts["own"]
    found = {f"share/{name}": _ratio((x * total).sum(), (total**2).sum()) for name, x in parts.items()}
    found |= {
        "mass/own": _ratio(np.abs(own).sum(), mass.sum()),
        "token/own": _mean(np.abs(own)[mass > 0] / mass[mass > 0]),
        "sign/own": _mean(np.sign(own) == np.sign(total)),
        "correlation/own": _correlation(own, total),
        "rank_correlation/own": _correlation(rankdata(own), rankdata(total)) if len(own) else np.nan,
        "correlation/credit": _correlation(credit[left], total),
    }
    for low, high in pairwise(EDGES) if probability is not None else ():
        some = (probability[left] > low) & (probability[left] <= high) if low else probability[left] <= high
        found |= {
            f"tokens/{low:g}-{high:g}": _mean(some),
            f"of_squared_change/{low:g}-{high:g}": _ratio((total[some] ** 2).sum(), (total**2).sum()),
            f"share/own/{low:g}-{high:g}": _ratio((own * total)[some].sum(), (total[some] ** 2).sum()),
            f"sign/own/{low:g}-{high:g}": _mean((np.sign(own) == np.sign(total))[some]),
        }
    return found


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float("nan")


def _mean(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else float("nan")


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or not x.std() or not y.std():
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
