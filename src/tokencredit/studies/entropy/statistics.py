"""The sums of one measured update as numbers with errors: predictions, terms, true changes of every kind, slopes over
learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tokencredit.dynamics.measured import Measured, combined, jackknifed, mean, ratio
from tokencredit.dynamics.reweighting import linear_change, quadratic_change
from tokencredit.dynamics.to_go import FOLDS
from tokencredit.stats import Estimate
from tokencredit.studies.entropy.measure import BEST, Arrays

KINDS = ("same", "independent", "fresh")
ROUNDING = 0.05
"""Share of |ΔH| that rounding may make of it where it counts as resolved."""
OUTSIDE = 0.5
"""|quadratic| / |linear| from which a learning rate is outside the linear range."""


def change(entropy, length, entropy_before, length_before):
    return entropy / length - entropy_before / length_before


def odd_change(entropy, length, entropy_back, length_back):
    """(H(θ + ηv) − H(θ − ηv)) / 2."""
    return change(entropy, length, entropy_back, length_back) / 2


@dataclass(frozen=True, eq=False)
class Truth:
    """True changes of one kind at one rate: of the step, its odd half-difference, and the effective sample size of
    reweighted rollouts.
    """

    whole: Measured
    odd: Measured
    size: float | None = None


@dataclass(frozen=True, eq=False)
class UpdateStatistics:
    """The numbers of one update at its own learning rate; `factors` are the rates of the sweep as multiples of it."""

    arrays: Arrays
    factors: Sequence[float]

    def linear(self, baseline: str = BEST, part: str = "") -> Measured:
        """The linear prediction; part "batch_" of what this batch added to the step, without momentum and decay."""
        a = self.arrays
        slope = a[f"{part}direct"] + a[f"{part}path_{baseline}"]
        return jackknifed(linear_change, [*self._rest, slope, a[f"{part}length_{baseline}"]], a["prompt"])

    def term(self, name: str, baseline: str = BEST) -> Measured:
        """One term of the linear prediction: direct, path or length."""
        a = self.arrays
        if name == "length":
            return jackknifed(
                lambda s, n, longer: -s / n * longer / n, [*self._rest, a[f"length_{baseline}"]], a["prompt"]
            )
        column = a["direct"] if name == "direct" else a[f"path_{baseline}"]
        return jackknifed(lambda s, n, slope: slope / n, [*self._rest, column], a["prompt"])

    @cached_property
    def quadratic(self) -> Measured:
        a = self.arrays
        columns = [a["direct"] + a[f"path_{BEST}"], a[f"length_{BEST}"], a["bend_entropy"], a["bend_length"]]
        return jackknifed(quadratic_change, [*self._rest, *columns], a["prompt"])

    @cached_property
    def with_variates(self) -> Measured:
        """The linear prediction less what sums of ∇log π, plain, times entropy and times place, explain of it on other
        prompts.
        """
        a, plain = self.arrays, self.linear()
        fold, fitted = a["prompt"] % FOLDS, np.zeros(len(a["prompt"]))
        for k in range(FOLDS):
            coefficients = np.linalg.lstsq(
                a["variates"][fold != k], plain.influence[fold != k] * self._rest[1].sum(), rcond=None
            )[0]
            fitted[fold == k] = a["variates"][fold == k] @ coefficients
        slope = a["direct"] + a[f"path_{BEST}"] - fitted
        return jackknifed(linear_change, [*self._rest, slope, a[f"length_{BEST}"]], a["prompt"])

    @cached_property
    def own(self) -> Truth:
        """Fresh samples at the update's own rate."""
        return self._truth(self.arrays["fresh_own"][0], self.arrays["fresh_rest"])

    @cached_property
    def own_batch(self) -> Measured:
        """The odd half-difference of this batch's own part of the step, by fresh samples."""
        plus, minus = self.arrays["batch_fresh_own"][0]
        return jackknifed(odd_change, [*plus.T, *minus.T], self.arrays["prompt"])

    @cached_property
    def sweep(self) -> dict[str, list[Truth]]:
        """{kind: true changes at every factor}."""
        a = self.arrays
        reweighted = {
            kind: [
                self._truth(each, a[f"{kind}_rest"], size)
                for each, size in zip(a[f"{kind}_moved"], a[f"{kind}_size"][:, 0])
            ]
            for kind in KINDS[:2]
        }
        return reweighted | {"fresh": [self._truth(each, a["sweep_rest"]) for each in a["sweep"]]}

    def reach(self) -> Estimate:
        """Largest factor of the rate at which |quadratic| stays under `OUTSIDE` of |linear|; without end where it may
        be 0.
        """
        line, bend = (
            Measured(abs(m.value), np.sign(m.value) * m.influence, m.prompt) for m in (self.linear(), self.quadratic)
        )
        found = ratio(line, bend)
        low = found.low if np.isfinite(found.low) else _least(line, bend)
        return Estimate(OUTSIDE * found.value, OUTSIDE * low, OUTSIDE * found.high, found.num)

    def inside(self, floor: float) -> list[int]:
        """The factors at which the linear prediction is meant to hold: rounding resolved, curvature small."""
        top = OUTSIDE * abs(self.linear().value / self.quadratic.value)
        return [k for k, factor in enumerate(self.factors) if floor <= factor < top]

    def slope(self, kind: str, floor: float, odd: bool = True) -> tuple[Measured, float] | None:
        """(slope of log |ΔH| over log rate inside the range, R²); None with fewer than 3 rates there."""
        chosen = self.inside(floor)
        if len(chosen) < 3:
            return None
        x = np.log([self.factors[k] for k in chosen])
        parts = [self.sweep[kind][k].odd if odd else self.sweep[kind][k].whole for k in chosen]
        y = np.log(np.abs([part.value for part in parts]))
        centred = x - x.mean()
        fitted = combined(lambda values: float(centred @ np.log(np.abs(values)) / (centred @ centred)), parts)
        left = y - y.mean() - fitted.value * centred
        return fitted, float(1 - left @ left / np.square(y - y.mean()).sum())

    @property
    def _rest(self) -> list[np.ndarray]:
        return [self.arrays["rest_entropy"], self.arrays["rest_length"]]

    def _truth(self, pair: np.ndarray, rest: np.ndarray, size: float | None = None) -> Truth:
        plus, minus, prompt = pair[0], pair[1], self.arrays["prompt"][: len(rest)]
        return Truth(
            jackknifed(change, [*plus.T, *rest.T], prompt), jackknifed(odd_change, [*plus.T, *minus.T], prompt), size
        )


def _least(line: Measured, bend: Measured) -> float:
    """The smallest ratio that both intervals allow, where that of the ratio has no end."""
    low, high = line.estimate().low, max(abs(bend.estimate().low), abs(bend.estimate().high))
    return max(low, 0.0) / high


def relative_errors(updates: Sequence[UpdateStatistics], part: str = "") -> dict[str, Measured]:
    """Mean over updates of linear prediction less true odd change: "typical" over their `scale`, "own" over each one's
    own.
    """
    num, parts = len(updates), [*(u.linear(part=part) for u in updates), *_truths(updates, part)]
    return {
        "typical": combined(lambda x: float((x[:num] - x[num:]).mean()) / scale(x[num:]), parts),
        "own": combined(lambda x: float((x[:num] / x[num:] - 1).mean()), parts),
    }


def scale(truths: np.ndarray) -> float:
    """What errors are relative to: the root mean square true change, with the sign of their sum, so that + is too much
    of it.
    """
    return float(np.sign(truths.sum()) * np.sqrt(np.square(truths).mean()))


def _truths(updates: Sequence[UpdateStatistics], part: str) -> list[Measured]:
    return [u.own_batch if part else u.own.odd for u in updates]


def pooled_ratio(updates: Sequence[UpdateStatistics], part: str = "") -> Estimate:
    """Σ linear predictions / Σ true odd changes, with Fieller's interval."""
    return ratio(mean([u.linear(part=part) for u in updates]), mean(_truths(updates, part)))


def sub_errors(updates: Sequence[UpdateStatistics], column: int, part: str = "") -> list[np.ndarray]:
    """By update, the errors of the predictions of its sub-batches, over the `scale`."""
    truths = np.array([truth.value for truth in _truths(updates, part)])
    return [(u.arrays[f"{part}sub"][:, column] - truth) / scale(truths) for u, truth in zip(updates, truths)]


def theory(updates: Sequence[UpdateStatistics]) -> Mapping[str, np.ndarray]:
    """−η Cov(log π, πA) and −η Cov(log π, A) of every update, and what they are compared with."""
    cov = np.array([u.arrays["covariance"] * -float(u.arrays["lr"]) for u in updates])
    whole, batch = (
        np.array([t.value for t in ts]) for ts in ([u.own.odd for u in updates], [u.own_batch for u in updates])
    )
    return {"policy gradient": cov[:, 0], "natural gradient": cov[:, 1], "whole": whole, "batch": batch}
