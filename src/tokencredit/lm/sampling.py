"""Samples completions with transformers' `generate`: exact token ids, exact sampling distribution, one seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig


@dataclass(frozen=True)
class Completion:
    """Token ids of one completion, its end token included where it was written; `truncated` where the length limit cut it."""

    ids: tuple[int, ...]
    truncated: bool


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    num: int = 1,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 512,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Completion]]:
    """`num` completions of every prompt (token ids); temperature 0 is greedy. `on_batch` hears how many rows are done.

    The full distribution is sampled, whatever top-p or top-k the model's own generation config suggests.
    """
    ends = set(_end_tokens(model, tokenizer))
    greedy = temperature == 0
    settings = GenerationConfig(
        do_sample=not greedy, temperature=None if greedy else temperature, top_p=None if greedy else 1.0, top_k=None if greedy else 0,
        max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends), bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    rows = [i for i in range(len(prompts)) for _ in range(num)]
    found: list[list[Completion]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            encoded = tokenizer.pad({"input_ids": [list(prompts[i]) for i in some]}, padding_side="left", return_tensors="pt").to(device)
            out = model.generate(**encoded, generation_config=settings)[:, encoded["input_ids"].shape[1] :]
            for i, ids in zip(some, out.tolist()):
                found[i].append(_cut(ids, ends))
            if on_batch:
                on_batch(len(some))
    model.train(was_training)
    return found


def _cut(ids: list[int], ends: set[int]) -> Completion:
    for position, token in enumerate(ids):
        if token in ends:
            return Completion(tuple(ids[: position + 1]), False)
    return Completion(tuple(ids), True)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    many = configured if isinstance(configured, list) else [configured]
    ends = {token for token in [*many, tokenizer.eos_token_id] if token is not None}
    if not ends:
        raise ValueError("neither the tokenizer nor the generation config names an end-of-sequence token: completions could not end")
    return sorted(ends)
