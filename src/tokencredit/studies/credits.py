"""The same completions under several kinds of credit: what methods give to every token, beside what it is worth where
the task's world is small enough to know that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokencredit.dynamics.batch import Batch, draw
from tokencredit.dynamics.checkpoint import Checkpoint, open_checkpoint
from tokencredit.lm.policy import PolicyConfig
from tokencredit.methods import METHODS
from tokencredit.report.credits import CreditKind, credits_section
from tokencredit.report.section import Section
from tokencredit.scores.table import FREE
from tokencredit.tasks.task import Walkable

EXACT = "exact_value"
TRUE_CREDIT = CreditKind(
    EXACT, "Q − V, exact", "how much the token changes the probability of success: what credit should be"
)
WORDS = {1: "one kind", 2: "two kinds", 3: "three kinds", 4: "four kinds"}


def credits_on_base(
    config: PolicyConfig, methods: Sequence[str], *, prompts: int = 16, group: int = 8, seed: int = 0, shown: int = 6
) -> Section:
    """What the methods give to rollouts of a policy, and the exact Q − V where the task can be walked; the first
    completion is a wrong one. Methods whose credit is that of another are left out, and said.
    """
    checkpoint = open_checkpoint(config)
    exact = [EXACT] if isinstance(checkpoint.task, Walkable) else []
    chosen = [METHODS[name].within(checkpoint.max_new_tokens) for name in dict.fromkeys(methods) if name != EXACT]
    needs = sorted(set().union(*(method.needs for method in chosen), exact) - FREE)
    batch = draw(checkpoint, prompts, group, seed, split="test", needs=needs)
    columns = {method.name: method.credit(batch.rollouts) for method in chosen}
    same = {
        name: first
        for place, name in enumerate(columns)
        for first in list(columns)[:place]
        if torch.allclose(columns[name], columns[first])
    }
    kinds = [CreditKind(name, name, METHODS[name].summary) for name in columns if name not in same]
    kinds += [TRUE_CREDIT] if exact else []
    columns |= {name: batch.rollouts.scores[name] for name in exact}
    rows = [_row(checkpoint, batch, at, columns) for at in _telling(batch, columns[kinds[-1].name])[:shown]]
    told = f"Sampled from {config.model or 'reckon'}; credit as a batch of {prompts} prompts x {group} gives it."
    told += "".join(f" {name} gives what {first} gives." for name, first in same.items())
    title = f"One wrong completion, {WORDS.get(len(kinds), f'{len(kinds)} kinds')} of credit"
    return credits_section(title, rows, kinds, told)


def _telling(batch: Batch, credit: torch.Tensor) -> list[int]:
    """Rollouts of groups with both outcomes by how much there is to see in them, wrong and right in turn."""
    told = batch.rollouts.mixed
    order = credit.abs().sum(1).argsort(descending=True).tolist()
    by_outcome = [
        [at for at in order if told[at] and bool(batch.rollouts.success[at]) is right] for right in (False, True)
    ]
    turns = [at for pair in zip(*by_outcome) for at in pair]
    return turns or order


def _row(checkpoint: Checkpoint, batch: Batch, at: int, columns: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A completion as `Run.tokens` gives it."""
    mask, scores = batch.rollouts.mask[at], batch.rollouts.scores
    role = checkpoint.policy.roles(batch.rows[at], batch.completions[at])
    return {
        "prompt": batch.rows[at]["prompt"],
        "tokens": checkpoint.policy.tokens(batch.completions[at]),
        "reward": float(batch.rollouts.reward[at]),
        "success": bool(batch.rollouts.success[at]),
        "reason": batch.reasons[at],
        "role": role,
        **{name: scores[name][at][mask].tolist() for name in ("entropy", "logprob")},
        **{name: column[at][mask].tolist() for name, column in columns.items()},
    }
