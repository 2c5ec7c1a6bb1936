"""When is entropy a good proxy? Calibration of a policy beside the agreement of its entropy with the effects, condition
by condition.

A condition is a policy (a checkpoint, a base of another world), a temperature, or a bin of difficulty. Hypothesis:
entropy is a good proxy when the model is calibrated, so that over conditions agreement falls as the calibration error
rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from scipy.stats import rankdata

from tokencredit.agreement import ranks
from tokencredit.agreement.calibration import calibration
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.lm.policy import Policy
from tokencredit.studies.correlation import measurement

AGREEMENT = ("spearman", "spearman_within", "captured", "captured_spread")
TOKEN_COMPLETIONS = 2  # completions of a prompt whose tokens are measured; all samples serve the calibration


def tokens_of(samples: int, rollouts: int, length: int) -> int:
    """Tokens that `measure` samples for a prompt whose completions are so long, at most."""
    return length * samples + min(samples, TOKEN_COMPLETIONS) * rollouts * length**2 // 2


@dataclass(frozen=True)
class Condition:
    """One row of the table: a policy at a temperature, on all prompts or on a bin of them."""

    label: str
    kind: str  # policy, temperature, difficulty
    model: str
    temperature: float


def measure(
    policy: Policy, rows: Sequence[dict], *, samples: int, rollouts: int, exact: bool, seed: int, first: int = 0
) -> dict[str, np.ndarray]:
    """Arrays: `correct` and `answer` [P,S] of the samples; of the tokens of the first two, `prompt`, `entropy`,
    `before_after`, `square` and `spread` [N]. From rollouts, `square` and `spread` (squared) are unbiased estimates and
    may be negative. Prompts are numbered from `first` on, as a part of more."""
    drawn = measurement.draw(policy, rows, samples, seed, first=first)
    names = [sorted({each["answer"] for each in group}) for group in drawn]
    answers = np.array([[known.index(each["answer"]) for each in group] for known, group in zip(names, drawn)])
    some = [group[:TOKEN_COMPLETIONS] for group in drawn]
    prompt = np.repeat(first + np.arange(len(rows)), [sum(len(each["ids"]) for each in group) for group in some])
    found = {
        "correct": np.array([[each["correct"] for each in group] for group in drawn]),
        "answer": answers,
        "prompt": prompt,
        "entropy": measurement.proxies(policy, rows, some, seed, ("entropy",))["entropy"],
    }
    if exact:
        effects = measurement.exact(policy, rows, some, alternatives=0)
        return found | {
            "before_after": effects["before_after"],
            "square": effects["before_after"] ** 2,
            "spread": effects["spread"] ** 2,
        }
    before = first * min(samples, TOKEN_COMPLETIONS)
    sampled = measurement.roll_out(policy, rows, some, rollouts, seed, first=before)[0].effects()
    return found | {
        "before_after": sampled.before_after,
        "square": sampled.square("before_after"),
        "spread": sampled.spread_squared,
    }


def figures(arrays: dict[str, np.ndarray], keep: np.ndarray, *, num: int, seed: int, top: float) -> dict[str, Any]:
    """Draws [1 + num] of calibration and agreement on the prompts `keep` [P]; {"draws", "curve", "expected_ece",
    "prompts", "tokens"}.
    """
    prompts = np.flatnonzero(keep)
    measured = calibration(
        [list(map(str, group)) for group in arrays["answer"][prompts]], arrays["correct"][prompts], num=num, seed=seed
    )
    token = keep[arrays["prompt"]] & np.isfinite(arrays["before_after"])
    # Clusters are numbered as for the calibration, so that draw r takes the same prompts in both.
    boot = _Numbered(arrays["prompt"][token], prompts, num, seed)
    entropy, size = arrays["entropy"][token], np.abs(arrays["before_after"][token])
    draws = {
        "ece": measured.ece,
        "overconfidence": measured.overconfidence,
        "success": measured.success,
        "entropy": boot.sums(entropy) / boot.sums(np.ones_like(entropy)),
        "spearman": ranks.spearman(entropy, size, boot.weights),
        "spearman_within": ranks.within_matrix(np.stack([entropy, size]), boot.index, boot.cluster_weights)[:, 0, 1],
        "captured": ranks.share_of_top(entropy, arrays["square"][token], top, boot.weights, per_token=False),
        "captured_spread": ranks.share_of_top(entropy, arrays["spread"][token], top, boot.weights, per_token=False),
    }
    return {
        "draws": draws,
        "curve": measured.curve,
        "expected_ece": measured.expected_ece,
        "prompts": len(prompts),
        "tokens": int(token.sum()),
        "bootstrap": boot,
    }


class _Numbered(Bootstrap):
    """A bootstrap whose clusters are given, so that prompts without tokens keep their number."""

    def __init__(self, cluster: np.ndarray, names: np.ndarray, num: int, seed: int) -> None:
        super().__init__(cluster, num, seed)
        self.__dict__.update(index=np.searchsorted(names, cluster), num_clusters=len(names))


def difficulty_bins(success: np.ndarray, num: int = 3) -> list[tuple[str, np.ndarray]]:
    """(label, [P] bool) of prompts by their success rate [P], in bins of about equal size; ties stay together, empty
    bins are left out.
    """
    edges = np.quantile(success, np.linspace(0, 1, num + 1)[1:-1])
    place = np.searchsorted(edges, success, side="left")
    found = [(place == k) for k in range(num)]
    return [
        (f"V₀ {success[member].min():.2f} to {success[member].max():.2f}", member) for member in found if member.any()
    ]


def across(rows: Sequence[dict[str, Any]], agreement: str) -> np.ndarray:
    """[1 + num]: Spearman over conditions between calibration error and an agreement, draw by draw; NaN with fewer than
    three conditions.

    Negative is what the hypothesis predicts. The conditions share prompts (and policies), so their number is not a
    number of independent cases: the interval says what other prompts would have given, for these same conditions.
    """
    ece, other = (np.stack([row["draws"][name] for row in rows]) for name in ("ece", agreement))
    if len(rows) < 3:
        return np.full(ece.shape[1], np.nan)
    a, b = (rankdata(each, axis=0) for each in (ece, other))
    a, b = a - a.mean(0), b - b.mean(0)
    scale = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), scale, out=np.full(len(scale), np.nan), where=scale > 0)


def permutation_p(rows: Sequence[dict[str, Any]], agreement: str, seed: int = 0) -> float:
    """Two-sided p of `across` when the agreements are dealt to the conditions at random: were there conditions enough
    to tell?

    All orders for up to 7 conditions, 5,000 random ones beyond. Conditions that share prompts or a base are not
    exchangeable: p is then no test of the hypothesis.
    """
    a, b = (rankdata([row["draws"][name][0] for row in rows]) for name in ("ece", agreement))
    a, b = a - a.mean(), b - b.mean()
    if len(rows) <= 7:
        orders = np.array(list(permutations(range(len(rows)))))
    else:
        rng = np.random.default_rng(seed)
        orders = np.stack([np.arange(len(rows)), *(rng.permutation(len(rows)) for _ in range(5000))])
    return float((np.abs(b[orders] @ a) >= abs(a @ b) - 1e-9).mean())
