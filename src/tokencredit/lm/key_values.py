"""Key-value caches that are shared and rearranged: one prefill per trace, any prefix of it handed to any number of rows.

Rows of one batch have prefixes of different length. Their keys stand flush right: row r uses columns start[r] … width−1 and the columns
before are padding that the attention mask hides; so a row may join or leave at any step, by a gather.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 16  # columns kept free for the next tokens


class RoomyLayer(DynamicLayer):
    """Keys and values [n, heads, capacity, size] of which `width` columns are written: a new token is one small copy."""

    def __init__(self, keys: Tensor, values: Tensor, width: int) -> None:
        super().__init__()
        self.keys, self.values, self.width = keys, values, width
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stop = self.width + keys.shape[-2]
        if stop > self.keys.shape[-2]:
            self.keys, self.values = (_widen(old, stop + ROOM) for old in (self.keys, self.values))
        self.keys[:, :, self.width : stop], self.values[:, :, self.width : stop] = keys, values
        self.width = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.width


def _widen(old: Tensor, capacity: int) -> Tensor:
    new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


def check_shareable(model: Any) -> None:
    """ValueError for a model whose memory of a prefix is not keys and values of each token, and so cannot be cut back to a prefix."""
    foreign = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers if not isinstance(layer, DynamicLayer)}
    foreign |= {type(x).__name__ for x in DynamicCache(config=model.config).layers if "LinearAttention" in type(x).__name__}
    if foreign:
        raise ValueError(f"{type(model).__name__} keeps a state that cannot be cut back to a prefix ({', '.join(sorted(foreign))}); "
                         "prefix sampling needs a model with attention layers only")  # fmt: skip


def takes(model: Any, argument: str) -> bool:
    """Does the model's forward name this argument? Wrappers (PEFT) are looked through."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(inner.forward).parameters


def prefill(model: Any, sequences: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer [R, heads, L, size] for token sequences, flush left; what stands past a sequence's end is padding."""
    device = next(model.parameters()).device
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[s[0]] * (width - len(s))] for s in sequences], device=device)
    # Attention is causal, so padding on the right needs no mask: no token before it can see it.
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    model(input_ids=ids, past_key_values=cache, use_cache=True, **last)
    return [(layer.keys, layer.values) for layer in cache.layers]


class RowCache:
    """The caches of the rows being decoded. `length` [n] tokens of each row are in it, flush right."""

    def __init__(self, length: Tensor, cache: Cache) -> None:
        self.length, self.cache = length, cache

    @property
    def width(self) -> int:
        return self.cache.layers[0].width if self.cache.layers else 0

    @classmethod
    def gather(cls, pieces: Sequence[tuple[Sequence[tuple[Tensor, Tensor]], Tensor, Tensor, Tensor]]) -> RowCache:
        """Rows from several sources, one after the other: (keys and values per layer, row [n], first column [n], number of columns [n])."""
        length = torch.cat([num for _, _, _, num in pieces])
        width = int(length.max())
        layers = []
        for depth in range(len(pieces[0][0])):
            keys, values = (torch.cat([_take(source[depth][which], row, first, num, width) for source, row, first, num in pieces])
                            for which in (0, 1))  # fmt: skip
            layers.append(RoomyLayer(keys, values, width))
        return cls(length, Cache(layers=layers))

    def piece(self, rows: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor, Tensor]:
        """Some of the rows, as a source for `gather`."""
        layers = [(layer.keys, layer.values) for layer in self.cache.layers]
        return layers, rows, self.width - self.length[rows], self.length[rows]

    def forward(self, model: Any, token: Tensor) -> Tensor:
        """Next-token logits [n,V] after adding one token [n] to every row."""
        width = self.width + 1
        start = self.width - self.length
        columns = torch.arange(width, device=token.device)
        mask = None if not bool(start.any()) else (columns >= start[:, None]).long()
        out = model(input_ids=token[:, None], attention_mask=mask, position_ids=self.length[:, None], past_key_values=self.cache,
                    use_cache=True)  # fmt: skip
        self.length = self.length + 1
        return out.logits[:, -1]


def _take(source: Tensor, row: Tensor, first: Tensor, num: Tensor, width: int) -> Tensor:
    """[n, heads, width + ROOM, size]: columns first … first+num−1 of rows of `source`, flush right against `width`."""
    columns = torch.arange(width, device=source.device) - (width - num)[:, None]
    columns = (columns + first[:, None]).clamp_(0, max(0, source.shape[2] - 1))
    out = source.new_zeros(len(row), source.shape[1], width + ROOM, source.shape[3])
    out[:, :, :width] = source[row[:, None], :, columns].transpose(1, 2)
    return out
