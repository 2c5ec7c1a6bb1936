"""The update vector: what one optimizer step on a batch of rollouts would change, and who changes it, without making
the step.

    Δθ = μ + δ − Σᵢₜ a ⊙ κᵢₜ ∇log πᵢₜ          κᵢₜ = s ∂L/∂log πᵢₜ          s = min(1, c / (‖∇L‖ + 10⁻⁶))

L is the method's loss with the old policy equal to the current one (the first optimizer step on the rollouts), s the
clipping of the gradient's norm to c, and μ, δ, a are momentum, decay and gain of `optimizer.step_parts`. The split is
exact and additive given the batch: a and s depend on all of it. For any direction d, ⟨d, Δθ⟩ splits over tokens by one
forward-mode pass along a ⊙ d.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch, credited
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.optimizer import Moments, OptimizerState, step_parts
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.vectors import Derived, Vector, dot, elementwise, norm, scaled, total
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts

NORM_EPS = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to the norm."""


@dataclass(frozen=True, eq=False)
class Update:
    """One step. Momentum, decay and gain are made entry by entry when they are read (`vectors`); `coefficient` [B,
    T] is ∂L/∂log π of every token of `batch`; `clip` is s; `lr` its η.
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
    lr: float

    @property
    def vector(self) -> Vector:
        """Δθ."""
        return total(self.momentum, self.decay, self.fresh)

    @property
    def fresh(self) -> Vector:
        """−s a ⊙ ∇L: the part of Δθ that this batch made."""
        return scaled(scaled(self.gradient, self.gain), -self.clip)

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

    def rest(self, direction: Mapping[str, Tensor]) -> dict[str, float]:
        """The parts of ⟨d, Δθ⟩ that no token of this batch has made."""
        return {"momentum": dot(direction, self.momentum), "decay": dot(direction, self.decay)}


def update_vector(
    checkpoint: Checkpoint, batch: Batch, method: Method | None = None, *, optimizer: OptimizerState | None = None
) -> Update:
    """The step that training with `method` (the run's own without one) would make on these rollouts from the
    checkpoint.

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
    return step_along(checkpoint, batch, coefficient, credit, optimizer=optimizer)


def step_along(
    checkpoint: Checkpoint,
    batch: Batch,
    coefficient: Tensor,
    credit: Tensor,
    *,
    optimizer: OptimizerState | None = None,
) -> Update:
    """The step whose loss has these ∂L/∂log π [B, T]: any weighting of the tokens, with the gain and the clipping that
    belong to it.
    """
    optimizer = optimizer or checkpoint.needs_optimizer()
    passes = batch.passes(checkpoint)
    gradient = passes.reverse(coefficient)
    length = norm(gradient)
    clip = 1.0 if checkpoint.max_grad_norm is None else min(1.0, checkpoint.max_grad_norm / (length + NORM_EPS))
    parts = (_part(k, passes.parameters, scaled(gradient, clip), optimizer) for k in range(3))
    return Update(batch, passes, coefficient, credit, gradient, clip, *parts, optimizer.lr)


def _part(k: int, parameters: Mapping[str, Tensor], gradient: Vector, optimizer: OptimizerState) -> Vector:
    """Momentum, decay or gain of `step_parts` for a clipped gradient, at the parameters as they are now."""
    rules = optimizer.rules
    theta = {name: p.detach().clone() if rules[name].weight_decay else p.detach() for name, p in parameters.items()}

    def entry(name: str) -> Tensor:
        kept = optimizer.moments[name]._asdict()
        there = [field for field, x in kept.items() if isinstance(x, Tensor)]

        def block(at: Tensor, slope: Tensor, *remembered: Tensor) -> Tensor:
            return step_parts(at, slope, rules[name], Moments(**{**kept, **dict(zip(there, remembered))}))[k]

        g = gradient[name]
        return elementwise(block, theta[name], g, *(kept[field].to(g.device) for field in there), dtype=g.dtype)

    return Derived(parameters, entry)


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
    changed = {name: scaled(getattr(update, name), factor) for name in ("momentum", "decay", "gain")}
    return replace(update, **changed, lr=lr)
