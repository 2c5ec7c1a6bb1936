"""What a question will take, said before anything is spent: rollouts, tokens, seconds at most, memory at most, disk.

    seconds ≤ Σ rows · (n · written + passes · (prompt / m + written) + alone · (prompt + written)) / speed

written = max_new_tokens, n = 2. A pass is a forward pass over a row; a backward pass counts as 2, a forward-mode one as
4. m rows share a prompt: of a group in a large model that can (`lm.shared_prompts`) as many as go together, otherwise
m = 1. The speed is that of one pass over a prompt, timed now; a token that is sampled alone takes about n times as long
as one of many.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.passes import room_of
from tokencredit.dynamics.vectors import kept_as, large, size, trained
from tokencredit.lm.readout import evaluating, find_readout
from tokencredit.lm.room import LIBRARIES
from tokencredit.lm.shared_prompts import MOST, shares_prompts
from tokencredit.studies.study import told_time

BACKWARD, ALONG, SAMPLED = 3, 5, 2
"""Forward passes that a reverse pass, a forward-mode pass and a sampled token take; the forward pass itself counted."""


@dataclass(frozen=True)
class Drawn:
    """Rollouts of each of some prompts, and how many forward passes' worth of work is done on all of them, and on each
    of them alone.
    """

    prompts: int
    group: int
    passes: float
    alone: float = 0.0

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group


def forecast(
    checkpoint: Checkpoint,
    drawn: Sequence[Drawn],
    vectors: float,
    prompt: Sequence[int],
    filed: float = 0.0,
    disk: float = 0.0,
) -> str:
    """The forecast in words. vectors: as large as the model that are held at once; filed: those of a large model in
    files, the optimizer's moments left out; disk: bytes of files besides; prompt: token ids of a usual one.
    """
    written = checkpoint.max_new_tokens
    speed, most = _speed(checkpoint, prompt), _together(checkpoint, prompt)
    rollouts = sum(each.rollouts for each in drawn)
    sampled = rollouts * written
    passed = sum(
        each.prompts * each.passes * (len(prompt) * -(-each.group // most) + each.group * written)
        + each.rollouts * each.alone * (len(prompt) + written)
        for each in drawn
    )
    seconds = (SAMPLED * sampled + passed) / speed
    whole, held = rollouts * (len(prompt) + written), memory(checkpoint, vectors) / 2**30
    disk = (_files(checkpoint, filed) + disk) / 2**30
    return (
        f"forecast: {rollouts:,} rollouts of at most {written} tokens, {whole:,} tokens with their prompts;"
        f" {passed:,.0f} tokens of forward passes at {speed:,.0f} a second. At most {told_time(seconds)} and"
        f" {held:.2g} GiB" + (f", and {disk:.2g} GiB of disk meanwhile" if disk else "")
    )


def memory(checkpoint: Checkpoint, vectors: float) -> float:
    """Bytes: libraries, weights, what passes may hold, and vectors as large as the model; moments among them where they
    are in no file.
    """
    parameters = trained(checkpoint.model)
    weights = sum(p.numel() * p.element_size() for p in checkpoint.model.parameters())
    one = size(parameters) * kept_as(parameters).itemsize
    moments = 0 if checkpoint.scratch else _moments(checkpoint)
    return LIBRARIES + weights + moments + vectors * one + room_of(checkpoint.model, checkpoint.policy.memory).space


def _files(checkpoint: Checkpoint, vectors: float) -> float:
    """Bytes of vectors in files, of the optimizer's moments too; none where vectors are in memory."""
    parameters = trained(checkpoint.model)
    return _moments(checkpoint) + vectors * size(parameters) * kept_as(parameters).itemsize if checkpoint.scratch else 0


def _moments(checkpoint: Checkpoint) -> int:
    return 2 * 4 * size(trained(checkpoint.model)) if checkpoint.optimizer and _remembers(checkpoint) else 0


def _together(checkpoint: Checkpoint, prompt: Sequence[int]) -> int:
    """How many of the longest completions share a prompt in passes."""
    ids = torch.tensor(list(prompt), device=checkpoint.model.device)
    if not large(trained(checkpoint.model)) or not shares_prompts(find_readout(checkpoint.model, ids), ids):
        return 1
    return max((MOST - len(prompt)) // checkpoint.max_new_tokens, 1)


def _remembers(checkpoint: Checkpoint) -> bool:
    moments = checkpoint.needs_optimizer().moments.values()
    return any(isinstance(each.second, torch.Tensor) for each in moments)


def _speed(checkpoint: Checkpoint, prompt: Sequence[int]) -> float:
    """Tokens of a forward pass a second."""
    ids = torch.tensor([list(prompt)], device=checkpoint.model.device)
    with torch.no_grad(), evaluating(checkpoint.model):
        seconds = []
        for _ in range(3):  # the first one makes room
            began = time.perf_counter()
            checkpoint.model(input_ids=ids)
            seconds.append(time.perf_counter() - began)
    return len(prompt) / max(min(seconds), 1e-6)
