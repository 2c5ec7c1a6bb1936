"""One checkpoint, its rollouts with their scores, and the gradients that every method is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokencredit.dynamics.batch import Batch, prompts_of, roll_out
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.scores import known_scores, scores_beyond
from tokencredit.lm.distribution import seed_of
from tokencredit.method import Method
from tokencredit.methods import METHODS
from tokencredit.studies.stages import Stages
from tokencredit.studies.variance_gradients import (
    Gradients,
    Reference,
    base_of,
    exact_gradients,
    num_parameters,
    sketched_gradients,
    token_derivatives,
    weights_of,
)
from tokencredit.studies.variance_plan import TRUTHS, VarianceConfig, names_of

ROOM = 150_000_000
"""Numbers that the gradients of all groups may hold, one method at a time; larger models are sketched."""
SKETCH = 64
SAMPLING_SCORES = frozenset({"gradient_norm", "fisher_trace", "head_norm"})


@dataclass(frozen=True, eq=False)
class Setting:
    """One checkpoint with its rollouts and gradients."""

    label: str
    checkpoint: Checkpoint
    methods: dict[str, Method]
    truth: str
    batch: Batch
    gradients: Gradients
    reference: Reference
    directions: int


def prepare(config: VarianceConfig, label: str, checkpoint: Checkpoint, stages: Stages, say: Callable[[str], None]) -> Setting:
    """Rollouts, scores and reference gradients; rollouts come from the seed, scores and derivatives are stored."""
    methods = {name: METHODS[name].within(checkpoint.max_new_tokens) for name in names_of(config, checkpoint.task)}
    truth = ("exact" if "exact_value" in known_scores(checkpoint.task) else "rloo") if config.truth == "auto" else config.truth
    say(f"{label}: rollouts and scores")
    rows = prompts_of(checkpoint, config.prompts + config.truth_prompts, config.seed)
    study, others = rows[: config.prompts], rows[config.prompts :]
    needs = SAMPLING_SCORES.union(*(method.needs for method in methods.values()))
    batch = _scored(config, checkpoint, [*study, *study], needs, "study", stages)
    apart = _scored(config, checkpoint, others, TRUTHS[truth].needs, "truth", stages)
    size = num_parameters(checkpoint) * (3 * config.prompts + config.truth_prompts)
    directions = config.directions if config.directions is not None else SKETCH if size > ROOM else 0

    def gradients(which: Batch, name: str) -> Gradients:
        if not directions:
            return exact_gradients(checkpoint, which)
        say(f"{label}: derivatives along {directions} directions")
        make = lambda: {"tokens": token_derivatives(checkpoint, which, directions, config.seed).numpy()}  # noqa: E731
        return sketched_gradients(which, torch.from_numpy(stages.arrays(f"derivatives_{name}", make)["tokens"]))

    own = gradients(batch, "study")
    base = base_of(own(weights_of(methods[config.baseline], batch.rollouts)))
    reference = Reference(base, gradients(apart, "truth")(weights_of(TRUTHS[truth], apart.rollouts)))
    return Setting(label, checkpoint, methods, truth, batch, own, reference, directions)


def _scored(config: VarianceConfig, checkpoint: Checkpoint, rows: Sequence[dict], needs: Set[str], name: str, stages: Stages) -> Batch:
    """A group of rollouts of every row, with the scores that are needed."""
    b = roll_out(checkpoint, rows, config.group, seed_of(config.seed, name))
    beyond = sorted(needs - set(b.rollouts.scores))

    def make() -> dict[str, np.ndarray]:
        mask = b.rollouts.mask
        found = scores_beyond(checkpoint, b.rows, b.prompts, b.completions, mask, beyond, config.seed)
        return {score: x.numpy() for score, x in found.items()}

    more = stages.arrays(f"scores_{name}", make) if beyond else {}
    scores = {**b.rollouts.scores, **{score: torch.from_numpy(x) for score, x in more.items()}}
    return replace(b, rollouts=replace(b.rollouts, scores=scores))
