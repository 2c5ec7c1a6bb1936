"""One checkpoint, its rollouts with their scores, and the gradients that every method is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokencredit import limits
from tokencredit.dynamics.batch import Batch, prompts_of, roll_out
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.gradient_matrix import file_bytes
from tokencredit.dynamics.passes import room_of
from tokencredit.dynamics.vectors import trained
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.packing import grid
from tokencredit.method import Method
from tokencredit.methods import METHODS
from tokencredit.scores.measure import measure
from tokencredit.scores.table import available
from tokencredit.stages import Stages
from tokencredit.studies.study import Counting
from tokencredit.studies.variance.gradients import (
    Gradients,
    Reference,
    exact_gradients,
    sketched_gradients,
    token_derivatives,
    weights_of,
)
from tokencredit.studies.variance.plan import TRUTHS, names_of
from tokencredit.studies.variance.question import VarianceConfig

SKETCH = 64
"""Directions where exact gradients find no disk."""
ALWAYS = frozenset({"gradient_norm", "fisher_trace", "head_norm"})


@dataclass(frozen=True, eq=False)
class Setting:
    """One checkpoint with its rollouts and gradients."""

    label: str
    checkpoint: Checkpoint
    methods: dict[str, Method]
    truth: str
    batch: Batch
    gradients: Gradients
    unweighted: Tensor
    directions: int

    @cached_property
    def reference(self) -> Reference:
        """Gradients of the unweighted method and of τ's estimator, which only what is not stored yet needs."""
        true = weights_of(TRUTHS[self.truth], self.batch.rollouts)
        return Reference(self.gradients(self.unweighted), self.gradients(true))


def prepare(
    config: VarianceConfig, label: str, checkpoint: Checkpoint, stages: Stages, say: Callable[[str], None]
) -> Setting:
    """Rollouts, scores and how gradients are taken; rollouts come from the seed, scores and derivatives are stored."""
    methods = {name: METHODS[name].within(checkpoint.max_new_tokens) for name in names_of(config, checkpoint.task)}
    truth, directions = truth_of(config, checkpoint), directions_of(config, checkpoint, stages.folder)
    rows = prompts_of(checkpoint, config.prompts, config.seed)
    needs = ALWAYS.union(TRUTHS[truth].needs, *(method.needs for method in methods.values()))
    batch = _scored(config, checkpoint, [*rows, *rows], needs, stages, label, say)
    unweighted = weights_of(methods[config.baseline], batch.rollouts)
    if not unweighted.any():
        raise ValueError(
            f"{config.baseline} gives no token here any gradient: every group's rewards are equal. Draw more prompts, "
            "or larger groups"
        )
    if directions:
        say(f"{label}: derivatives along {directions} directions")
        made = stages.arrays(
            "derivatives", lambda: {"tokens": token_derivatives(checkpoint, batch, directions, config.seed).numpy()}
        )
        gradients = sketched_gradients(batch, torch.from_numpy(made["tokens"]))
    else:
        heard = Counting(say, f"{label}: gradients", "groups", (1 + len(methods)) * batch.num_prompts)
        gradients = exact_gradients(checkpoint, batch, stages.folder, heard)
    return Setting(label, checkpoint, methods, truth, batch, gradients, unweighted, directions)


def truth_of(config: VarianceConfig, checkpoint: Checkpoint) -> str:
    """How the true policy gradient is estimated."""
    if config.truth != "auto":
        return config.truth
    return "exact" if "exact_value" in available(checkpoint.task) else "rloo"


def directions_of(config: VarianceConfig, checkpoint: Checkpoint, folder: Path) -> int:
    """Random directions; 0 for exact gradients, which is the default where the disk of a folder has room for those of
    the unweighted method, of the true one and of another, two groups for every prompt.
    """
    if config.directions is not None:
        return config.directions
    room = room_of(checkpoint.model, checkpoint.policy.memory)
    needed = 3 * file_bytes(trained(checkpoint.model), 2 * config.prompts, room)
    return SKETCH if needed > limits.free(folder) else 0


def _scored(
    config: VarianceConfig,
    checkpoint: Checkpoint,
    rows: Sequence[dict],
    needs: Set[str],
    stages: Stages,
    label: str,
    say: Callable[[str], None],
) -> Batch:
    """A group of rollouts of every row, with the scores that are needed."""
    heard = Counting(say, f"{label}: sampling", "rollouts", len(rows) * config.group)
    b = roll_out(checkpoint, rows, config.group, seed_of(config.seed, "rollouts"), progress=heard)
    say(f"{label}: scores")
    beyond = sorted(needs - set(b.rollouts.scores))

    def make() -> dict[str, np.ndarray]:
        options = {"seed": config.seed, "step": checkpoint.step, "group": b.rollouts.group.tolist()}
        found = measure(checkpoint.policy, b.rows, b.prompts, b.completions, beyond, **options)
        return {score: grid(x, b.rollouts.mask.shape[1]).numpy() for score, x in found.items()}

    more = stages.arrays("scores", make) if beyond else {}
    scores = {**b.rollouts.scores, **{score: torch.from_numpy(x) for score, x in more.items()}}
    return replace(b, rollouts=replace(b.rollouts, scores=scores))
