"""The gradient noise scale while training: every so many optimizer steps the step's rollouts go through the model once
more, in pieces.

No prompt is in two pieces, so their gradients are independent, which those of TRL's micro-batches are not: TRL shuffles
rows, and siblings end up in different ones. The pass touches neither the gradients nor the random state of the step
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tokencredit.dynamics.noise_scale import from_pieces
from tokencredit.engines.trainer import Trainer
from tokencredit.engines.trl_groups import trimmed

EVERY = 20
"""Optimizer steps between measurements at which they cost no more than 5 % of the training of a small model
(benchmarks/noise_scale.py).
"""
PIECES = 4
KEPT = 0.9


class NoiseProbe:
    """Running means of |G|² and tr Σ (`dynamics.noise_scale`), each over about the last ten measurements; their ratio
    is taken when logged.

    every   optimizer steps between measurements; 0 for none
    """

    def __init__(self, every: int, trainer: Trainer):
        if every < 0:
            raise ValueError(f"noise_scale_every must be 0 (off) or a number of optimizer steps, got {every}")
        self.every = every
        self._measured: int | None = None
        self._signal = self._noise = self._weight = 0.0
        args, size = trainer.args, trainer.num_generations
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
        if every and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            raise ValueError(
                "noise_scale_every needs whole gradients in every process, which DeepSpeed and FSDP shard: leave it 0,"
                " and measure checkpoints with `tokencredit dynamics noise-scale`"
            )
        if every and rows < 2 * size:
            raise ValueError(
                f"noise_scale_every compares prompts, and a step of {rows} rollouts in groups of {size} has fewer than"
                " two: leave it 0, or make larger steps"
            )

    def before_loss(self, trainer: Trainer) -> None:
        """Called before every micro-batch; measures where a step is due and has not been measured."""
        step = trainer.state.global_step
        if not self.every or not trainer.model.training or step % self.every or step == self._measured:
            return
        self._measured = step
        for name, value in self.measure(trainer).items():
            trainer._metrics["train"][name].append(value)

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """The figures of the optimizer step that is about to begin."""
        accumulated, split = trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation
        first = trainer._step % split
        parts = trainer._buffered_inputs[first : first + accumulated]
        with trainer._clock.phase("noise_scale"), _untouched(trainer):
            squares, sizes, total = _pieces(trainer, parts)
        if sum(size > 0 for size in sizes) < 2:
            return {}
        # A micro-batch's loss is its share of the step's mean: of a step over several rollout batches only the first
        # one is at hand.
        prompts = sum(sizes) * accumulated / len(parts)
        return self.update(*(part * prompts**2 for part in from_pieces(squares, sizes, total)))

    def update(self, signal: float, noise: float) -> dict[str, float]:
        """Both means with one more measurement, and their ratio where |G|² is above 0."""
        self._weight = KEPT * self._weight + 1 - KEPT
        self._signal, self._noise = (
            KEPT * old + (1 - KEPT) * new for old, new in ((self._signal, signal), (self._noise, noise))
        )
        figures = {"noise_scale/signal": self._signal / self._weight, "noise_scale/noise": self._noise / self._weight}
        return figures | ({"noise_scale": self._noise / self._signal} if self._signal > 0 else {})


def _pieces(trainer: Trainer, parts: Sequence[dict]) -> tuple[list[float], list[int], float]:
    """(squared norms of the pieces' gradients, prompts of each, squared norm of their sum), the same in every
    process.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if any(torch.is_tensor(part.get("pixel_values")) for part in parts):
        raise ValueError("noise_scale_every does not take batches with images apart: leave it 0")
    groups = trainer.accelerator.gather(torch.cat([part["group"] for part in parts])).unique()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, squares = None, []
    for piece in range(PIECES):
        for part in parts:
            rows, credited = part["group"] % PIECES == piece, trainer._credited_rows(part)
            rows = rows if credited is None else rows & credited
            if rows.any():
                trainer._loss(model, trimmed(part, rows), routers=False)[0].backward()
        gradient = _taken(trainer, parameters)
        squares.append(_square(gradient))
        total = gradient if total is None else torch._foreach_add(total, gradient)
    return squares, [int((groups % PIECES == piece).sum()) for piece in range(PIECES)], _square(total)


def _taken(trainer: Trainer, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters' gradients, averaged over processes as the step's are, and none left behind."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return trainer.accelerator.reduce(found, reduction="mean") if trainer.accelerator.num_processes > 1 else found


def _square(gradient: Sequence[Tensor]) -> float:
    return float(torch.stack([g.float().norm().double().square() for g in gradient]).sum())


@contextmanager
def _untouched(trainer: Trainer) -> Iterator[None]:
    """Gradients and random states are after it what they were before."""
    parameters = list(trainer.model.parameters())
    kept = [p.grad for p in parameters]
    device = trainer.accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for p in parameters:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in zip(parameters, kept):
                p.grad = grad
