"""What a task knows of its completions: exact values from prefix trees, and the positions that decide."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokencredit.lm.distribution import Settings
from tokencredit.lm.packing import Ids, grid, unpack
from tokencredit.lm.policy import Policy
from tokencredit.pivotality.tree import exact_value_scores, on_text
from tokencredit.tasks.task import Deciding, Row, Walkable


def exact_value(policy: Policy, rows: Sequence[Row], prompts: Ids, completions: Ids) -> list[torch.Tensor]:
    """Q − V of every token [T] from the policy's own prefix trees, one per prompt; `rows` are one per completion."""
    assert isinstance(policy.task, Walkable)
    if policy.settings != Settings(policy.temperature):
        raise ValueError("exact_value walks the whole distribution: leave top_k and top_p unset")
    first: dict[str, int] = {}
    group = torch.tensor([first.setdefault(str(row["prompt"]), len(first)) for row in rows])
    width = max(map(len, completions), default=0)
    mask = grid([[1] * len(ids) for ids in completions], width).bool()
    found = exact_value_scores(
        policy.model,
        prompts,
        grid(completions, width, torch.long),
        mask,
        group,
        [on_text(policy.task.verify, policy.tokenizer, row) for row in rows],
        eos_token_id=policy.tokenizer.eos_token_id,
        max_new_tokens=policy.max_new_tokens,
        eps=policy.task.tree_eps,
        temperature=policy.temperature,
    )
    return unpack(found, mask)


def oracle_positions(policy: Policy, rows: Sequence[Row], prompts: Ids, completions: Ids) -> list[torch.Tensor]:
    """1 at the positions that the task calls deciding, from the tokens before them alone; 0 elsewhere: [T] each."""
    task = policy.task
    assert isinstance(task, Deciding)
    names = [policy.tokenizer.convert_ids_to_tokens(list(ids)) for ids in completions]
    return [torch.tensor(task.deciding(row, own), dtype=torch.float32) for row, own in zip(rows, names)]
