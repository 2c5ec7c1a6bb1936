"""The update vector: what one optimizer step on a batch of rollouts would change, and who changes it, without making
the step.

    Δθ = μ + δ − Σᵢₜ a ⊙ κᵢₜ ∇log πᵢₜ          κᵢₜ = s ∂L/∂log πᵢₜ          s = min(1, c / (‖∇L‖ + 10⁻⁶))

L is the method's loss with the old policy equal to the current one (the first optimizer step on the rollouts), s the
clipping of the gradient's norm to c, and μ, δ, a are momentum, decay and gain of `optimizer.step_parts`. The split is
exact and additive given the batch: a and s depend on all of it. For any direction d, ⟨d, Δθ⟩ splits over tokens by one
forward-mode pass along a ⊙ d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch, credited
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.optimizer import Moments, OptimizerState, Step, step_parts
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.sweep import Sweep
from tokencredit.dynamics.vectors import Derived, Vector, dot, elementwise, norm, scaled, total
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts

NORM_EPS = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to the norm."""


@dataclass(frozen=True, eq=False)
class Update:
    """One step. Its vectors but the gradient are made entry by entry when they are read (`vectors`): `fresh` is −s a ⊙
    ∇L, the part of Δθ that this batch made, `vector` Δθ. `coefficient` [B, T] is ∂L/∂log π of every token of `batch`;
    `clip` is s; `lr` its η.
    """

    batch: Batch
    passes: Passes
    coefficient: Tensor
    credit: Tensor
    gradient: Vector
    clip: float
    momentum: Vector
    decay: Vector
    gain: Vector
    fresh: Vector
    vector: Vector
    lr: float

    def of_tokens(self, weight: Tensor) -> Vector:
        """The part of Δθ made by some tokens: weight [B, T] is 1 for those, 0 elsewhere (or anything between)."""
        return scaled(scaled(self.passes.reverse(self.coefficient * weight), self.gain), -self.clip)

    def of_rollout(self, row: int) -> Vector:
        """The part of Δθ made by one rollout; over the rollouts they add up to `fresh`."""
        return self.of_tokens(torch.zeros_like(self.coefficient).index_fill_(0, torch.tensor([row]), 1.0))

    def shares(self, direction: Mapping[str, Tensor]) -> Tensor:
        """[B, T]: each token's part of ⟨d, Δθ⟩. They add up to ⟨d, fresh⟩; momentum and decay have their own:
        `rest`.
        """
        along = self.passes.forward(scaled(direction, self.gain), self.coefficient)[0]
        return -self.clip * self.coefficient * along

    def shares_of_groups(
        self, directions: Sequence[Vector], group: Tensor, num: int, sweep: Sweep | None = None
    ) -> list[np.ndarray]:
        """[num] each: the parts of ⟨d, Δθ⟩ that groups of rollouts have, group [B] saying which is whose. A
        forward-mode pass for a direction; of a large model a reverse pass for a group, for all of them.
        """
        if not self.passes.large:
            return [by_group(self.shares(d).sum(1), group, num) for d in directions]
        none = torch.zeros_like(self.coefficient)
        groups = [group == q for q in range(num)]
        along = [scaled(d, self.gain) for d in directions]
        found = self.passes.products([(self.coefficient, none)], groups, along, (None,), sweep)
        return list(-self.clip * found.numpy())

    def rest(self, direction: Mapping[str, Tensor]) -> dict[str, float]:
        """The parts of ⟨d, Δθ⟩ that no token of this batch has made."""
        return {"momentum": dot(direction, self.momentum), "decay": dot(direction, self.decay)}


def update_vector(
    checkpoint: Checkpoint,
    batch: Batch,
    method: Method | None = None,
    *,
    optimizer: OptimizerState | None = None,
    name: str = "",
) -> Update:
    """The step that training with `method` (the run's own without one) would make on these rollouts from the
    checkpoint; `name` keeps its gradient, as `Passes.reverse` takes it.

    The model is in evaluation mode: no dropout. ValueError where no rollout has credit, or where there is no optimizer
    state.
    """
    method = method or checkpoint.method
    batch = credited(method, batch)
    coefficient, credit = loss_coefficients(method, batch)
    if not coefficient.any():
        raise ValueError(
            f"{method.name} gives no token of this batch any gradient: every group's rewards are equal. Draw more"
            " prompts"
        )
    return step_along(checkpoint, batch, coefficient, credit, optimizer=optimizer, name=name)


def step_along(
    checkpoint: Checkpoint,
    batch: Batch,
    coefficient: Tensor,
    credit: Tensor,
    *,
    optimizer: OptimizerState | None = None,
    name: str = "",
) -> Update:
    """The step whose loss has these ∂L/∂log π [B, T]: any weighting of the tokens, with the gain and the clipping that
    belong to it.
    """
    passes = batch.passes(checkpoint)
    gradient = passes.reverse(coefficient, name=name)
    return step_of(checkpoint, batch, coefficient, credit, passes, gradient, optimizer=optimizer)


def without_tokens(checkpoint: Checkpoint, update: Update, tokens: Tensor, name: str = "") -> Update:
    """The step when some of its tokens [B, T] have no gradient: from the gradient of the others, or from the whole less
    that of these, whichever stands in fewer rollouts.
    """
    kept, passes = update.coefficient.masked_fill(tokens, 0), update.passes
    left_out = update.coefficient - kept
    if (kept != 0).any(1).sum() <= (left_out != 0).any(1).sum():
        gradient = passes.reverse(kept, name=name)
    else:
        gradient = passes.kept(total(update.gradient, scaled(passes.reverse(left_out, name=name), -1)))
    return step_of(checkpoint, update.batch, kept, update.credit, passes, gradient)


def step_of(
    checkpoint: Checkpoint,
    batch: Batch,
    coefficient: Tensor,
    credit: Tensor,
    passes: Passes,
    gradient: Vector,
    *,
    optimizer: OptimizerState | None = None,
) -> Update:
    """The step of a gradient that is known."""
    optimizer = optimizer or checkpoint.needs_optimizer()
    length = norm(gradient)
    clip = 1.0 if checkpoint.max_grad_norm is None else min(1.0, checkpoint.max_grad_norm / (length + NORM_EPS))
    theta = {name: p.detach() for name, p in passes.parameters.items()}
    if optimizer.decays:
        theta = {name: p.clone() for name, p in theta.items()} if passes.scratch is None else passes.kept(theta)
    parts = (_part(pick, theta, gradient, clip, optimizer) for pick in PARTS.values())
    return Update(batch, passes, coefficient, credit, gradient, clip, *parts, optimizer.lr)


PARTS: dict[str, Callable[[Step, Tensor], Tensor]] = {
    "momentum": lambda step, g: step.momentum,
    "decay": lambda step, g: step.decay,
    "gain": lambda step, g: step.gain,
    "fresh": lambda step, g: -step.gain * g,
    "vector": lambda step, g: step.momentum + step.decay - step.gain * g,
}
"""Vectors of an update from `step_parts` and the clipped gradient."""


def _part(
    pick: Callable[[Step, Tensor], Tensor],
    theta: Mapping[str, Tensor],
    gradient: Vector,
    clip: float,
    optimizer: OptimizerState,
) -> Vector:
    """One of `PARTS` for a gradient before it is clipped, at these parameters."""

    def entry(name: str) -> Tensor:
        g, rule, kept = gradient[name], optimizer.rules[name], optimizer.moments[name]._asdict()
        there = [field for field, x in kept.items() if isinstance(x, Tensor)]

        def block(at: Tensor, slope: Tensor, *remembered: Tensor) -> Tensor:
            clipped = slope * clip
            return pick(
                step_parts(at, clipped, rule, Moments(**{**kept, **dict(zip(there, remembered))}), g.dtype), clipped
            )

        return elementwise(block, theta[name], g, *(kept[field].to(g.device) for field in there), dtype=g.dtype)

    return Derived(theta, entry)


def by_group(values: Tensor, group: Tensor, num: int) -> np.ndarray:
    """[num]: sums over the rows of every group, groups numbered from 0; 0 for one without rows."""
    return np.bincount(group.numpy(), weights=values.numpy(), minlength=num)


def loss_coefficients(method: Method, batch: Batch) -> tuple[Tensor, Tensor]:
    """(∂L/∂log π, credit) [B, T] float64, where the current policy is the one that sampled."""
    return coefficients_of(method, batch.rollouts)


def coefficients_of(method: Method, rollouts: Rollouts, credit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`loss_coefficients` of rollouts without their token ids; they need the scores that the method reads, and
    `logprob`.

    credit   [B, T] in place of the method's own, such as one that was logged
    """
    credit = method.credit(rollouts) if credit is None else credit.to(rollouts.reward.dtype)
    logprob = rollouts.score("logprob").double().clone().requires_grad_(True)
    old = logprob.detach()
    with torch.enable_grad():
        loss, _ = method.loss(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts)
        found = torch.autograd.grad(loss, logprob, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(old) if found is None else found.detach(), credit.double()


def at_rate(update: Update, optimizer: OptimizerState, lr: float) -> Update:
    """The same step at another learning rate: every part of Δθ is proportional to it."""
    factor = lr / optimizer.lr
    changed = {name: scaled(getattr(update, name), factor) for name in PARTS}
    return replace(update, **changed, lr=lr)
