"""How small a change of entropy the arithmetic can show: rounding of the moved parameters and of the passes, in float32
and in float64.

    ΔH(η) on rollouts at hand, reweighted, against its own expansion a η + b η², a and b in the finest precision that
    is looked at. At rates so small that nothing but rounding is left of the difference, its root mean square σ is the
    noise; rates with σ < 0.05 |a η| are resolved.

In float64 too, transformers' models compute norms, rotations and the attention's softmax in float32: better, not exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.reweighting import (
    PrefixTangents,
    at_rest,
    curvatures,
    linear_change,
    quadratic_change,
    second_derivatives,
    slopes,
)
from tokencredit.dynamics.to_go import Baseline
from tokencredit.dynamics.true_change import by_reweighting

DTYPES = {"float32": torch.float32, "float64": torch.float64}
FACTORS = tuple(10.0**k for k in np.arange(-7, 0.01, 0.5))
TINY = 1e-2
"""Multiples of the rate up to which the expansion of second order is exact next to rounding."""


@dataclass(frozen=True)
class Rounding:
    """ΔH at every factor of `FACTORS` [F]; the expansion's; and the noise of the rounding, in nats."""

    changes: np.ndarray
    expansion: np.ndarray
    noise: float


def expansion(
    checkpoint: Checkpoint, batch: Batch, baseline: Baseline, direction: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(a, b): first and second order of ΔH along a direction on these rollouts."""
    passes, mask = batch.passes(checkpoint), batch.rollouts.mask
    entropy = passes.values()[1]
    first = PrefixTangents(*passes.forward(direction))
    rest, moved = at_rest(entropy, mask), slopes(first, entropy, mask, baseline)
    bend = curvatures(first, second_derivatives(passes, direction), entropy, mask, baseline)
    slope, longer = (sum(getattr(part, name).sum() for part in moved.values()) for name in ("entropy", "length"))
    sums = [float(x) for x in (rest.entropy.sum(), rest.length.sum(), slope, longer)]
    return linear_change(*sums), quadratic_change(*sums, float(bend.entropy.sum()), float(bend.length.sum()))


def rounding(
    checkpoint: Checkpoint,
    batch: Batch,
    baseline: Baseline,
    direction: Mapping[str, Tensor],
    terms: tuple[float, float],
    factors: Sequence[float] = FACTORS,
) -> Rounding:
    """What the checkpoint's own precision makes of ΔH."""
    passes, mask = batch.passes(checkpoint), batch.rollouts.mask
    rest = passes.values()
    still = at_rest(rest[1], mask)
    before = float(still.entropy.sum() / still.length.sum())
    found = []
    for factor in factors:
        sums, _ = by_reweighting(passes, rest, mask, baseline, direction, factor)
        found.append(float(sums.entropy.sum() / sums.length.sum()) - before)
    x = np.array(factors)
    expected = terms[0] * x + terms[1] * x**2
    left = (np.array(found) - expected)[x <= TINY]
    return Rounding(np.array(found), expected, float(np.sqrt(np.square(left).mean())))
