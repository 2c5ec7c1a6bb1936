"""Room: how many rows and tokens of a model go through it together, from its shape and a budget of memory.

    M   what passes may hold: the budget less the weights and 3/4 GiB for Python and its libraries; without a budget
        1.5 GiB, at most an eighth of the machine's memory; on a GPU half of what the weights leave of its memory

A token takes, in numbers of the model's precision, with D, I the widths of its layers and of their MLPs:

    k = 2 · layers · key heads · head size        kept as keys and values
    f = 16 D + 8 I                                going forward
    g = f + layers · (16 D + 3 I)                 going forward with what a backward pass needs
    t = (1 + 2 n) f + 6 n · heads · L             with tangents along n directions, and their attention in a row of L

    rows of a decoding step   ¾ M / (1.2 k (L + 32) + 8 V)        V the vocabulary; ¼ M holds the prefixes
    tokens of a pass          M / f,   M / g,   M / t          M / (f + layers · heads · L) with every attention weight
    rows of a training pass   M' / (g L + 4 V n)               n tokens written

A process that trains has M' for all of them: M less three numbers for each parameter in training (gradient, moments),
M / 2 at least where no budget is given.

f and g are within a fifth of what SmolLM2-135M was seen to take (83 KB and 1.6 MB). Vectors as large as the model,
such as a gradient, come on top, where no budget is given. Wherever a single row takes more than there is, it goes
alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokencredit import limits
from tokencredit.lm.models import CausalModel

LIBRARIES = 3 << 28
"""Bytes of Python, torch and transformers before anything is computed."""
USUAL = 3 << 29
LEAST = 1 << 28
"""Bytes for passes by default on a CPU, and below which a budget is refused."""
SPARE = 32
"""Columns of a cache that are free for the next tokens."""


@dataclass(frozen=True)
class Room:
    """M as `space`, in bytes, and what a token of this model takes of it, in bytes too: `cached` k, `forward` f,
    `graph` g, `logits` 8 V, and `column` of one layer's attention weights.
    """

    space: int
    cached: int
    forward: int
    graph: int
    logits: int
    column: int
    layers: int

    @classmethod
    def of(cls, model: CausalModel, memory: int | None = None, place: torch.device | None = None) -> Room:
        """The room of a model. memory: bytes that the whole process may take, weights included, as of --memory; place:
        where the model will be, if it is not there yet.

        ValueError where the weights leave too little of it.
        """
        shape = _Shape.of(model)
        numbers = 16 * shape.width + 8 * shape.inner
        return cls(
            space=_space(model, memory, place),
            cached=shape.size * 2 * shape.layers * shape.key_heads * shape.head,
            forward=shape.size * numbers,
            graph=shape.size * (numbers + shape.layers * (16 * shape.width + 3 * shape.inner)),
            logits=max(shape.size, 4) * 8 * shape.vocabulary,
            column=shape.size * shape.heads,
            layers=shape.layers,
        )

    def beside(self, taken: int) -> Room:
        """The room beside what takes so many bytes: half of it at least."""
        return replace(self, space=max(self.space - taken, self.space // 2))

    def rows(self, length: int) -> int:
        """Rows that are decoded together, up to `length` tokens each, prompt included; at least one."""
        return max(int(0.75 * self.space / (1.2 * self.cached * (length + SPARE) + self.logits)), 1)

    def prefixes(self) -> int:
        """Tokens whose keys and values are kept beside those rows. While some are read, the last ones are still
        there.
        """
        return max(self.space // 4 // max(2 * self.cached + self.forward, 1), 1)

    def tokens(self) -> int:
        """Tokens of a pass without gradients."""
        return max(self.space // max(self.forward, 1), 1)

    def tokens_back(self) -> int:
        """Tokens of a pass that a backward pass follows."""
        return max(self.space // max(self.graph, 1), 1)

    def rows_trained(self, length: int, written: int) -> int:
        """Rows of a training pass, at least one: `written` of `length` tokens each have a loss."""
        return max(self.space // (self.graph * length + self.logits // 2 * written), 1)

    def tokens_along(self, length: int, directions: int = 1) -> int:
        """Tokens of a forward-mode pass along some directions at once, in rows of at most `length`."""
        return max(self.space // max((1 + 2 * directions) * self.forward + 6 * directions * self.column * length, 1), 1)

    def tokens_attending(self, length: int) -> int:
        """Tokens of a pass that keeps the attention weights of all layers, in rows of at most `length`."""
        return max(self.space // max(self.forward + self.layers * self.column * length, 1), 1)


@dataclass(frozen=True)
class _Shape:
    """What a configuration says of a model; 0 of what it does not say."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    size: int

    @classmethod
    def of(cls, model: CausalModel) -> _Shape:
        config = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config

        def number(*names: str) -> int:
            found = (getattr(config, name, None) for name in names)
            return next((value for value in found if isinstance(value, int)), 0)

        width, heads = number("hidden_size", "n_embd", "d_model"), number("num_attention_heads", "n_head")
        return cls(
            layers=number("num_hidden_layers", "n_layer"),
            width=width,
            inner=(number("intermediate_size", "n_inner") or 4 * width) * max(number("num_experts_per_tok"), 1),
            heads=heads,
            key_heads=number("num_key_value_heads") or heads,
            head=number("head_dim") or width // max(heads, 1),
            vocabulary=number("vocab_size"),
            size=next(model.parameters()).element_size(),
        )


def beside_training(
    model: CausalModel,
    memory: int | None = None,
    trained: int | None = None,
    place: torch.device | None = None,
    held: int = 0,
) -> int:
    """The memory, as `Room.of` takes it, of passes in a process that trains the model and may take `memory` in all:
    gradient and moments of the parameters in training, of `trained` bytes, stay where they are meanwhile, and `held`
    bytes of reference models.

    ValueError where they leave too little of a budget.
    """
    if trained is None:
        trained = size_of(model, trained=True)
    if memory is None:
        return _taken(model, place) + max(Room.of(model, None, place).beside(3 * trained).space, LEAST)
    if memory < (least := _taken(model, place) + 3 * trained + held + LEAST):
        gib, reference = 2**30, ", a reference model" if held else ""
        raise ValueError(
            f"--memory {memory / gib:.3g}G is too little to train: weights{reference}, gradient, moments and the"
            f" libraries take {(least - LEAST) / gib:.2g} GiB, so give at least {least / gib + 0.005:.2f}G, or train"
            " adapters (--set peft.r=8)"
        )
    return memory - 3 * trained - held


def of_training(model: CausalModel, adapters: bool = False) -> int:
    """Bytes that a process takes by default which trains the model on a CPU, all of it or adapters."""
    trained = 0 if adapters else size_of(model)
    return beside_training(model, None, trained, torch.device("cpu")) + 3 * trained


def size_of(model: CausalModel, trained: bool = False) -> int:
    """Bytes of the weights, or of those in training alone."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


def _taken(model: CausalModel, place: torch.device | None = None) -> int:
    """Bytes of the weights and, on a CPU, of the libraries."""
    place = place or next(model.parameters()).device
    return size_of(model) + (LIBRARIES if place.type == "cpu" else 0)


def _space(model: CausalModel, memory: int | None, place: torch.device | None = None) -> int:
    """M in bytes."""
    taken, place = _taken(model, place), place or next(model.parameters()).device
    if memory is None:
        if place.type == "cuda":
            return max((torch.cuda.get_device_properties(place).total_memory - taken) // 2, LEAST)
        return max(min(USUAL, limits.memory() // 8), LEAST)
    if memory < taken + LEAST:
        raise ValueError(
            f"--memory {memory / 2**30:.3g}G is too little: the weights and the libraries take {taken / 2**30:.2g} GiB,"
            f" so give at least {(taken + LEAST) / 2**30 + 0.005:.2f}G"
        )
    return memory - taken
