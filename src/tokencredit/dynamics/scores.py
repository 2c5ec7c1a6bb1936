"""Scores of a batch beyond log-prob and entropy, computed as training computes them: proxies, random draws, what the
task knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.engines import scorers

Ids = Sequence[Sequence[int]]
STEPS = "step_gain"


def scores_beyond(
    checkpoint: Checkpoint,
    rows: Sequence[dict],
    prompts: Ids,
    completions: Ids,
    mask: Tensor,
    names: Sequence[str],
    seed: int,
) -> dict[str, Tensor]:
    """{name: [B, T]}, float64, zero off the mask: importance proxies, `uniform`, `step_gain`, and `exact_value` and
    `oracle_positions` where the task gives them. ValueError for any other name."""
    given = {"uniform": _uniform, "exact_value": _exact_value, "oracle_positions": _oracle_positions}
    if unknown := sorted(set(names) - {*scorers.PROXIES, *given, STEPS}):
        raise ValueError(
            f"{', '.join(unknown)} cannot be measured here; there are {', '.join([*scorers.PROXIES, *given, STEPS])}"
        )
    wanted = [name for name in names if name in scorers.PROXIES]
    options = {"seed": seed, "temperature": checkpoint.temperature}
    found = proxies(checkpoint.model, prompts, completions, mask, wanted, **options) if wanted else {}
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for completion in completions for token in completion])
    found |= {name: given[name](checkpoint, rows, ids, mask, seed).double() * mask for name in names if name in given}
    if STEPS in names:
        found[STEPS] = _step_gain(checkpoint, rows, prompts, completions, mask, seed)
    return found


def proxies(
    model: Any, prompts: Ids, completions: Ids, mask: Tensor, names: Sequence[str], **options: Any
) -> dict[str, Tensor]:
    """{name: [B, T]} of kinds of `lm.proxies.importance`, which takes the options."""
    from tokencredit.lm.proxies import importance

    width = max(len(p) + len(c) for p, c in zip(prompts, completions))
    ids, there, wanted = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(3))
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        end = len(prompt) + len(completion)
        ids[i, :end], there[i, :end], wanted[i, len(prompt) : end] = torch.tensor([*prompt, *completion]), 1, 1
    device = next(model.parameters()).device
    found = importance(model, *(x.to(device) for x in (ids, there, wanted)), tuple(names), **options)
    at = wanted.bool()
    empty = torch.zeros(mask.shape, dtype=torch.float64)
    return {name: empty.masked_scatter(mask, found[name].value.cpu()[at].double()) for name in names}


def _uniform(checkpoint: Checkpoint, rows: Sequence[dict], ids: Tensor, mask: Tensor, seed: int) -> Tensor:
    return scorers.uniform_draws(seed, checkpoint.step, torch.arange(len(mask)), mask.shape[1])


def _exact_value(checkpoint: Checkpoint, rows: Sequence[dict], ids: Tensor, mask: Tensor, seed: int) -> Tensor:
    c = checkpoint
    if getattr(c.task, "name", "") != "reckon":
        raise ValueError(
            f"exact_value needs a world that prefix trees can walk, which reckon is and {c.config.task} is not"
        )
    return scorers.exact_value(
        c.model, c.tokenizer, c.task, rows, ids, mask, max_new_tokens=c.max_new_tokens, temperature=c.temperature
    )


def _oracle_positions(checkpoint: Checkpoint, rows: Sequence[dict], ids: Tensor, mask: Tensor, seed: int) -> Tensor:
    if not hasattr(checkpoint.task, "deciding"):
        raise ValueError(
            f"oracle_positions needs a task that says which positions decide; {checkpoint.config.task} has no"
            " `deciding`"
        )
    return scorers.oracle_positions(checkpoint.tokenizer, checkpoint.task, rows, ids, mask)


def _step_gain(
    checkpoint: Checkpoint, rows: Sequence[dict], prompts: Ids, completions: Ids, mask: Tensor, seed: int
) -> Tensor:
    from tokencredit.engines.vine import step_gains
    from tokencredit.lm.distribution import Settings
    from tokencredit.lm.sampling import Trace

    c, traces = checkpoint, [Trace(tuple(prompt), tuple(ids)) for prompt, ids in zip(prompts, completions)]
    options = {"settings": Settings(c.temperature), "max_new_tokens": c.max_new_tokens, "seed": seed}
    gains = step_gains(c.model, c.tokenizer, c.task, rows, traces, **options)
    found = torch.zeros(mask.shape, dtype=torch.float64)
    found[mask] = torch.tensor([gain for some in gains for gain in some], dtype=torch.float64)
    return found


def known_scores(task: Any) -> frozenset[str]:
    """Names of the scores that `scores_beyond` can give for a task."""
    own = {"exact_value": getattr(task, "name", "") == "reckon", "oracle_positions": hasattr(task, "deciding")}
    return scorers.GIVEN | {STEPS} | {name for name, there in own.items() if there}
