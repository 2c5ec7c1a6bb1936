"""Samples completions with transformers' `generate`: exact token ids, exact sampling distribution, one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

    The full distribution is sampled, whatever the model's own generation config suggests. Torch's random state is left as it was.
    """
    if temperature < 0:
        raise ValueError(f"temperature is 0 (greedy) or positive, got {temperature}")
    ends = end_tokens(model, tokenizer)
    settings = _settings(tokenizer, sorted(ends), max_new_tokens, temperature)
    rows = [i for i in range(len(prompts)) for _ in range(num)]
    found: list[list[Completion]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    with _sampling(model, settings), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            ids, attention = _left_padded([prompts[i] for i in some], tokenizer.pad_token_id)
            out = model.generate(input_ids=ids.to(device), attention_mask=attention.to(device), generation_config=settings)
            for i, written in zip(some, out[:, ids.shape[1] :].tolist()):
                found[i].append(_cut(written, ends))
            if on_batch:
                on_batch(len(some))
    return found


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a completion: the tokenizer's and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    many = configured if isinstance(configured, list) else [configured]
    ends = frozenset(token for token in [*many, tokenizer.eos_token_id] if token is not None)
    if not ends:
        raise ValueError("neither the tokenizer nor the generation config names an end-of-sequence token: completions could not end")
    return ends


def _settings(tokenizer: Any, ends: list[int], max_new_tokens: int, temperature: float) -> GenerationConfig:
    greedy = temperature == 0
    return GenerationConfig(
        do_sample=not greedy, temperature=None if greedy else temperature, top_p=None if greedy else 1.0, top_k=None if greedy else 0,
        max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip


@contextmanager
def _sampling(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """In evaluation mode and without the model's own generation config, which fills in whatever `settings` leaves open."""
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attention = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, attention


def _cut(ids: list[int], ends: frozenset[int]) -> Completion:
    for position, token in enumerate(ids):
        if token in ends:
            return Completion(tuple(ids[: position + 1]), False)
    return Completion(tuple(ids), True)
