"""Rollouts of a checkpoint: sampled, verified and scored by the policy itself, with the token ids that gradients
need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.passes import Passes
from tokencredit.lm.completions import Completion
from tokencredit.lm.packing import grid
from tokencredit.lm.sampling import Progress
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts
from tokencredit.scores.measure import measure
from tokencredit.scores.table import FREE
from tokencredit.tasks.task import Endless, Row


@dataclass(frozen=True, eq=False)
class Batch:
    """B rollouts: the task's row, prompt and completion (token ids), whether the length limit cut it, the verifier's
    reason; and `rollouts`, with `logprob` and `entropy` [B, T] of the policy that sampled, at its temperature."""

    rows: list[Row]
    prompts: list[list[int]]
    completions: list[tuple[int, ...]]
    truncated: list[bool]
    reasons: list[str]
    rollouts: Rollouts

    def __len__(self) -> int:
        return len(self.completions)

    def passes(self, checkpoint: Checkpoint, kind: type[Passes] = Passes) -> Passes:
        """Values and derivatives of the checkpoint's policy on these completions; [B, T] as the rollouts."""
        width = self.rollouts.mask.shape[1]
        c = checkpoint
        options = {"temperature": c.temperature, "memory": c.policy.memory, "softmax": c.softmax, "scratch": c.scratch}
        return kind(c.model, self.prompts, self.completions, width=width, **options)

    def take(self, keep: Tensor) -> Batch:
        """The rollouts that `keep` ([B] bool or [K] int) selects, in order; the width stays."""
        index = keep.nonzero()[:, 0].tolist() if keep.dtype == torch.bool else keep.tolist()
        lists = ("rows", "prompts", "completions", "truncated", "reasons")
        return replace(
            self, **{name: [getattr(self, name)[i] for i in index] for name in lists}, rollouts=self.rollouts.rows(keep)
        )

    @cached_property
    def num_prompts(self) -> int:
        return int(self.rollouts.group_index.max()) + 1 if len(self) else 0


def draw(
    checkpoint: Checkpoint,
    num_prompts: int,
    group: int,
    seed: int,
    *,
    split: str = "train",
    needs: Sequence[str] = (),
    progress: Progress | None = None,
) -> Batch:
    """`group` rollouts of each of `num_prompts` prompts, sampled by the checkpoint's policy now; `needs` names scores
    beyond the free ones.

    Prompts, samples and sketches depend on the seed alone. ValueError where the task has too few prompts.
    """
    if num_prompts < 1 or group < 1:
        raise ValueError(f"a batch needs prompts and rollouts of each, got {num_prompts} and {group}")
    rows = prompts_of(checkpoint, num_prompts, seed, split)
    return roll_out(checkpoint, rows, group, seed, needs=needs, progress=progress)


def prompts_of(checkpoint: Checkpoint, num: int, seed: int, split: str = "train") -> list[Row]:
    """Rows of the task; a finite task's are shuffled by the seed."""
    endless = isinstance(checkpoint.task, Endless)
    rows = checkpoint.task.rows(split, num if endless else None, seed)
    if len(rows) < num:
        raise ValueError(f"the {split} split of {checkpoint.config.task} has {len(rows)} prompts, {num} were asked for")
    if endless:
        return rows[:num]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[:num]]


def roll_out(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    group: int,
    seed: int,
    *,
    needs: Sequence[str] = (),
    progress: Progress | None = None,
) -> Batch:
    """`group` rollouts of every row, in their order. The k-th rollout of the i-th row depends on the seed, i, k and the
    policy.
    """
    prompts = checkpoint.policy.encode_rows(rows)
    sampled = checkpoint.policy.complete(prompts, group, seed=seed, progress=progress)
    return of_groups(checkpoint, rows, prompts, sampled, seed, needs=needs)


def of_groups(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[Completion]],
    seed: int,
    *,
    needs: Sequence[str] = (),
) -> Batch:
    """The completions of every row, verified and scored."""
    flat = [completion for some in sampled for completion in some]
    owner = [i for i, some in enumerate(sampled) for _ in some]
    return scored(checkpoint, [rows[i] for i in owner], [prompts[i] for i in owner], flat, owner, seed, needs=needs)


def scored(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    group: Sequence[int],
    seed: int,
    *,
    needs: Sequence[str] = (),
) -> Batch:
    """Completions that the checkpoint's policy has sampled, verified and scored; everything is given per rollout."""
    c = checkpoint
    verdicts = [c.policy.verdict(x.ids, row, x.truncated) for row, x in zip(rows, completions)]
    ids, own = [completion.ids for completion in completions], [list(prompt) for prompt in prompts]
    passes = Passes(c.model, own, ids, temperature=c.temperature, memory=c.policy.memory, softmax=c.softmax)
    mask = passes.grid(torch.ones(len(passes.batch), dtype=torch.float64)) > 0
    scores = dict(zip(("logprob", "entropy"), passes.values()))
    if beyond := sorted(set(needs) - set(FREE)):
        found = measure(c.policy, rows, own, ids, beyond, seed=seed, step=c.step, group=group)
        scores |= {name: grid(values, mask.shape[1]) for name, values in found.items()}
    reward = torch.tensor([float(verdict.correct) for verdict in verdicts], dtype=torch.float64)
    scores["entropy"] = scores["entropy"].clamp(min=0)
    rollouts = Rollouts(reward=reward, group=torch.tensor(group), mask=mask, scores=scores)
    return Batch(
        list(rows), own, ids, [x.truncated for x in completions], [verdict.reason for verdict in verdicts], rollouts
    )


def roles(checkpoint: Checkpoint, batch: Batch) -> list[list[str]] | None:
    """The role of every token, where the task knows roles."""
    found = [checkpoint.policy.roles(row, ids) for row, ids in zip(batch.rows, batch.completions)]
    return None if None in found else found


def credited(method: Method, batch: Batch) -> Batch:
    """The rollouts that a step of the method is made of: with dynamic sampling those of groups with both outcomes.

    ValueError where none is left.
    """
    if not method.mixed_groups_only:
        return batch
    if not batch.rollouts.mixed.any():
        raise ValueError(
            f"{method.name} learns from groups with both outcomes, and none of the {batch.num_prompts} groups here has"
            " both"
        )
    return batch.take(batch.rollouts.mixed)
