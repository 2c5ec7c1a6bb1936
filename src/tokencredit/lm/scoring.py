"""Scores of sampled tokens from one forward pass: log-prob and entropy under the sampling distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**28


@torch.no_grad()
def score(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, temperature: float = 1.0,
          batch: int = 64) -> dict[str, list[Tensor]]:  # fmt: skip
    """{"logprob": [...], "entropy": [...]}: one float32 tensor [T] per completion, in nats, at `temperature`, over the full vocabulary.

    Completions of similar length are scored together, at most `batch` of them. An empty completion has empty scores. ValueError names a
    row whose prompt is empty or which exceeds the model's context.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    if temperature <= 0:
        raise ValueError(f"scores are those of a sampling distribution: temperature must be positive, got {temperature}")
    limit = getattr(model.config, "max_position_embeddings", None)
    total = [len(p) + len(c) for p, c in zip(prompts, completions)]
    for row, length in enumerate(total):
        if not len(prompts[row]):
            raise ValueError(f"row {row} has an empty prompt: its first token has no distribution")
        if limit and length > limit:
            raise ValueError(f"row {row} has {length} tokens, more than the model's context of {limit}")
    found: dict[str, list[Tensor]] = {"logprob": [torch.zeros(0)] * len(total), "entropy": [torch.zeros(0)] * len(total)}
    order = sorted((i for i in range(len(total)) if len(completions[i])), key=total.__getitem__)
    was_training = model.training
    model.eval()
    for rows in _batches(order, total, batch, getattr(model.config, "vocab_size", 1)):
        scored = _score_rows(model, [prompts[i] for i in rows], [completions[i] for i in rows], temperature)
        for row, (logprob, entropy) in zip(rows, scored):
            found["logprob"][row], found["entropy"][row] = logprob, entropy
    model.train(was_training)
    return found


def _batches(order: list[int], total: list[int], batch: int, vocab: int) -> Iterator[list[int]]:
    """Rows in ascending length, as many at once as `batch` and the memory of their logits allow."""
    rows: list[int] = []
    for row in order:
        if rows and (len(rows) == batch or (len(rows) + 1) * total[row] * vocab > LOGITS_AT_ONCE):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


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
        chosen = log_p.gather(1, torch.tensor(list(completion), device=device)[:, None])[:, 0]
        # A token of probability 0 has log-prob −∞ and adds 0 · −∞ = 0 to the entropy.
        found.append((chosen.cpu(), -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1).cpu()))
    return found
