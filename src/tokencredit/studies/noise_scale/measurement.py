"""The noise of a checkpoint's gradient: of its method as it is, and of leave-one-out credit, whose noise can be told
apart and predicted.

A method's credit may depend on the group in any way, so its own noise is known at the measured group size alone. The
split is that of leave-one-out credit with the same token weights: the same score gradients, an unbiased baseline,
predictable for any group size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch, credited
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.gradient_products import LIMIT, products
from tokencredit.dynamics.noise_scale import NoiseScale, noise_scale
from tokencredit.dynamics.update import loss_coefficients
from tokencredit.dynamics.variance_split import VarianceSplit, leave_one_out, leave_one_out_products
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts

PAIRS = 4
"""Rollouts of a prompt from which on the split can be told."""


@dataclass(frozen=True)
class NoiseMeasurement:
    """own: the method's noise scale over `prompts` (with dynamic sampling those of mixed groups); plain: that of
    leave-one-out credit over all that were drawn, and its split, None for groups of fewer than 4. `sketched`: numbers
    kept of a gradient, None for all."""

    own: NoiseScale
    prompts: int
    plain: NoiseScale | None
    split: VarianceSplit | None
    sketched: int | None


@dataclass(frozen=True, eq=False)
class Products:
    """What is kept of the gradients: own [P, P], products of the prompts' parts of the batch's gradient; plain [B, B],
    those of the rollouts with leave-one-out weights, None for groups of fewer than 4. `sketched` as of `Measurement`.
    """

    own: Tensor
    plain: Tensor | None
    sketched: int | None

    def arrays(self) -> dict[str, np.ndarray]:
        found = {"own": self.own.numpy(), "sketched": np.array(self.sketched or 0)}
        return found if self.plain is None else {**found, "plain": self.plain.numpy()}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Products:
        plain = torch.from_numpy(arrays["plain"]) if "plain" in arrays else None
        return cls(torch.from_numpy(arrays["own"]), plain, int(arrays["sketched"]) or None)


def measure(
    checkpoint: Checkpoint, method: Method, batch: Batch, *, limit: int = LIMIT, seed: int = 0
) -> NoiseMeasurement:
    """The noise scales of these rollouts. ValueError where no rollout has credit or fewer than 3 prompts count."""
    return measured(products_of(checkpoint, method, batch, limit=limit, seed=seed), batch.rollouts, seed=seed)


def products_of(
    checkpoint: Checkpoint,
    method: Method,
    batch: Batch,
    *,
    limit: int = LIMIT,
    seed: int = 0,
    progress: Callable[..., Any] | None = None,
) -> Products:
    """The products of gradients, which take the time: a backward pass each. ValueError as of `measure`."""
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
    options = {"limit": limit, "seed": seed, "heard": progress}
    split = int(torch.bincount(batch.rollouts.group_index).min()) >= PAIRS
    if progress:
        progress(0, total=num + len(batch) * split)
    own, sketched = products(
        part.passes(checkpoint), (_only(coefficient, index == p) for p in range(num)), num, **options
    )
    if not split:
        return Products(own, None, sketched)
    weight = method.aggregate.weights(batch.rollouts).double() * len(batch)
    mixed = batch.rollouts.informative
    rows = (_only(weight, torch.arange(len(batch)) == i) * mixed[i] for i in range(len(batch)))
    plain, sketched = products(batch.passes(checkpoint), rows, len(batch), **options)
    return Products(own, plain, sketched)


def measured(found: Products, rollouts: Rollouts, *, seed: int = 0) -> NoiseMeasurement:
    """The noise scales that products of gradients of these rollouts give."""
    num = len(found.own)
    # Prompts' gradients add up to the batch's, which is their mean: a prompt's own is that many times its part.
    own = noise_scale(found.own * num**2, seed=seed)
    if found.plain is None:
        return NoiseMeasurement(own, num, None, None, found.sketched)
    given = found.plain, rollouts.reward, rollouts.group_index
    plain = noise_scale(leave_one_out_products(*given), seed=seed)
    return NoiseMeasurement(own, num, plain, leave_one_out(*given), found.sketched)


def _only(weight: Tensor, rows: Tensor) -> Tensor:
    return weight * rows[:, None]
