"""The change of entropy while training: every so many optimizer steps, what the step will do to the mean token entropy
by its gradient, and what it has done.

    predicted   ⟨∇H, θ' − θ⟩          ∇H from the step's own rollouts, before it (`dynamics.entropy`)
    realised    H(θ') − H(θ)          on the same rollouts, reweighted prefix by prefix (`dynamics.reweighting`)

θ' − θ is the step that the optimizer made, whatever it is. Both are of the same rollouts and share their noise: they
agree where the step is small, which says nothing of how well these few rollouts know the entropy. A measurement takes
two forward passes and one forward and backward pass over the step's rollouts, a copy of the trained weights and a
gradient. It is made where a rollout batch begins, so the rollouts are the policy's own; it touches neither the step's
gradients nor its random state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TrainerCallback

from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.reweighting import reweighted
from tokencredit.dynamics.to_go import Baseline, after
from tokencredit.dynamics.vectors import Vector
from tokencredit.engines.scorers import own_ids
from tokencredit.engines.trainer import Trainer, memory_beside
from tokencredit.engines.trl_groups import loss_mask
from tokencredit.lm.packing import grid
from tokencredit.masked import zero_off

NAMES = ("entropy_change/predicted", "entropy_change/realised")


@dataclass(frozen=True, eq=False)
class _Before:
    """What is kept until the step is made: of the policy before it, and the mean entropy over all processes."""

    passes: Passes
    mask: Tensor
    baseline: Baseline
    logprob: Tensor
    mean: float
    gradient: Vector
    weights: dict[str, Tensor]


class EntropyProbe(TrainerCallback):
    """Measures a trainer's steps, and logs both numbers of each.

    every   optimizer steps between measurements; 0 for none
    """

    def __init__(self, every: int, trainer: Trainer):
        if every < 0:
            raise ValueError(f"entropy_change_every must be 0 (off) or a number of optimizer steps, got {every}")
        if every and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            raise ValueError(
                "entropy_change_every needs whole weights in every process, which DeepSpeed and FSDP shard: leave it 0,"
                " and ask checkpoints with `tokencredit dynamics entropy`"
            )
        self.every, self.trainer = every, trainer
        self._due = 0
        self._before: _Before | None = None

    def before_loss(self) -> None:
        """Called before every micro-batch; begins a measurement where one is due and a rollout batch begins."""
        trainer = self.trainer
        step, args = trainer.state.global_step, trainer.args
        begins = trainer._step % (args.steps_per_generation * trainer.num_iterations) == 0
        if not self.every or not trainer.model.training or not begins or step < self._due or self._before:
            return
        self._due = step + self.every
        parts = trainer._buffered_inputs[: trainer.current_gradient_accumulation_steps]
        with trainer._clock.phase("entropy_change"):
            self._before = _begin(trainer, parts)

    def on_optimizer_step(self, args, state, control, **_) -> None:
        """The step is made: ends a measurement that has begun."""
        if self._before is None:
            return
        before, self._before = self._before, None
        with self.trainer._clock.phase("entropy_change"):
            figures = _end(self.trainer, before)
        for name, value in zip(NAMES, figures):
            self.trainer._metrics["train"][name].append(value)


def _begin(trainer: Trainer, parts: list[dict]) -> _Before:
    """The part of ∇H that this process has of the rollouts in these micro-batches.

    ∇H = Σ (∇Hₜ + (Gₜ − H Rₜ) ∇log πₜ) / Σ T                the tokens' own entropies are the baseline (`to_go`)
    """
    if any(torch.is_tensor(part.get("pixel_values")) for part in parts):
        raise ValueError("entropy_change_every does not take batches with images apart: leave it 0")
    prompts, completions = ([row for part in parts for row in own_ids(part, side)] for side in ("prompt", "completion"))
    learnt = []
    for part in parts:
        learnt += [row[on].cpu() for row, on in zip(loss_mask(part).bool(), part["completion_mask"].bool())]
    model = trainer.accelerator.unwrap_model(trainer.model)
    options = {"temperature": trainer.temperature, "memory": memory_beside(trainer, model)}
    passes = Passes(model, prompts, completions, **options)
    mask = grid(learnt, passes.width, torch.bool)
    logprob, entropy = passes.values()
    entropy = zero_off(entropy, mask)
    total, tokens = _summed(trainer, float(entropy.sum()), float(mask.sum()))
    none, mean = torch.zeros_like(entropy), total / tokens
    weight = zero_off(after(entropy, mask) - mean * after(mask.double(), mask), mask) / tokens
    gradient = passes.reverse(weight, mask.double() / tokens)
    weights = {name: p.detach().clone() for name, p in passes.parameters.items()}
    return _Before(passes, mask, Baseline(none, none), logprob, mean, gradient, weights)


def _end(trainer: Trainer, before: _Before) -> tuple[float, float]:
    """Predicted and realised change, over all processes."""
    predicted = 0.0
    for name, p in before.passes.parameters.items():
        moved = p.detach().double() - before.weights[name].double()
        predicted += float((before.gradient[name].double() * moved).sum())
    logprob, entropy = before.passes.values()
    found = reweighted(logprob - before.logprob, entropy, before.mask, before.baseline)
    sums = _summed(trainer, predicted, float(found.entropy.sum()), float(found.length.sum()))
    return sums[0], sums[1] / sums[2] - before.mean


def _summed(trainer: Trainer, *numbers: float) -> list[float]:
    """The numbers' sums over all processes."""
    own = torch.tensor(numbers, dtype=torch.float64, device=trainer.accelerator.device)
    return trainer.accelerator.reduce(own, reduction="sum").tolist()
