"""Passes over a batch of rollouts: values, one reverse pass, one forward-mode pass.

    reverse    ∇_θ Σᵢₜ (wᵢₜ log πᵢₜ + eᵢₜ Hᵢₜ)                  one vector, whatever the weights
    forward    ∇ log πᵢₜ · u and ∇Hᵢₜ · u                        every token at once, for one direction u

πᵢₜ the sampled token's probability at the sampling temperature, Hᵢₜ the entropy of its distribution over the full
vocabulary, in nats. Row by row the weights are the caller's; rows of similar length go together. Sums over the batch
are float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from tokencredit.dynamics.vectors import Vector
from tokencredit.lm.attention import differentiable_attention
from tokencredit.lm.head import Head, head_statistics
from tokencredit.lm.models import CausalModel
from tokencredit.lm.readout import Readout, Sequences, evaluating, find_readout
from tokencredit.lm.scoring import pad

TOKENS = 1 << 14
"""Tokens, prompts included, of the rows that go through the model together."""


class Passes:
    """A model and the completions that are looked at: prompts and completions are token ids, one pair per row; results
    are [B, T].

    parameters  the trainable ones by name: what a vector has an entry for
    width       T, where it is more than the longest completion has
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
    ) -> None:
        if not any(len(completion) for completion in completions):
            raise ValueError("no completion has a token: there is nothing to differentiate")
        self.model, self.tokens, self.num_rows = model, tokens, len(completions)
        self.width = max(width, max(len(completion) for completion in completions))
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        device = next(model.parameters()).device
        self.batch: Sequences = pad(prompts, completions, device)
        start = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.place = (self.batch.origin[0], self.batch.origin[1] - start[self.batch.origin[0]])
        with evaluating(model):
            self.readout: Readout = find_readout(model, self.batch.ids[0][self.batch.attention[0].bool()], temperature)

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
        weights = [
            None if w is None else w.to(self.place[0].device)[self.place].double()
            for w in (logprob_weight, entropy_weight)
        ]
        found = {
            name: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for name, p in self.parameters.items()
        }
        with torch.enable_grad(), evaluating(self.model):
            for part, keep in self._weighted(weights):
                values = self._statistics(part)
                goal = sum((w[keep].to(x.dtype) * x).sum() for w, x in zip(weights, values) if w is not None)
                grads = torch.autograd.grad(goal, list(self.parameters.values()), allow_unused=True)
                for name, grad in zip(found, grads):
                    if grad is not None:
                        found[name] += grad.double()
        return found

    def by_row(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(log π [n] with its graph, the place of these tokens among the scored ones) of one row after another."""
        for part, keep in self.batch.chunks(1):
            with torch.enable_grad(), evaluating(self.model):
                logprob = self._statistics(part)[0]
            yield logprob, keep

    def forward(self, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(∇log π · u, ∇H · u) [B, T], float64 holding what the model's precision gives, along one direction."""
        u = {id(p): direction[name].to(p.device, p.dtype) for name, p in self.parameters.items()}
        found = [torch.zeros(len(self.batch), dtype=torch.float64) for _ in range(2)]
        with torch.no_grad(), evaluating(self.model), differentiable_attention(self.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part, keep in self.batch.chunks(self.tokens):
                zero = torch.zeros((), dtype=next(iter(self.parameters.values())).dtype, device=part.ids.device)
                _, tangents = torch.func.jvp(lambda eps: self.along(part, u, eps), (zero,), (torch.ones_like(zero),))  # noqa: B023
                for store, x in zip(found, tangents):
                    store[keep.cpu()] = x.double().cpu()
        return tuple(map(self.grid, found))

    def along(self, part: Sequences, u: Mapping[int, Tensor], eps: Tensor) -> tuple[Tensor, Tensor]:
        """(log π, H) [N] of a chunk at θ + ε u, differentiable in ε; u by the parameters' identity."""
        body, head = self.readout.body, self.readout.head
        there = {name: p + eps * u[id(p)] for name, p in body.named_parameters() if id(p) in u}
        hidden = self.readout.hidden(
            part.ids, part.attention, lambda **inputs: functional_call(body, there, (), inputs)
        )
        weight, bias = (x if x is None or id(x) not in u else x + eps * u[id(x)] for x in (head.weight, head.bias))
        return statistics(hidden[part.row, part.position], replace(head, weight=weight, bias=bias), part.target)

    def grid(self, values: Tensor) -> Tensor:
        """[N] -> [B, T] on the CPU, 0 off the completions."""
        return values.new_zeros(self.num_rows, self.width).index_put_(tuple(x.cpu() for x in self.place), values)

    def _statistics(self, part: Sequences) -> tuple[Tensor, Tensor]:
        hidden = self.readout.hidden(part.ids, part.attention)[part.row, part.position]
        return statistics(hidden, self.readout.head, part.target)

    def _weighted(self, weights: Sequence[Tensor | None]) -> Iterator[tuple[Sequences, Tensor]]:
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
        for part, index in chosen.chunks(self.tokens):
            yield part, keep[index]


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
