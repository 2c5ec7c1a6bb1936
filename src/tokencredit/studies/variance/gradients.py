"""The gradient that every group of rollouts gives under a weighting of its tokens, and the products that variance is
estimated from.

    x_g = −N Σ_{it∈g} κᵢₜ ∇log πᵢₜ          κ = ∂L/∂log π of the method's loss over the whole batch of N groups

so that the mean over groups is the batch's ascent direction. What a method takes from the whole batch (a denominator, a
threshold) stays as the batch has it. Groups g and g + N/2 belong to the same prompt.

Exact: one reverse pass per group and method. Sketched, for larger models: every token's derivative along K random
directions u once, by forward mode, serves all weightings; products of x·u are unbiased for products of x, those of
norms with relative noise √(2/K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.update import coefficients_of
from tokencredit.lm.distribution import seed_of
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts

AT_ONCE = 32

Gradients = Callable[[Tensor], Tensor]
"""κ [B, T] -> x [groups, D], float32: D parameters, or directions."""


def weights_of(method: Method, rollouts: Rollouts) -> Tensor:
    """κ [B, T] float64 of every rollout drawn: with dynamic sampling, groups of one outcome are dropped and have 0.

    All 0 where no group gives the method any gradient.
    """
    keep = rollouts.mixed if method.mixed_groups_only else torch.ones(len(rollouts), dtype=torch.bool)
    found = torch.zeros(rollouts.mask.shape, dtype=torch.float64)
    if keep.any():
        found[keep] = coefficients_of(method, rollouts.rows(keep))[0]
    return found


def exact_gradients(checkpoint: Checkpoint, batch: Batch) -> Gradients:
    """x by reverse passes, one group at a time."""
    groups = _groups(batch.rollouts)
    passes = [batch.take(rows).passes(checkpoint) for rows in groups]

    def gradients(weight: Tensor) -> Tensor:
        found = torch.zeros(len(groups), sum(p.numel() for p in passes[0].parameters.values()))
        for g, (rows, each) in enumerate(zip(groups, passes)):
            if weight[rows].any():
                vector = each.reverse(weight[rows])
                found[g] = torch.cat([part.flatten().cpu() for part in vector.values()]).float() * -len(groups)
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
    """What every method is compared with on the same rollouts, [N, D]: the unweighted gradient of every prompt, and τ's
    estimator.
    """

    base: Tensor
    truth: Tensor

    def products(self, x: Tensor) -> dict[str, np.ndarray]:
        """Per prompt [N], of the gradients x [2N, D] of its two groups: with each other, with themselves, with sums
        over all prompts.
        """
        pair = x.unflatten(0, (2, -1))
        mean = pair.mean(0)
        total = _total(mean)
        found = {
            "square": (_dots(pair[0], pair[0]) + _dots(pair[1], pair[1])) / 2,
            "pair": _dots(pair[0], pair[1]),
            "sum": _dots(mean, total),
        }
        for name, other in (("base", self.base), ("truth", self.truth)):
            found |= {
                f"{name}_own": _dots(mean, other),
                f"{name}_sum": _dots(mean, _total(other)),
                f"sum_{name}": _dots(other, total),
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


def _total(x: Tensor) -> Tensor:
    """[D] float64."""
    return sum(part.double().sum(0) for part in x.split(AT_ONCE))


def _dots(a: Tensor, b: Tensor) -> np.ndarray:
    """[N]: row by row a · b, or a · the one vector b, summed in float64."""
    others = b.split(AT_ONCE) if b.dim() == 2 else [b] * -(-len(a) // AT_ONCE)
    return torch.cat([torch.linalg.vecdot(x.double(), y.double()) for x, y in zip(a.split(AT_ONCE), others)]).numpy()
