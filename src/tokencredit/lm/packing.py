"""Prompts and completions as one padded batch, with the tokens that are to be scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Ids = Sequence[Sequence[int]]
"""Token ids of rows, each of its own length."""


def pack(prompts: Ids, completions: Ids, device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention, wanted) [B, L] int64, padded on the right: every prompt with its completion behind it; 1 where
    there is a token, and where it is one of the completion.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    width = max((len(p) + len(c) for p, c in zip(prompts, completions)), default=0)
    ids, attention, wanted = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion], dtype=torch.long)
        attention[row, :end], wanted[row, len(prompt) : end] = 1, 1
    return ids.to(device), attention.to(device), wanted.to(device)


def together(order: Sequence[int], lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
    """The rows of `order`, as they come, in lists of at most `rows` of them and, padded to their longest, of at most
    `tokens` tokens; a row that is longer goes alone.

    >>> list(together([0, 1, 2, 3], [2, 2, 3, 9], rows=3, tokens=6))
    [[0, 1], [2], [3]]
    """
    some: list[int] = []
    for row in order:
        longest = max((lengths[i] for i in [*some, row]), default=0)
        if some and (len(some) == rows or (len(some) + 1) * longest > tokens):
            yield some
            some = []
        some = [*some, row]
    if some:
        yield some


def unpack(values: Tensor, wanted: Tensor) -> list[Tensor]:
    """Values [B, L] at the wanted tokens, row by row: a list of [T]."""
    chosen = wanted.bool()
    return list(values[chosen].split(chosen.sum(1).tolist()))


def grid(values: Sequence[Any], width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B, width] of numbers given row by row, 0 behind them."""
    found = torch.zeros(len(values), width, dtype=dtype)
    for row, some in enumerate(values):
        found[row, : len(some)] = torch.as_tensor(some, dtype=dtype)
    return found
