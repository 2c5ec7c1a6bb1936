"""Rollouts of a study, stored: token ids while they are sampled, so many prompts at a time as `together_of` says,
and when all are there the batch, verified and scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tokencredit.distribute.together import together_of
from tokencredit.dynamics.batch import Batch, of_groups, prompts_of
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.lm.completions import as_arrays, of_arrays
from tokencredit.lm.sampling import Progress
from tokencredit.rollouts import Rollouts
from tokencredit.stages import Stages
from tokencredit.tasks.task import Row

SCORE = "score/"


def drawn(
    stages: Stages,
    name: str,
    checkpoint: Checkpoint,
    num_prompts: int,
    group: int,
    seed: int,
    *,
    split: str = "train",
    needs: Sequence[str] = (),
    progress: Progress | None = None,
) -> Batch:
    """`dynamics.batch.draw`, under a name of the study's stages. `progress` hears of what is sampled now."""
    c = checkpoint
    rows = prompts_of(c, num_prompts, seed, split)
    prompts = c.policy.encode_rows(rows)
    size = max(together_of(c.model) // (group * c.max_new_tokens), 1)
    pieces = [range(start, min(start + size, num_prompts)) for start in range(0, num_prompts, size)]

    def sampled(absent: list[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        if progress:
            progress(0, total=group * sum(len(pieces[n]) for n in absent))
        for n in absent:
            some = [prompts[i] for i in pieces[n]]
            found = c.policy.complete(some, group, seed=seed, first=pieces[n].start, progress=progress)
            yield n, as_arrays([each for own in found for each in own])

    def made() -> dict[str, np.ndarray]:
        stored = stages.pieces([f"{name}_{own.start}_{own.stop}" for own in pieces], sampled)
        flat = [each for piece in stored for each in of_arrays(piece)]
        groups = [flat[start : start + group] for start in range(0, len(flat), group)]
        batch = of_groups(c, rows, prompts, groups, seed, needs=needs)
        scores = {SCORE + key: x.numpy() for key, x in batch.rollouts.scores.items()}
        verdicts = {"reward": batch.rollouts.reward.numpy(), "reason": np.array(batch.reasons)}
        return as_arrays(flat) | verdicts | scores

    stored = stages.arrays(name, made)
    owner = [i for i in range(num_prompts) for _ in range(group)]
    return _batch(stored, [rows[i] for i in owner], [list(prompts[i]) for i in owner], owner)


def _batch(arrays: dict[str, np.ndarray], rows: list[Row], prompts: list[list[int]], owner: list[int]) -> Batch:
    completions = of_arrays(arrays)
    scores: dict[str, Any] = {
        name.removeprefix(SCORE): torch.from_numpy(x) for name, x in arrays.items() if name.startswith(SCORE)
    }
    width = scores["logprob"].shape[1]
    rollouts = Rollouts(
        reward=torch.from_numpy(arrays["reward"]),
        group=torch.tensor(owner),
        mask=torch.arange(width) < torch.from_numpy(arrays["length"])[:, None],
        scores=scores,
    )
    cut, reasons = arrays["truncated"].tolist(), arrays["reason"].tolist()
    return Batch(rows, prompts, [each.ids for each in completions], cut, reasons, rollouts)
