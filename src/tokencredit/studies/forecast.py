"""What a question will take, said before anything is spent: rollouts, tokens, seconds at most, memory.

    seconds ≤ Σ rows · (n · written + passes · (prompt + written)) / speed        written = max_new_tokens, n = 2

A pass is a forward pass over a row; a backward pass counts as 2, a forward-mode pass as 4. The speed is that of one
pass over a prompt, timed now; a token that is sampled alone takes about n times as long as one of many.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.vectors import kept_as, size
from tokencredit.lm.readout import evaluating
from tokencredit.lm.room import LIBRARIES, Room
from tokencredit.studies.study import told_time

BACKWARD, ALONG, SAMPLED = 3, 5, 2
"""Forward passes that a reverse pass, a forward-mode pass and a sampled token take; the forward pass itself counted."""


@dataclass(frozen=True)
class Drawn:
    """Rollouts of each of some prompts, and how many forward passes' worth of work is done on all of them."""

    prompts: int
    group: int
    passes: float

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group


def forecast(checkpoint: Checkpoint, drawn: Sequence[Drawn], vectors: float, prompt: Sequence[int]) -> str:
    """The forecast in words. vectors: as large as the model that are held at once; prompt: token ids of a usual one."""
    written = checkpoint.max_new_tokens
    speed = _speed(checkpoint, prompt)
    rollouts = sum(each.rollouts for each in drawn)
    sampled = rollouts * written
    passed = sum(each.rollouts * each.passes for each in drawn) * (len(prompt) + written)
    seconds = (SAMPLED * sampled + passed) / speed
    whole, held = rollouts * (len(prompt) + written), memory(checkpoint, vectors) / 2**30
    return (
        f"forecast: {rollouts:,} rollouts of at most {written} tokens, {whole:,} tokens with their prompts;"
        f" {passed:,.0f} tokens of forward passes at {speed:,.0f} a second. At most {told_time(seconds)}, about"
        f" {held:.2g} GiB"
    )


def memory(checkpoint: Checkpoint, vectors: float) -> float:
    """Bytes: libraries, weights, what passes may hold, and vectors as large as the model, moments among them."""
    parameters = {name: p for name, p in checkpoint.model.named_parameters() if p.requires_grad}
    weights = sum(p.numel() * p.element_size() for p in checkpoint.model.parameters())
    one = size(parameters) * kept_as(parameters).itemsize
    moments = 2 * 4 * size(parameters) if checkpoint.optimizer and _remembers(checkpoint) else 0
    return LIBRARIES + weights + moments + vectors * one + Room.of(checkpoint.model, checkpoint.policy.memory).space


def _remembers(checkpoint: Checkpoint) -> bool:
    moments = checkpoint.needs_optimizer().moments.values()
    return any(isinstance(each.second, torch.Tensor) for each in moments)


def _speed(checkpoint: Checkpoint, prompt: Sequence[int]) -> float:
    """Tokens of a forward pass a second."""
    ids = torch.tensor([list(prompt)], device=checkpoint.model.device)
    with torch.no_grad(), evaluating(checkpoint.model):
        for _ in range(2):  # the first one makes room
            began = time.perf_counter()
            checkpoint.model(input_ids=ids)
            seconds = time.perf_counter() - began
    return len(prompt) / max(seconds, 1e-6)
