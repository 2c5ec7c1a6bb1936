"""Passes over a batch of rollouts: values, one reverse pass, one forward-mode pass.

    reverse    ∇_θ Σᵢₜ (wᵢₜ log πᵢₜ + eᵢₜ Hᵢₜ)                  one vector, whatever the weights
    forward    ∇ log πᵢₜ · u and ∇Hᵢₜ · u                        every token at once, for one direction u

πᵢₜ the sampled token's probability at the sampling temperature, Hᵢₜ the entropy of its distribution over the full
vocabulary, in nats. Row by row the weights are the caller's; rows of similar length go together, as many as there is
room for, and in a large model completions of one prompt share it. Sums over the batch are float64, those of large
models as `vectors` keeps them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tokencredit.dynamics.sweep import ALL, Sweep
from tokencredit.dynamics.vectors import Filed, Vector, condensed, dots, kept_as, large, size, trained
from tokencredit.lm.attention import differentiable_attention
from tokencredit.lm.head import Head, head_statistics
from tokencredit.lm.models import CausalModel
from tokencredit.lm.readout import Readout, Sequences, evaluating, find_readout
from tokencredit.lm.room import Room
from tokencredit.lm.scoring import pad
from tokencredit.lm.shared_prompts import shared, shares_prompts

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
    scratch     folder of the vectors of a large model on a CPU; None keeps them in memory
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
        scratch: Path | None = None,
    ) -> None:
        if not any(len(completion) for completion in completions):
            raise ValueError("no completion has a token: there is nothing to differentiate")
        self.model, self.num_rows, self.room = model, len(completions), room_of(model, memory)
        self.softmax = softmax
        self.most, self.tokens = tokens, min(tokens, self.room.tokens())
        self.width = max(width, max(len(completion) for completion in completions))
        self.parameters = trained(model)
        device = next(model.parameters()).device
        self.batch: Sequences = pad(prompts, completions, device)
        self.start = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.place = (self.batch.origin[0], self.batch.origin[1] - self.start[self.batch.origin[0]])
        self.scratch = scratch if self.large and device.type == "cpu" else None
        with evaluating(model):
            self.readout: Readout = find_readout(model, self.batch.ids[0][self.batch.attention[0].bool()], temperature)

    @property
    def large(self) -> bool:
        """Whether a reverse pass for a few rows costs much more than starting one does."""
        return large(self.parameters)

    @property
    def at_once(self) -> int:
        """Directions of a large model that there is room for; those in files take none."""
        return self.room.space // (2 * size(self.parameters)) or 1 if self.scratch is None else ALL

    @cached_property
    def shared(self) -> bool:
        """Whether completions of one prompt go through the model in one row."""
        if not self.large:
            return False
        prompts = {tuple(ids[:n].tolist()) for ids, n in zip(self.batch.ids, self.start)}
        if len(prompts) == self.num_rows:
            return False
        with evaluating(self.model):
            return shares_prompts(self.readout, self.batch.ids[0])

    def kept(self, vector: Vector, name: str = "") -> Vector:
        """A vector that is there, where this model's vectors are kept; with a name, where they are files, for later
        processes too.
        """
        return vector if self.scratch is None else Filed(vector, self.scratch, name)

    def held(self, direction: Vector) -> Vector:
        """A direction that products are made with, of a large model `condensed`, where its vectors are kept."""
        if not self.large or isinstance(direction, Filed):
            return direction
        return self.kept(condensed(direction)) if self.scratch else dict(condensed(direction))

    def values(self) -> tuple[Tensor, Tensor]:
        """(log π, H) [B, T], 0 off the completions; no gradient."""
        found = [torch.zeros(len(self.batch), dtype=torch.float64) for _ in range(2)]
        with torch.no_grad(), evaluating(self.model):
            for part, keep in self.parts(self.tokens):
                for store, x in zip(found, self._statistics(part)):
                    store[keep.cpu()] = x.double().cpu()
        return tuple(map(self.grid, found))

    def reverse(
        self, logprob_weight: Tensor | None = None, entropy_weight: Tensor | None = None, name: str = ""
    ) -> Vector:
        """∇ Σ (w log π + e H) over the parameters, a kept vector; weights are [B, T], None for none. Under a name it is
        made once, by whichever process.
        """
        if name and self.scratch is not None and (there := Filed.found(self.scratch, name)) is not None:
            return there
        found = self.zero()
        self._backward([(logprob_weight, entropy_weight)], lambda _, key, g: found[key].add_(g))
        return self.kept(found, name)

    def products(
        self,
        weightings: Sequence[Sequence[Tensor]],
        groups: Sequence[Tensor],
        directions: Sequence[Vector],
        wholes: Sequence[Mapping[str, Tensor] | None] = (None,),
        sweep: Sweep | None = None,
    ) -> Tensor:
        """[K, G]: ⟨∇ Σ (w log π + e H), u⟩ over the rows of each group ([B] bool), with the first weighting (w, e), for
        K directions. A reverse pass for a group, each entry of whose gradient is multiplied with that of every
        direction and let go; of directions there are `at_once` at a time.

        wholes   a vector for every weighting, to which its gradients over the groups are added, or None
        sweep    is told of every group, and may know of some already
        """
        found = torch.zeros(len(directions), len(groups), dtype=torch.float64)
        times, sweep = range(0, max(len(directions), 1), self.at_once), sweep or Sweep()
        known = sweep.begin(len(times) * len(groups), found, wholes, self.at_once)
        for time, first in enumerate(times):
            held = [self.held(u) for u in directions[first : first + self.at_once]]
            needed = weightings if first == 0 else weightings[:1]

            def heard(q: int, k: int, name: str, g: Tensor) -> None:
                if k == 0:
                    found[first : first + len(held), q] += dots(g, [u[name] for u in held])  # noqa: B023
                if first == 0 and (whole := wholes[k]) is not None:  # noqa: B023
                    whole[name].add_(g)

            for q, rows in enumerate(groups):
                done = time * len(groups) + q + 1
                if done > known:
                    self.tell_gradients(needed, rows, partial(heard, q))
                    sweep.heard(done, found, wholes)
        return found

    def tell_gradients(
        self, weightings: Sequence[Sequence[Tensor]], rows: Tensor, heard: Callable[[int, str, Tensor], Any]
    ) -> None:
        """Tells `heard` of ∇ Σ (w log π + e H) over some rows ([B] bool) under every weighting (w, e), parameter by
        parameter, as a reverse pass makes them: the weighting's number, the parameter's name, its gradient, of many
        rows in parts that add up. No vector is held.
        """
        some = [[x * rows[:, None] for x in each] for each in weightings]
        if any(x.any() for each in some for x in each):
            self._backward(some, heard)

    def zero(self) -> dict[str, Tensor]:
        """A vector of zeros, in memory."""
        dtype = kept_as(self.parameters)
        return {name: torch.zeros(p.shape, dtype=dtype, device=p.device) for name, p in self.parameters.items()}

    def _backward(
        self, weightings: Sequence[Sequence[Tensor | None]], heard: Callable[[int, str, Tensor], Any]
    ) -> None:
        """Tells `heard` of ∇ Σ (w log π + e H) for every weighting, chunk by chunk and parameter by parameter: the
        weighting's number, the parameter's name, its gradient.
        """
        flat = [[None if w is None else self._at_tokens(w) for w in some] for some in weightings]
        tokens = min(self.most, self.room.tokens_back())
        with torch.enable_grad(), evaluating(self.model):
            for part, keep in self.parts(tokens, [w for some in flat for w in some if w is not None]):
                values = self._statistics(part)
                for k, some in enumerate(flat):
                    goal = sum((w[keep].to(x.dtype) * x).sum() for w, x in zip(some, values) if w is not None)
                    with _gathered(self.parameters, partial(heard, k)):
                        goal.backward(inputs=list(self.parameters.values()), retain_graph=k + 1 < len(flat))

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
        some = self.parts(tokens, [] if weight is None else [self._at_tokens(weight)])
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
        chosen = self._wide(self.states(part, lambda **inputs: functional_call(body, inner, (), inputs)))
        weight, bias = (other.get(id(x), x) for x in (head.weight, head.bias))
        return statistics(chosen, replace(head, weight=weight, bias=bias), part.target)

    def _wide(self, hidden: Tensor) -> Tensor:
        return hidden if self.softmax is None else hidden.to(self.softmax)

    def grid(self, values: Tensor) -> Tensor:
        """[N] -> [B, T] on the CPU, 0 off the completions."""
        return values.new_zeros(self.num_rows, self.width).index_put_(tuple(x.cpu() for x in self.place), values)

    def _statistics(self, part: Sequences) -> tuple[Tensor, Tensor]:
        return statistics(self._wide(self.states(part)), self.readout.head, part.target)

    def states(self, part: Sequences, body: Any = None) -> Tensor:
        """[N, D]: the hidden states that predict the scored tokens of a chunk."""
        return self.readout.hidden(part.ids, part.attention, body, **part.inputs)[part.row, part.position]

    def _at_tokens(self, weight: Tensor) -> Tensor:
        """[B, T] -> [N] of the scored tokens, where they are."""
        return weight.to(self.place[0].device)[self.place].double()

    def parts(self, tokens: int, weights: Sequence[Tensor] = ()) -> Iterator[tuple[Sequences, Tensor]]:
        """(chunks of at most about `tokens` tokens, the indices of their scored tokens): of all rows, or of those in
        which some weight [N] is not 0; where prompts are shared, of such rows up to the last one.
        """
        chosen, keep = self.batch, torch.arange(len(self.batch), device=self.batch.row.device)
        if weights:
            some = sum((w != 0).long() for w in weights)
            rows = torch.zeros(self.num_rows, dtype=torch.long, device=keep.device).index_add_(0, chosen.row, some) > 0
            keep = (some > 0 if self.shared else rows[chosen.row]).nonzero()[:, 0]
            tokenwise = {name: getattr(chosen, name)[keep] for name in ("row", "position", "target")}
            chosen = replace(chosen, **tokenwise, origin=tuple(x[keep] for x in chosen.origin))
        chunks = shared(chosen, self.start, tokens) if self.shared else chosen.chunks(tokens)
        for part, index in chunks:
            yield part, keep[index]


def room_of(model: CausalModel, memory: int | None) -> Room:
    """What passes may hold: of a budget for the whole process, a large model's gradient comes off."""
    parameters, room = trained(model), Room.of(model, memory)
    if memory is None or not large(parameters):
        return room
    return room.beside(size(parameters) * kept_as(parameters).itemsize)


@contextmanager
def _gathered(parameters: Mapping[str, Tensor], heard: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Tells `heard` of every gradient of a backward pass as it is made, and lets it go; `.grad` is left as it was."""
    before = {name: p.grad for name, p in parameters.items()}

    def gather(name: str) -> Any:
        def hook(p: Tensor) -> None:
            heard(name, p.grad)
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
