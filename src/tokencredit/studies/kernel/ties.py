"""Which completions the kernel ties together, by name: the pairs whose gradients are most alike, and most opposed.

The kernel of completions is that of their tokens, summed: K(a, b) = Σ_{t∈a, t′∈b} K(t, t′), and a pair's tie is its
cosine. Pairs of one prompt and of two are listed apart, for the first share words whatever they say.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokencredit.dynamics.batch import Batch
from tokencredit.dynamics.checkpoint import Checkpoint

MOST = 8
"""Pairs of each scope and either sign."""


def strongest(cosine: np.ndarray, prompt: np.ndarray, num: int = MOST) -> list[tuple[int, int, float, str]]:
    """(i, j, cosine, scope) with i < j, of cosines [R, R]: by scope the largest, then the smallest; none twice."""
    first, second = np.triu_indices(len(cosine), 1)
    found = []
    for scope, there in (
        ("same prompt", prompt[first] == prompt[second]),
        ("other prompts", prompt[first] != prompt[second]),
    ):
        a, b = first[there], second[there]
        order = np.argsort(-cosine[a, b], kind="stable")
        tail = order[max(len(order) - num, num) :][::-1]
        found += [(int(a[k]), int(b[k]), float(cosine[a[k], b[k]]), scope) for k in [*order[:num], *tail]]
    return found


def tie_rows(checkpoint: Checkpoint, batch: Batch, rows: np.ndarray, cosine: np.ndarray) -> list[dict[str, Any]]:
    """The strongest ties of the completions `rows` [R] of a batch: cosine and scope, and of either side (a, b) prompt
    and rollout by number, token ids and text of both, and whether it was right.
    """
    group = batch.rollouts.group_index.numpy()[rows]
    found = []
    for i, j, value, scope in strongest(cosine, group):
        sides = {"a": int(rows[i]), "b": int(rows[j])}
        found.append(
            {"cosine": value, "scope": scope}
            | {f"{name}_{side}": x for side, row in sides.items() for name, x in _named(checkpoint, batch, row).items()}
        )
    return found


def _named(checkpoint: Checkpoint, batch: Batch, row: int) -> dict[str, Any]:
    prompt, completion = batch.prompts[row], list(batch.completions[row])
    return {
        "prompt": int(batch.rollouts.group_index[row]),
        "rollout": row,
        "success": bool(batch.rollouts.success[row]),
        "prompt_ids": prompt,
        "completion_ids": completion,
        "prompt_text": checkpoint.tokenizer.decode(prompt),
        "completion_text": checkpoint.tokenizer.decode(completion),
    }
