"""Bias and variance of a gradient estimator, from products of the prompts' gradients that meet no noise of their own.

x is the gradient that one prompt with its group of rollouts gives, μ = E x; μ₀ that of the unweighted estimator, τ of
one that is known to be unbiased for the policy gradient; all three are taken of the same rollouts:

    |μ|²      mean of x_p · x_q over different prompts p ≠ q           tr Cov = E|x|² − |μ|²
    ⟨μ, τ⟩    mean of x_p · y_q over p ≠ q, y the estimator of τ       ⟨μ, μ₀⟩ likewise
    between prompts   mean of x_p · x′_p − |μ|², x and x′ two groups of the same prompt; the rest of tr Cov is within
                      prompts

Each is unbiased (U-statistics): what a prompt's gradient is compared with was estimated on the other prompts. A plain
squared norm of a mean, or a dot product of two means of one batch, would carry a tr Cov / n. Ratios are taken last;
noise that two estimators share cancels in them. Every statistic is an array [1 + N]: its value, then without one of the
N prompts each; arithmetic on whole arrays is then its own jackknife (Efron and Stein 1981).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tokencredit.stats import Estimate, jackknife, jackknife_ratio

LEVEL = 0.95
UNRESOLVED = Estimate(np.nan, np.nan, np.nan, 0)
POSITIVE = frozenset({"length", "ess_variance", "efficiency", "efficiency_ratio"})
COMPARED = frozenset({"cosine", "angle", "length", "ess_variance", "ess", "efficiency_ratio"})
ACCURATE = frozenset({"mse", "ess", "efficiency", "efficiency_ratio"})
DIRECTED = COMPARED | ACCURATE | {"truth_cosine", "truth_angle"}


@dataclass(frozen=True)
class GradientMoments:
    """What the figures of one method are made of, [1 + N] each.

    second       E|x|²            signal       |μ|²             pair         E x · x′
    with_base    ⟨μ, μ₀⟩          with_truth   ⟨μ, τ⟩           truth        |τ|²
    credited     tokens of a group with any weight               tokens_apart E Σₜ |xₜ|², xₜ the term of one token
    """

    second: np.ndarray
    signal: np.ndarray
    pair: np.ndarray
    with_base: np.ndarray
    with_truth: np.ndarray
    truth: np.ndarray
    credited: np.ndarray
    tokens_apart: np.ndarray

    @property
    def noise(self) -> np.ndarray:
        """tr Cov of one prompt's gradient."""
        return self.second - self.signal

    @classmethod
    def of(cls, table: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> GradientMoments:
        """From the products per prompt [N] that `variance_gradients` makes, of the method and of τ's estimator."""
        return cls(
            second=mean(table["square"]),
            signal=_signal(table),
            pair=mean(table["pair"]),
            with_base=_pairs(table["base_own"], table["base_sum"], table["sum_base"]),
            with_truth=_pairs(table["truth_own"], table["truth_sum"], table["sum_truth"]),
            truth=_signal(truth),
            credited=mean(table["credited"]),
            tokens_apart=mean(table["tokens_apart"]),
        )


def mean(values: np.ndarray) -> np.ndarray:
    """[1 + N]: the mean, and without one each."""
    return np.concatenate([[values.mean()], (values.sum() - values) / (len(values) - 1)])


def _signal(table: Mapping[str, np.ndarray]) -> np.ndarray:
    own = (table["square"] + table["pair"]) / 2  # |x̄|² of the mean of two groups
    return _pairs(own, table["sum"], table["sum"])


def _pairs(own: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Mean of a_p · b_q over p ≠ q, from a_p · b_p, a_p · Σb and b_p · Σa, [N] each."""
    n, total = len(own), left.sum()
    without = (total - left - right + 2 * own - own.sum()) / ((n - 1) * (n - 2))
    return np.concatenate([[(total - own.sum()) / (n * (n - 1))], without])


def interval(statistic: np.ndarray, log: bool = False) -> Estimate:
    """Jackknife interval of a statistic [1 + N]; on the logarithm where asked.

    Where it is not defined for the whole sample, or without one of its members, it is not resolved: NaN.
    """
    with np.errstate(all="ignore"):
        x = np.log(statistic) if log else statistic
    if not np.isfinite(x).all():
        return UNRESOLVED
    found = jackknife(x[0], x[1:], LEVEL)
    ends = np.exp([found.low, found.high]) if log else (found.low, found.high)
    return Estimate(float(statistic[0]), *map(float, ends), found.num, LEVEL)


def p_value(statistic: np.ndarray, null: float, log: bool = False) -> float:
    """Two-sided, of the statistic being `null`, by its jackknife error; 1 where it is not resolved or cannot vary."""
    found = interval(statistic / null if log else statistic - null, log)
    if np.isnan(found.value):
        return 1.0
    value, low, high = np.log([found.value, found.low, found.high]) if log else (found.value, found.low, found.high)
    error = (high - low) / 2 / stats.t.ppf((1 + LEVEL) / 2, found.num - 1)
    return float(2 * stats.t.sf(abs(value) / error, found.num - 1)) if error > 1e-9 else 1.0


def inverse(estimate: Estimate) -> Estimate:
    """1 / x; without bound where x may be 0 or below."""
    turn = [1 / x if x > 0 else np.inf for x in (estimate.value, estimate.high, estimate.low)]
    return UNRESOLVED if np.isnan(estimate.value) else Estimate(*turn, estimate.num, estimate.level)


def degrees(cosine: Estimate) -> Estimate:
    """The angle; cosines beyond 1, which noise can make, are 0 degrees."""
    value, low, high = (
        float(np.degrees(np.arccos(np.clip(x, -1, 1)))) for x in (cosine.value, cosine.high, cosine.low)
    )
    return Estimate(value, low, high, cosine.num, cosine.level)


def statistics_of(own: GradientMoments, base: GradientMoments, batch: int) -> dict[str, np.ndarray]:
    """Every statistic of one method, beside the unweighted one's moments; mean squared errors are those of a batch of
    `batch` prompts.

    relative_variance   ρ = tr Cov / |μ|²: prompts at which half of |batch gradient|² is noise
    between_prompts     share of tr Cov that is between prompts: no number of rollouts per prompt takes it away
    tokens_apart        E Σₜ|xₜ|² / E|x|²: 1 where the tokens' terms are orthogonal, below where they add up, above
                        where they cancel
    cosine, length      of μ against μ₀: of the angle, and the ratio of norms        truth_cosine   of μ against τ
    mse_raw             (|μ − τ|² + tr Cov / n) / |τ|², in the method's own units
    mse                 the least of it over lengths, as a learning rate absorbs them: 1 − cos² / (1 + ρ / n)
    ess_variance        ρ₀ / ρ: unweighted rollouts that one weighted rollout is worth, bias apart
    per_unweighted      n / n₀ where n₀ unweighted prompts have the `mse` of n weighted ones; not above 0: no number of
                        them has
    efficiency          ⟨μ, τ⟩² / |τ|² / E|x|² / credited tokens: squared projection on τ over the second moment, per
                        credited token
    efficiency_ratio    against the unweighted one's
    """
    with np.errstate(all="ignore"):
        length, base_length, truth = np.sqrt(own.signal), np.sqrt(base.signal), np.sqrt(own.truth)
        truth_cosine, base_cosine = own.with_truth / (length * truth), base.with_truth / (base_length * truth)
        rho, rho_base = own.noise / own.signal, base.noise / base.signal
        efficiency, base_efficiency = (x.with_truth**2 / own.truth / x.second / x.credited for x in (own, base))
        return {
            "relative_variance": rho,
            "between_prompts": (own.pair - own.signal) / own.noise,
            "tokens_apart": own.tokens_apart / own.second,
            "cosine": own.with_base / (length * base_length),
            "truth_cosine": truth_cosine,
            "length": length / base_length,
            "mse_raw": (own.signal - 2 * own.with_truth + own.truth + own.noise / batch) / own.truth,
            "mse": 1 - truth_cosine**2 / (1 + rho / batch),
            "ess_variance": rho_base / rho,
            "per_unweighted": batch / rho_base * (base_cosine**2 / truth_cosine**2 * (1 + rho / batch) - 1),
            "efficiency": efficiency,
            "efficiency_ratio": efficiency / base_efficiency,
        }


def figures_of(own: GradientMoments, base: GradientMoments, batch: int) -> dict[str, Estimate]:
    """The statistics with intervals: jackknife, on the logarithm for ratios above 0; Fieller's for the relative
    variance and the cosines.

    Also `angle` and `truth_angle` in degrees, and `ess`, n₀ / n: the effective sample size with bias, inf where no
    number of unweighted rollouts will do. What divides by a length or a cosine that may be 0 is not resolved: NaN.
    """
    found = {name: interval(x, log=name in POSITIVE) for name, x in statistics_of(own, base, batch).items()}
    found |= {name: cosine(*pair) for name, pair in _cosines(own, base).items()}
    found |= {"relative_variance": _ratio(own.noise, own.signal), "ess": inverse(found.pop("per_unweighted"))}
    found |= {"angle": degrees(found["cosine"]), "truth_angle": degrees(found["truth_cosine"])}
    lost = frozenset() if resolved(base) else COMPARED
    lost |= DIRECTED if not resolved(own) else frozenset() if found["truth_cosine"].low > 0 else ACCURATE
    return {name: UNRESOLVED if name in lost else estimate for name, estimate in found.items()}


def p_values_of(own: GradientMoments, base: GradientMoments, batch: int) -> dict[str, float]:
    """How likely such a difference from the unweighted gradient, or such an angle to the truth, would be
    without one.
    """
    found, known = statistics_of(own, base, batch), figures_of(own, base, batch)
    dot, lengths = _cosines(own, base)["truth_cosine"]
    turned = (dot - lengths) / lengths[0]
    tests = {
        "ess_variance": (found["ess_variance"], 1.0, True),
        "ess": (found["per_unweighted"], 1.0, False),
        "efficiency_ratio": (found["efficiency_ratio"], 1.0, True),
        "truth_angle": (turned, 0.0, False),
    }
    return {name: 1.0 if np.isnan(known[name].value) else p_value(*test) for name, test in tests.items()}


def exact_figures_of(own: GradientMoments, base: GradientMoments, batch: int) -> dict[str, float]:
    """The same numbers from moments that are known."""
    found = {name: float(x[0]) for name, x in statistics_of(own, base, batch).items()}
    least = found.pop("per_unweighted")
    # The arc cosine of 1 − 10⁻¹⁶ is 10⁻⁶ degrees.
    angle, truth_angle = (
        np.degrees(np.arccos(np.clip([found["cosine"], found["truth_cosine"]], -1, 1))).round(4).tolist()
    )
    return found | {"angle": angle, "truth_angle": truth_angle, "ess": 1 / least if least > 0 else np.inf}


def _cosines(own: GradientMoments, base: GradientMoments) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (dot product, product of lengths)}."""
    with np.errstate(all="ignore"):
        return {
            "cosine": (own.with_base, np.sqrt(own.signal * base.signal)),
            "truth_cosine": (own.with_truth, np.sqrt(own.signal * own.truth)),
        }


def cosine(dot: np.ndarray, lengths: np.ndarray) -> Estimate:
    """Fieller's interval of dot / lengths: a plain jackknife's is too short where the cosine is near 1. NaN where a
    length may be 0.
    """
    if not np.isfinite(lengths).all():
        return UNRESOLVED
    found = _ratio(dot + lengths, lengths)  # not negative
    return Estimate(found.value - 1, found.low - 1, found.high - 1, found.num, found.level)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> Estimate:
    return jackknife_ratio(top[0], bottom[0], (top[1:], bottom[1:]), LEVEL)


def resolved(own: GradientMoments) -> bool:
    """Whether |μ|² is above 0 by its interval: without that there is no direction to speak of."""
    return interval(own.signal).low > 0
