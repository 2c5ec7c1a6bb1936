"""The noise of a checkpoint's gradient: of its method as it is, and of leave-one-out credit, whose noise can be told
apart and predicted.

A method's credit may depend on the group in any way, so its own noise is known at the measured group size alone. The
split is that of leave-one-out credit with the same token weights: the same score gradients, an unbiased baseline,
predictable for any group size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch, credited
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.gradient_products import LIMIT, products
from tokencredit.dynamics.noise_scale import NoiseScale, noise_scale
from tokencredit.dynamics.update import loss_coefficients
from tokencredit.dynamics.variance_split import VarianceSplit, leave_one_out, leave_one_out_products
from tokencredit.method import Method

PAIRS = 4
"""Rollouts of a prompt from which on the split can be told."""


@dataclass(frozen=True)
class Measurement:
    """own: the method's noise scale over `prompts` (with dynamic sampling those of mixed groups); plain: that of
    leave-one-out credit over all that were drawn, and its split, None for groups of fewer than 4. `sketched`: numbers
    kept of a gradient, None for all."""

    own: NoiseScale
    prompts: int
    plain: NoiseScale | None
    split: VarianceSplit | None
    sketched: int | None


def measure(checkpoint: Checkpoint, method: Method, batch: Batch, *, limit: int = LIMIT, seed: int = 0) -> Measurement:
    """The noise scales of these rollouts. ValueError where no rollout has credit or fewer than 3 prompts count."""
    part = credited(method, batch)
    coefficient, _ = loss_coefficients(method, part)
    if not coefficient.any():
        raise ValueError(
            f"{method.name} gives no token of this batch any gradient: every group's rewards are equal. Draw more"
            " prompts, or larger groups"
        )
    if part.num_prompts < 3:
        raise ValueError(
            f"a noise scale with an interval needs at least 3 prompts, {part.num_prompts} count here: draw more"
        )
    index, num = part.rollouts.group_index, part.num_prompts
    gram, sketched = products(
        part.passes(checkpoint), (_only(coefficient, index == p) for p in range(num)), num, limit=limit, seed=seed
    )
    # Prompts' gradients add up to the batch's, which is their mean: a prompt's own is that many times its part.
    own = noise_scale(gram * num**2, seed=seed)
    sizes = torch.bincount(batch.rollouts.group_index)
    if int(sizes.min()) < PAIRS:
        return Measurement(own, num, None, None, sketched)
    weight = method.aggregate.weights(batch.rollouts).double() * len(batch)
    mixed = batch.rollouts.informative
    rows = (_only(weight, torch.arange(len(batch)) == i) * mixed[i] for i in range(len(batch)))
    gram, sketched = products(batch.passes(checkpoint), rows, len(batch), limit=limit, seed=seed)
    given = gram, batch.rollouts.reward, batch.rollouts.group_index
    return Measurement(
        own, num, noise_scale(leave_one_out_products(*given), seed=seed), leave_one_out(*given), sketched
    )


def _only(weight: Tensor, rows: Tensor) -> Tensor:
    return weight * rows[:, None]
