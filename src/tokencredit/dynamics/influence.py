"""Predicted changes of log-probabilities against the changes that real steps make, over a range of learning rates.

    R² = 1 − Σ (real − predicted)² / Σ (real − mean real)²

of the prediction as it stands: no slope and no offset is fitted, so that a prediction of the right shape and the wrong
size fails. Every part of a step is proportional to the learning rate, so the prediction at one rate is that at another,
scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.update import Update
from tokencredit.dynamics.vectors import moved
from tokencredit.stats import Estimate, jackknife

FACTORS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Learning rates, in units of the run's own."""


def real_changes(
    passes: Passes, update: Update, factors: Sequence[float] = FACTORS, heard: Callable[[int], Any] | None = None
) -> Tensor:
    """[R, B, T]: how the log-probs of some completions change when the step is made at each learning rate; the model is
    as it was after. `heard` is told of each.
    """
    before, vector = passes.values()[0], passes.kept(update.vector)
    found = []
    for factor in factors:
        with moved(passes.parameters, vector, factor):
            found.append(passes.values()[0] - before)
        if heard:
            heard(1)
    return torch.stack(found)


def r2(real: np.ndarray, predicted: np.ndarray) -> float:
    """R² of the prediction as it is; NaN where nothing changed."""
    spread = np.square(real - real.mean()).sum()
    return float(1 - np.square(real - predicted).sum() / spread) if spread > 0 else float("nan")


def slope(real: np.ndarray, predicted: np.ndarray) -> float:
    """Σ real · predicted / Σ predicted²: 1 where the prediction has the right size."""
    size = np.square(predicted).sum()
    return float((real * predicted).sum() / size) if size > 0 else float("nan")


def over_prompts(
    statistic: Callable[..., float], real: np.ndarray, predicted: np.ndarray, prompt: np.ndarray
) -> Estimate:
    """A statistic of (real [N], predicted [N]) with the jackknife's interval over prompts [N]."""
    return interval(
        statistic(real, predicted),
        [statistic(real[prompt != name], predicted[prompt != name]) for name in np.unique(prompt)],
    )


def r2_over_prompts(real: np.ndarray, predicted: np.ndarray, prompt: np.ndarray) -> Estimate:
    """R² with an interval that stays below 1: that of log(1 − R²)."""
    found = over_prompts(lambda *both: float(np.log(max(1 - r2(*both), 1e-300))), real, predicted, prompt)
    value, high, low = (float(-np.expm1(x)) for x in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.num, found.level)


def interval(
    value: float, left_out: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf), level: float = 0.95
) -> Estimate:
    """The jackknife's interval from the statistic without each prompt, cut to the range that the statistic has.

    NaN ends where the statistic is undefined without one of them, or where prompts are fewer than 3.
    """
    if len(left_out) < 3 or not np.isfinite([value, *left_out]).all():
        return Estimate(float(value), math.nan, math.nan, len(left_out), level)
    found = jackknife(value, left_out, level)
    return replace(found, low=max(found.low, within[0]), high=min(found.high, within[1]))
