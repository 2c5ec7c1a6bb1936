"""Is a policy as successful as it is sure? Predicted against realised success, over the answers it samples.

    confidence of an answer = share of the prompt's other completions that give the same answer
    ECE = Σ_bins (n_b / n) |mean confidence − mean success|          overconfidence = mean confidence − mean success

Leaving the completion itself out makes the confidence an unbiased estimate of the answer's probability. Even a
calibrated policy has a positive ECE in a finite sample, so the ECE that it would have comes along: answers are called
right with the probability they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokencredit.agreement.resampling import Bootstrap
from tokencredit.stats import Estimate

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Draws [1 + num] of each figure; `curve` rows are (mean confidence, mean success, share of completions) of the
    bins that occur.
    """

    ece: np.ndarray
    overconfidence: np.ndarray
    success: np.ndarray
    expected_ece: float
    curve: list[tuple[float, float, float]]
    bootstrap: Bootstrap

    def figures(self) -> dict[str, Estimate]:
        return {name: self.bootstrap.estimate(getattr(self, name)) for name in ("ece", "overconfidence", "success")}


def confidences(answers: Sequence[Sequence[str]]) -> np.ndarray:
    """[P,S]: for each of S answers of P prompts, the share of the prompt's other answers that equal it."""
    found = [[(group.count(answer) - 1) / (len(group) - 1) for answer in group] for group in map(list, answers)]
    return np.array(found, float)


def calibration(
    answers: Sequence[Sequence[str]], correct: np.ndarray, *, num: int = 1000, seed: int = 0
) -> Calibration:
    """From S ≥ 2 sampled answers of every prompt and whether each is correct [P,S]."""
    confidence, correct = confidences(answers), np.asarray(correct, float)
    prompts, samples = confidence.shape
    bootstrap = Bootstrap(np.repeat(np.arange(prompts), samples), num, seed)
    x, y = confidence.ravel(), correct.ravel()
    sums = _bin_sums(x, y, bootstrap)
    rng = np.random.default_rng(seed)
    nulls = [_bin_sums(x, _as_if_calibrated(answers, rng), Bootstrap(bootstrap.cluster, 0)) for _ in range(50)]
    total = sums[:, 0].sum(1)
    curve = [(float(c / n), float(s / n), float(n / total[0])) for n, c, s in sums[0].T if n > 0]
    return Calibration(
        _ece(sums),
        (sums[:, 1].sum(1) - sums[:, 2].sum(1)) / total,
        sums[:, 2].sum(1) / total,
        float(np.mean([_ece(null)[0] for null in nulls])),
        curve,
        bootstrap,
    )


def _bin_sums(confidence: np.ndarray, correct: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """[1 + num, 3, BINS]: count, confidence and success per bin."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    one = np.eye(BINS)[place]
    return bootstrap.sums(np.stack([one, one * confidence[:, None], one * correct[:, None]], 1))


def _ece(sums: np.ndarray) -> np.ndarray:
    return np.abs(sums[:, 1] - sums[:, 2]).sum(1) / sums[:, 0].sum(1)


def _as_if_calibrated(answers: Sequence[Sequence[str]], rng: np.random.Generator) -> np.ndarray:
    """[P·S]: one of the prompt's answers, drawn as often as it occurs, is called the right one."""
    return np.concatenate(
        [
            np.array([answer == group[right] for answer in group], float)
            for group in answers
            for right in [int(rng.integers(len(group)))]
        ]
    )
