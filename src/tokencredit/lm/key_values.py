"""Key-value caches that are shared and rearranged: one prefill per trace, any prefix of it handed to any number of
rows.

Rows of one batch have prefixes of different length. Their keys stand flush right: row r uses columns start[r] … width−1
and the columns before are padding that the attention mask hides. So a row may join at any step, into the place of one
that has ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from tokencredit.lm.models import CausalModel

ROOM = 32  # columns kept free for the next tokens


class RoomyLayer(DynamicLayer):
    """Keys and values [n, heads, capacity, size] of which columns `low` … `width`−1 are in use: a new token is one
    small copy.
    """

    def __init__(self, keys: Tensor, values: Tensor, width: int) -> None:
        super().__init__()
        self.keys, self.values, self.width, self.low = keys, values, width, 0
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stop = self.width + keys.shape[-2]
        if stop > self.keys.shape[-2]:
            self.keys, self.values = (_widen(old, stop + ROOM) for old in (self.keys, self.values))
        self.keys[:, :, self.width : stop], self.values[:, :, self.width : stop] = keys, values
        self.width = stop
        return self.keys[:, :, self.low : stop], self.values[:, :, self.low : stop]

    def get_seq_length(self) -> int:
        return self.width - self.low


def _widen(old: Tensor, capacity: int) -> Tensor:
    new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


def check_shareable(model: CausalModel) -> None:
    """ValueError for a model whose memory of a prefix is not keys and values of each token, and so cannot be cut back
    to a prefix.
    """
    foreign = {
        type(layer).__name__
        for layer in DynamicCache(config=model.config).layers
        if not isinstance(layer, DynamicLayer)
    }
    foreign |= {
        type(x).__name__ for x in DynamicCache(config=model.config).layers if "LinearAttention" in type(x).__name__
    }
    if foreign:
        raise ValueError(
            f"{type(model).__name__} keeps a state that cannot be cut back to a prefix ({', '.join(sorted(foreign))}); "
            "prefix sampling needs a model with attention layers only"
        )


def takes(model: CausalModel, argument: str) -> bool:
    """Does the model's forward name this argument? Wrappers (PEFT) are looked through."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(inner.forward).parameters


def cached(model: CausalModel, cache: Any) -> dict[str, Any]:
    """The arguments by which a model's forward takes and keeps a cache: `cache`, or `past_key_values` where its
    transformers is older.
    """
    return {"cache" if takes(model, "cache") else "past_key_values": cache, "use_cache": True}


def prefill(model: CausalModel, sequences: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer [R, heads, L, size] for token sequences, flush left; what stands past a sequence's
    end is padding.
    """
    device = next(model.parameters()).device
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[s[0]] * (width - len(s))] for s in sequences], device=device)
    # Attention is causal, so padding on the right needs no mask: no token before it can see it.
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    model(input_ids=ids, **cached(model, cache), **last)
    return [(layer.keys, layer.values) for layer in cache.layers]


Layers = list[Any]
"""(keys, values) [rows, heads, columns, size] of every layer."""


@dataclass(frozen=True)
class Piece:
    """Rows of a source: of row[k] the columns first[k] … first[k]+num[k]−1."""

    layers: Layers
    row: Tensor
    first: Tensor
    num: Tensor


class RowCache:
    """The caches of the rows being decoded: `length` [n] tokens of each are in it, flush right."""

    def __init__(self, length: Tensor, layers: list[RoomyLayer]) -> None:
        self.length, self.layers, self.cache = length, layers, Cache(layers=layers)

    @property
    def width(self) -> int:
        return self.layers[0].width

    def drop(self) -> None:
        """Lets its memory go; it is of no use afterwards."""
        for layer in self.layers:
            layer.keys = layer.values = None

    @classmethod
    def gather(cls, pieces: Sequence[Piece], old: RowCache | None = None) -> RowCache:
        """A new cache with the rows of several sources, one after the other. `old` is taken apart meanwhile: what its
        layers held is let go layer by layer, so that both never stand side by side.
        """
        length = torch.cat([piece.num for piece in pieces])
        width, layers = int(length.max()), []
        for depth in range(len(pieces[0].layers)):
            like = pieces[0].layers[depth]
            new = [x.new_zeros(len(length), x.shape[1], width + ROOM, x.shape[3]) for x in like]
            layers.append(RoomyLayer(*new, width))
            slot = 0
            for piece in pieces:
                to = torch.arange(slot, slot + len(piece.row), device=length.device)
                _fill(layers[-1], to, piece, depth)
                slot += len(piece.row)
            if old is not None:
                pieces[0].layers[depth] = ()
                old.layers[depth].keys = old.layers[depth].values = None
        return cls(length, layers)

    def piece(self, rows: Tensor) -> Piece:
        """Some of the rows, as a source."""
        return Piece(
            [(layer.keys, layer.values) for layer in self.layers],
            rows,
            self.width - self.length[rows],
            self.length[rows],
        )

    def fits(self, piece: Piece) -> bool:
        """Can these rows be put in the place of others? Their prefixes must not be wider than what is there, and room
        must be left.
        """
        return int(piece.num.max()) <= self.width < self.layers[0].keys.shape[2]

    def replace(self, slots: Tensor, piece: Piece) -> None:
        """The rows in `slots` give way to those of a piece that fits."""
        for depth, layer in enumerate(self.layers):
            _fill(layer, slots, piece, depth)
        self.length[slots] = piece.num

    def forward(self, model: CausalModel, token: Tensor, alive: Tensor) -> Tensor:
        """Next-token logits [n,V] after adding one token [n] to every row. Columns that only rows not `alive` [n] use
        are left out.
        """
        longest = int(torch.where(alive, self.length, 0).max())
        self.length = self.length.clamp_max(longest)
        start = longest - self.length
        low = self.width - longest
        for layer in self.layers:
            layer.low = low
        columns = torch.arange(longest + 1, device=token.device)
        mask = None if not bool(start.any()) else (columns >= start[:, None]).long()
        out = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=self.length[:, None],
            **cached(model, self.cache),
        )
        self.length = self.length + 1
        return out.logits[:, -1]


def _fill(layer: RoomyLayer, slots: Tensor, piece: Piece, depth: int) -> None:
    """Writes a piece's rows flush right into `slots` of a layer."""
    wide = int(piece.num.max())
    offset = torch.arange(wide, device=slots.device) - (wide - piece.num)[:, None]
    for new, source in zip((layer.keys, layer.values), piece.layers[depth]):
        columns = (offset + piece.first[:, None]).clamp_(0, max(0, source.shape[2] - 1))
        # Indices on both sides of a slice put the rows and columns first: [n, wide, heads, size] on either side.
        new[:, :, layer.width - wide : layer.width].transpose(1, 2)[slots] = source[piece.row[:, None], :, columns]
