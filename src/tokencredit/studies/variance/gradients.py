"""The gradient that every group of rollouts gives under a weighting of its tokens, and the products that variance is
estimated from.

    x_g = −N Σ_{it∈g} κᵢₜ ∇log πᵢₜ          κ = ∂L/∂log π of the method's loss over the whole batch of N groups

so that the mean over groups is the batch's ascent direction. What a method takes from the whole batch (a denominator, a
threshold) stays as the batch has it. Groups g and g + N/2 belong to the same prompt.

Exact: one reverse pass per group and method, the gradients in a file where memory may not hold them. Sketched: every
token's derivative along K random directions u once, by forward mode, serves all weightings; products of x·u are
unbiased for products of x, those of norms with relative noise √(2/K). That is for the many methods of a model whose
gradients find no disk: a direction costs as much as one method's gradients, and more where completions share a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.gradient_matrix import Matrix, blank, blocks, places
from tokencredit.dynamics.update import coefficients_of
from tokencredit.lm.distribution import seed_of
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts

Gradients = Callable[[Tensor], Matrix]
"""κ [B, T] -> x [groups, D]: D parameters, or directions."""


def weights_of(method: Method, rollouts: Rollouts) -> Tensor:
    """κ [B, T] float64 of every rollout drawn: with dynamic sampling, groups of one outcome are dropped and have 0.

    All 0 where no group gives the method any gradient.
    """
    keep = rollouts.mixed if method.mixed_groups_only else torch.ones(len(rollouts), dtype=torch.bool)
    found = torch.zeros(rollouts.mask.shape, dtype=torch.float64)
    if keep.any():
        found[keep] = coefficients_of(method, rollouts.rows(keep))[0]
    return found


def exact_gradients(
    checkpoint: Checkpoint, batch: Batch, folder: Path | None = None, heard: Callable[[int], Any] | None = None
) -> Gradients:
    """x by reverse passes, one group at a time; `heard` is told of each. What memory may not hold is in files of
    `folder`, and without one refused.
    """
    groups = _groups(batch.rollouts)
    passes = [batch.take(rows).passes(checkpoint) for rows in groups]
    columns = places(passes[0].parameters)

    def gradients(weight: Tensor) -> Matrix:
        found = blank(passes[0], len(groups), "groups", folder=folder, device=torch.device("cpu"))
        for g, (rows, each) in enumerate(zip(groups, passes)):
            if weight[rows].any():
                for name, x in each.reverse(weight[rows]).items():
                    found[torch.tensor([g]), columns[name]] = x.flatten()[None].cpu().to(found.dtype) * -len(groups)
            if heard:
                heard(1)
        return found

    return gradients


def sketched_gradients(batch: Batch, derivatives: Tensor) -> Gradients:
    """x along the directions that `token_derivatives` [B, T, K] were taken along."""
    group, num, directions = batch.rollouts.group_index, batch.num_prompts, derivatives.shape[-1]

    def gradients(weight: Tensor) -> Tensor:
        rows = torch.einsum("bt,btk->bk", weight.float(), derivatives)
        return torch.zeros(num, directions).index_add_(0, group, rows) * (-num / directions**0.5)

    return gradients


def token_derivatives(checkpoint: Checkpoint, batch: Batch, directions: int, seed: int) -> Tensor:
    """[B, T, K] float32: ∇log π · u of every token, u with independent signs, from the seed."""
    passes = batch.passes(checkpoint)
    columns = []
    for k in range(directions):
        generator = torch.Generator().manual_seed(seed_of("direction", seed, k))
        signs = {
            name: torch.randint(0, 2, p.shape, generator=generator).float() * 2 - 1
            for name, p in passes.parameters.items()
        }
        columns.append(passes.forward(signs)[0].float())
    return torch.stack(columns, -1)


def num_parameters(checkpoint: Checkpoint) -> int:
    return sum(p.numel() for p in checkpoint.model.parameters() if p.requires_grad)


@dataclass(frozen=True, eq=False)
class Reference:
    """What every method is compared with on the same rollouts, [2N, D]: the unweighted gradient of every group, and
    τ's estimator.
    """

    base: Matrix
    truth: Matrix

    def products(self, x: Matrix) -> dict[str, np.ndarray]:
        """Per prompt [N], of the gradients x [2N, D] of its two groups: with each other, with themselves, with sums
        over all prompts; added up over blocks of parameters, in float64.
        """
        parts = (
            _products(*(each[:, columns].double() for each in (x, self.base, self.truth)))
            for columns in blocks(x.shape[1], 3 * len(x))
        )
        found = next(parts)
        for part in parts:
            found = {name: sums + part[name] for name, sums in found.items()}
        return {name: sums.numpy() for name, sums in found.items()}


def _products(x: Tensor, base: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """`Reference.products` of some columns."""
    one, two = x.unflatten(0, (2, -1))
    mean, dots = by_prompt(x), torch.linalg.vecdot
    found = {
        "square": (dots(one, one) + dots(two, two)) / 2,
        "pair": dots(one, two),
        "sum": mean @ mean.sum(0),
    }
    for name, other in (("base", by_prompt(base)), ("truth", by_prompt(truth))):
        found |= {
            f"{name}_own": dots(mean, other),
            f"{name}_sum": mean @ other.sum(0),
            f"sum_{name}": other @ mean.sum(0),
        }
    return found


def token_counts(weight: Tensor, rollouts: Rollouts) -> dict[str, np.ndarray]:
    """Per prompt [N], mean of its two groups: `credited`, tokens with weight κ, and `tokens_apart`, Σₜ|xₜ|² from
    `gradient_norm`.
    """
    group = rollouts.group_index
    num = int(group.max()) + 1
    rows = {
        "credited": (weight != 0).sum(1).double(),
        "tokens_apart": (num * weight * rollouts.score("gradient_norm")).square().sum(1),
    }
    sums = {name: torch.zeros(num, dtype=torch.float64).index_add_(0, group, each) for name, each in rows.items()}
    return {name: by_prompt(each).numpy() for name, each in sums.items()}


def by_prompt(x: Tensor) -> Tensor:
    """[2N, ...] -> [N, ...]: the mean of the two groups of every prompt."""
    return x.unflatten(0, (2, -1)).mean(0)


def _groups(rollouts: Rollouts) -> list[Tensor]:
    return [(rollouts.group_index == g).nonzero()[:, 0] for g in range(int(rollouts.group_index.max()) + 1)]
