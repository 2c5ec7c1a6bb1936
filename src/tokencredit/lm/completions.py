"""Completions of prompts: sampled, or greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokencredit.lm.distribution import Settings, seed_of
from tokencredit.lm.models import CausalModel, Tokenizer
from tokencredit.lm.prefix_sampler import ROWS, PrefixSampler
from tokencredit.lm.sampling import Progress, Request, Sampler, Trace, end_tokens


@dataclass(frozen=True)
class Completion:
    """Token ids of one completion, its end token included where it was written; `truncated` where the length limit cut
    it.
    """

    ids: tuple[int, ...]
    truncated: bool


def as_arrays(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    """B completions as arrays: `length` and `truncated` [B], and all their `ids`, one after the other."""
    return {
        "length": np.array([len(each.ids) for each in completions], int),
        "truncated": np.array([each.truncated for each in completions], bool),
        "ids": np.array([token for each in completions for token in each.ids], int),
    }


def of_arrays(arrays: Mapping[str, np.ndarray]) -> list[Completion]:
    """Completions of `as_arrays`."""
    ids = np.split(arrays["ids"], np.cumsum(arrays["length"])[:-1])
    return [Completion(tuple(own.tolist()), bool(cut)) for own, cut in zip(ids, arrays["truncated"])]


def sample(
    model: CausalModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    num: int = 1,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = ROWS,
    memory: int | None = None,
    first: int = 0,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """`num` completions of every prompt (token ids); temperature 0 is greedy. At most `batch` are written together, and
    no more than `memory` bytes of the process allow (`lm.room`).

    The full distribution is sampled, whatever top-p or top-k the model's own generation config suggests. The k-th
    completion of the i-th prompt depends on the seed, i and k, and not on `batch`; i counts from `first`, for prompts
    that are a part of more.
    """
    if temperature < 0:
        raise ValueError(f"temperature is 0 (greedy) or positive, got {temperature}")
    sampler = PrefixSampler(
        model, ends=end_tokens(model, tokenizer), settings=Settings(temperature), batch=batch, memory=memory
    )
    options = {"max_new_tokens": max_new_tokens, "seed": seed, "first": first, "progress": progress}
    return sample_by(sampler, prompts, num, **options)


def sample_by(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    num: int = 1,
    *,
    max_new_tokens: int,
    seed: int = 0,
    first: int = 0,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """The same by any sampler."""
    requests = [
        Request(i, 0, max_new_tokens, seed_of(seed, first + i, k)) for i in range(len(prompts)) for k in range(num)
    ]
    found: list[Completion | None] = [None] * len(requests)
    for index, rollout in sampler.continue_([Trace(tuple(prompt)) for prompt in prompts], requests, progress):
        found[index] = Completion(rollout.ids, rollout.truncated)
    return [found[i * num : (i + 1) * num] for i in range(len(prompts))]
