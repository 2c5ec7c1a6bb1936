"""Passes over a batch of rollouts: values, one reverse pass, one forward-mode pass.

    reverse    ∇_θ Σᵢₜ (wᵢₜ log πᵢₜ + eᵢₜ Hᵢₜ)                  one vector, whatever the weights
    forward    ∇ log πᵢₜ · u and ∇Hᵢₜ · u                        every token at once, for one direction u

πᵢₜ the sampled token's probability at the sampling temperature, Hᵢₜ the entropy of its distribution over the full
vocabulary, in nats. Row by row the weights are the caller's; rows of similar length go together, as many as there is
room for. Sums over the batch are float64, those of large models as `vectors` keeps them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tokencredit.dynamics.vectors import FINE, Vector, condensed, dot, kept_as, size
from tokencredit.lm.attention import differentiable_attention
from tokencredit.lm.head import Head, head_statistics
from tokencredit.lm.models import CausalModel
from tokencredit.lm.readout import Readout, Sequences, evaluating, find_readout
from tokencredit.lm.room import Room
from tokencredit.lm.scoring import pad

TOKENS = 1 << 14
"""Tokens, prompts included, of the rows that go through the model together, at most."""


class Passes:
    """A model and the completions that are looked at: prompts and completions are token ids, one pair per row; results
    are [B, T].

    parameters  the trainable ones by name: what a vector has an entry for
    width       T, where it is more than the longest completion has
    tokens      that go through the model together, at most; memory, bytes of the process, may allow fewer (`lm.room`)
    softmax     of the logits and what is made of them, such as float64 behind a body in float32; None for the model's
                own, float32 at least
    """

    def __init__(
        self,
        model: CausalModel,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        tokens: int = TOKENS,
        width: int = 0,
        memory: int | None = None,
        softmax: torch.dtype | None = None,
    ) -> None:
        if not any(len(completion) for completion in completions):
            raise ValueError("no completion has a token: there is nothing to differentiate")
        self.model, self.num_rows, self.room = model, len(completions), Room.of(model, memory)
        self.softmax = softmax
        self.most, self.tokens = tokens, min(tokens, self.room.tokens())
        self.width = max(width, max(len(completion) for completion in completions))
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        device = next(model.parameters()).device
        self.batch: Sequences = pad(prompts, completions, device)
        start = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.place = (self.batch.origin[0], self.batch.origin[1] - start[self.batch.origin[0]])
        with evaluating(model):
            self.readout: Readout = find_readout(model, self.batch.ids[0][self.batch.attention[0].bool()], temperature)

    @property
    def large(self) -> bool:
        """Whether a reverse pass for a few rows costs much more than starting one does."""
        return size(self.parameters) > FINE

    @property
    def at_once(self) -> int:
        """Directions of a large model that there is room for."""
        return max(self.room.space // (2 * size(self.parameters)), 1)

    def values(self) -> tuple[Tensor, Tensor]:
        """(log π, H) [B, T], 0 off the completions; no gradient."""
        found = [torch.zeros(len(self.batch), dtype=torch.float64) for _ in range(2)]
        with torch.no_grad(), evaluating(self.model):
            for part, keep in self.batch.chunks(self.tokens):
                for store, x in zip(found, self._statistics(part)):
                    store[keep.cpu()] = x.double().cpu()
        return tuple(map(self.grid, found))

    def reverse(self, logprob_weight: Tensor | None = None, entropy_weight: Tensor | None = None) -> Vector:
        """∇ Σ (w log π + e H) over the parameters, float64; weights are [B, T], None for none."""
        weights = [None if w is None else self._at_tokens(w) for w in (logprob_weight, entropy_weight)]
        dtype = kept_as(self.parameters)
        found = {name: torch.zeros(p.shape, dtype=dtype, device=p.device) for name, p in self.parameters.items()}
        tokens = min(self.most, self.room.tokens_back())
        with torch.enable_grad(), evaluating(self.model), _gathered(self.parameters, found):
            for part, keep in self._weighted(weights, tokens):
                values = self._statistics(part)
                goal = sum((w[keep].to(x.dtype) * x).sum() for w, x in zip(weights, values) if w is not None)
                goal.backward(inputs=list(self.parameters.values()))
        return found

    def products(self, weights: Sequence[Tensor], groups: Sequence[Tensor], directions: Sequence[Vector]) -> Tensor:
        """[K, G]: ⟨∇ Σ (w log π + e H), u⟩ over the rows of each group ([B] bool), for K directions: a reverse pass
        for a group, and a product for a direction. The directions are held meanwhile, `at_once` of them.
        """
        if len(directions) > self.at_once:
            some = (directions[k : k + self.at_once] for k in range(0, len(directions), self.at_once))
            return torch.cat([self.products(weights, groups, each) for each in some])
        held = [condensed(u) for u in directions]
        found = torch.zeros(len(held), len(groups), dtype=torch.float64)
        for q, rows in enumerate(groups):
            if rows.any() and any(w[rows].any() for w in weights):
                gradient = self.reverse(*(w * rows[:, None] for w in weights))
                found[:, q] = torch.tensor([dot(gradient, u) for u in held], dtype=torch.float64)
        return found

    def by_row(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(log π [n] with its graph, the place of these tokens among the scored ones) of one row after another."""
        for part, keep in self.batch.chunks(1):
            with torch.enable_grad(), evaluating(self.model):
                logprob = self._statistics(part)[0]
            yield logprob, keep

    def forward(self, direction: Vector, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(∇log π · u, ∇H · u) [B, T], float64 holding what the model's precision gives, along one direction; 0 in the
        rows where a weight [B, T] is 0 throughout.
        """
        u = {name: direction[name].to(p.device, p.dtype) for name, p in self.parameters.items()}
        tokens = min(self.most, self.room.tokens_along(self.batch.ids.shape[1]))
        some = self.batch.chunks(tokens) if weight is None else self._weighted([self._at_tokens(weight)], tokens)
        found = [torch.zeros(len(self.batch), dtype=torch.float64) for _ in range(2)]
        with torch.no_grad(), evaluating(self.model), differentiable_attention(self.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part, keep in some:
                _, tangents = torch.func.jvp(lambda there: self._at(part, there), (self.parameters,), (u,))  # noqa: B023
                for store, x in zip(found, tangents):
                    store[keep.cpu()] = x.double().cpu()
        return tuple(map(self.grid, found))

    def _at(self, part: Sequences, there: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(log π, H) [N] of a chunk with other parameters in place of the model's, differentiable in them."""
        body, head = self.readout.body, self.readout.head
        other = {id(p): there[name] for name, p in self.parameters.items()}
        inner = {name: other[id(p)] for name, p in body.named_parameters() if id(p) in other}
        hidden = self.readout.hidden(
            part.ids, part.attention, lambda **inputs: functional_call(body, inner, (), inputs)
        )
        weight, bias = (other.get(id(x), x) for x in (head.weight, head.bias))
        chosen = self._wide(hidden[part.row, part.position])
        return statistics(chosen, replace(head, weight=weight, bias=bias), part.target)

    def _wide(self, hidden: Tensor) -> Tensor:
        return hidden if self.softmax is None else hidden.to(self.softmax)

    def grid(self, values: Tensor) -> Tensor:
        """[N] -> [B, T] on the CPU, 0 off the completions."""
        return values.new_zeros(self.num_rows, self.width).index_put_(tuple(x.cpu() for x in self.place), values)

    def _statistics(self, part: Sequences) -> tuple[Tensor, Tensor]:
        hidden = self.readout.hidden(part.ids, part.attention)[part.row, part.position]
        return statistics(self._wide(hidden), self.readout.head, part.target)

    def _at_tokens(self, weight: Tensor) -> Tensor:
        """[B, T] -> [N] of the scored tokens, where they are."""
        return weight.to(self.place[0].device)[self.place].double()

    def _weighted(self, weights: Sequence[Tensor | None], tokens: int) -> Iterator[tuple[Sequences, Tensor]]:
        """The chunks of the rows in which some weight is not 0."""
        some = sum((w != 0).long() for w in weights if w is not None)
        rows = torch.zeros(self.num_rows, dtype=torch.long, device=some.device).index_add_(0, self.batch.row, some) > 0
        keep = rows[self.batch.row].nonzero()[:, 0]
        chosen = replace(
            self.batch,
            row=self.batch.row[keep],
            position=self.batch.position[keep],
            target=self.batch.target[keep],
            origin=tuple(x[keep] for x in self.batch.origin),
        )
        for part, index in chosen.chunks(tokens):
            yield part, keep[index]


@contextmanager
def _gathered(parameters: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[None]:
    """Adds every gradient of a backward pass to `found` as it is made, and lets it go; `.grad` is left as it was."""
    before = {name: p.grad for name, p in parameters.items()}

    def gather(name: str) -> Any:
        def hook(p: Tensor) -> None:
            found[name].add_(p.grad)
            p.grad = None

        return hook

    handles = [p.register_post_accumulate_grad_hook(gather(name)) for name, p in parameters.items()]
    for p in parameters.values():
        p.grad = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.grad = before[name]


def statistics(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log π, H) [N] from hidden states [N, D]; of a model whose head is not told apart, hidden states are raw
    logits.
    """
    if head.weight is not None:
        found = head_statistics(hidden, head, targets)
        return found.logprob, found.entropy
    log_p = head.logits(hidden).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(
        1
    )
