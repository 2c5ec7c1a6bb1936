"""Scores of sampled tokens from one forward pass: log-prob and entropy under the sampling distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def score(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, temperature: float = 1.0,
          batch: int = 64) -> dict[str, list[Tensor]]:  # fmt: skip
    """{"logprob": [...], "entropy": [...]}: one float32 tensor [T] per completion, in nats, at `temperature`, over the full vocabulary.

    Completions of similar length are scored together. ValueError where a sequence exceeds the model's context.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    limit = getattr(model.config, "max_position_embeddings", None)
    total = [len(p) + len(c) for p, c in zip(prompts, completions)]
    if limit and total and max(total) > limit:
        row = max(range(len(total)), key=total.__getitem__)
        raise ValueError(f"row {row} has {total[row]} tokens, more than the model's context of {limit}")
    found: dict[str, list[Tensor]] = {"logprob": [torch.zeros(0)] * len(total), "entropy": [torch.zeros(0)] * len(total)}
    order = sorted((i for i in range(len(total)) if completions[i]), key=total.__getitem__)
    for rows in (order[i : i + batch] for i in range(0, len(order), batch)):
        scored = _score_rows(model, [prompts[i] for i in rows], [completions[i] for i in rows], temperature)
        for row, (logprob, entropy) in zip(rows, scored):
            found["logprob"][row], found["entropy"][row] = logprob, entropy
    return found


def _score_rows(model: Any, prompts: list, completions: list, temperature: float) -> list[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    width = max(len(p) + len(c) for p, c in zip(prompts, completions))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        sequence = torch.tensor([*prompt, *completion])
        ids[row, : len(sequence)], attention[row, : len(sequence)] = sequence, 1
    logits = model(input_ids=ids.to(device), attention_mask=attention.to(device)).logits
    found = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        at = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        log_p = torch.log_softmax(logits[row, at].float() / temperature, -1)
        chosen = log_p.gather(1, torch.tensor(completion, device=device)[:, None])[:, 0]
        found.append((chosen.cpu(), -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1).cpu()))
    return found
