"""What the output distribution says about each token, from hidden states and the LM head, without a [N, V] matrix.

    u = h Wᵀ + b        z = cap · tanh(s·u / cap) / τ  (or s·u / τ)        p = softmax(z)

with scale s, soft-cap `cap` and temperature τ. Tiles of logits (tokens × vocabulary) are made, folded into running sums
and dropped; everything is accumulated in float32, or in float64 for float64 models. The running sums are shifted by the
running maximum m, which starts at −∞: Σ (z−m) e^(z−m) keeps its digits where Σ z e^z loses them to a large common
offset.

Source of the online rule: Milakov & Gimelshein (arXiv:1805.02867); the sums for entropy and Σ p² are defined here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.masked import wide

TILE = {"cpu": 1 << 18}
"""Logits of one tile by device: small enough to stay in a processor's cache; elsewhere 2^24, enough to keep an
accelerator busy.
"""
FLOOR = -80.0
"""Shifted logits below this count as this: e^-80 vanishes beside e^0, and (z−m) e^(z−m) stays a number where z = −∞."""


@dataclass(frozen=True, eq=False)
class Head:
    """An LM head: weight [V, D], bias [V] or None, and what happens to its logits.

    A head without a weight reads its inputs as raw logits u [N, V]: for models whose hidden states do not give them.

    softcap  z ← softcap · tanh(z / softcap), None for none;  scale  multiplies the logits before;
                                                                                        temperature  divides them after
    """

    weight: Tensor | None
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}: a deterministic sampler has no distribution to"
                " score"
            )

    def at(self, temperature: float) -> Head:
        """The same head at another temperature."""
        return replace(self, temperature=temperature)

    def vocabulary(self, hidden: Tensor) -> int:
        return hidden.shape[-1] if self.weight is None else len(self.weight)

    def raw(self, hidden: Tensor, columns: slice) -> Tensor:
        """[n, v]: u = h Wᵀ + b for a slice of the vocabulary, in the dtype of hidden."""
        if self.weight is None:
            return hidden[..., columns]
        tile = hidden @ self.weight[columns].to(hidden.dtype).t()
        return tile if self.bias is None else tile + self.bias[columns].to(tile.dtype)

    def bend(self, raw: Tensor) -> tuple[Tensor, Tensor | float]:
        """(z, dz/du): scale, soft-cap and temperature, and their slope (a number where it is the same everywhere)."""
        if self.softcap is None:
            factor = self.scale / self.temperature
            return (raw if factor == 1 else raw * factor), factor
        squashed = torch.tanh(raw * (self.scale / self.softcap))
        return squashed * (self.softcap / self.temperature), (1 - squashed.square()) * (self.scale / self.temperature)

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """[n, v]: the logits z of a slice of the vocabulary, temperature included."""
        return self.bend(self.raw(hidden, columns))[0]


def tile_size(x: Tensor) -> int:
    return TILE.get(x.device.type, 1 << 24)


def tiles(num_tokens: int, vocabulary: int, size: int) -> Iterator[tuple[slice, list[slice]]]:
    """(tokens, [columns, ...]): pieces of at most about `size` logits; all columns of some tokens before the next
    tokens.
    """
    wide_columns = min(vocabulary, 2048)
    rows = max(size // wide_columns, 1)
    columns = max(size // max(min(rows, num_tokens), 1), 1)
    pieces = [slice(c, min(c + columns, vocabulary)) for c in range(0, vocabulary, columns)]
    for r in range(0, num_tokens, rows):
        yield slice(r, min(r + rows, num_tokens)), pieces


class Statistics(NamedTuple):
    """Per token, [N]: log-prob of the target, entropy H in nats, Σᵥ pᵥ², and log Σᵥ e^z."""

    logprob: Tensor
    entropy: Tensor
    sum_p2: Tensor
    lse: Tensor


@dataclass
class Fold:
    """Running sums over the vocabulary, relative to the running maximum m: Σ e^x, Σ x e^x, Σ e^2x with x = z − m, and Σ
    x² e^x if asked.
    """

    m: Tensor
    e: Tensor
    xe: Tensor
    ee: Tensor
    xxe: Tensor | None = None

    @classmethod
    def start(cls, like: Tensor, second_moment: bool = False) -> Fold:
        zero = torch.zeros_like(like[:, 0])
        return cls(zero - torch.inf, zero, zero, zero, zero if second_moment else None)

    def add(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fold a tile in; (x, e^x, the factor by which sums so far were multiplied)."""
        m = torch.maximum(self.m, z.amax(1))
        delta = (self.m - m).clamp(min=FLOOR)
        factor = torch.where(self.m == -torch.inf, 0.0, delta.exp())
        if self.xxe is not None:
            self.xxe = factor * (self.xxe + 2 * delta * self.xe + delta.square() * self.e)
        self.xe = factor * (self.xe + delta * self.e)
        self.e, self.ee, self.m = factor * self.e, factor.square() * self.ee, m
        x = (z - m[:, None]).clamp(min=FLOOR)
        power = x.exp()
        self.e = self.e + power.sum(1)
        self.xe = self.xe + torch.linalg.vecdot(x, power)
        self.ee = self.ee + torch.linalg.vecdot(power, power)
        if self.xxe is not None:
            self.xxe = self.xxe + torch.linalg.vecdot(x * x, power)
        return x, power, factor

    def entropy(self) -> Tensor:
        return self.e.log() - self.xe / self.e

    def sum_p2(self) -> Tensor:
        return self.ee / self.e.square()

    def lse(self) -> Tensor:
        return self.m + self.e.log()

    def varentropy(self) -> Tensor:
        """[N]: Var_p(log p), in nats²."""
        return (self.xxe / self.e - (self.xe / self.e).square()).clamp(min=0)


def target_logits(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """[N]: z of the target tokens."""
    if head.weight is None:
        return head.bend(hidden.gather(1, targets[:, None])[:, 0])[0]
    raw = torch.linalg.vecdot(hidden, head.weight[targets].to(hidden.dtype))
    if head.bias is not None:
        raw = raw + head.bias[targets].to(raw.dtype)
    return head.bend(raw)[0]


def head_statistics(hidden: Tensor, head: Head, targets: Tensor, tile: int | None = None) -> Statistics:
    """Log-prob, entropy, Σ p² and log-sum-exp of every token: hidden [N, D], targets [N] int -> four [N], float32 or
    better.

    Differentiable in all four with respect to hidden, weight and bias, in reverse mode (logits are made again, tile by
    tile), in forward mode, and under vmap. Memory beyond inputs, outputs and gradients: one tile.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be [N, D] and targets [N], got {list(hidden.shape)} and {list(targets.shape)}")
    bias = hidden.new_zeros(0) if head.bias is None else head.bias
    options = (head.bias is not None, head.temperature, head.softcap, head.scale, tile or tile_size(hidden))
    return Statistics(*_HeadStatistics.apply(hidden, head.weight, bias, targets, options))


def chosen_logprob(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """[N]: log p of the targets, differentiable in hidden; from float64 hidden states also where 1 − p is lost in
    float32.
    """
    if head.weight is None:
        return head.logits(hidden).log_softmax(1).gather(1, targets[:, None])[:, 0]
    return head_statistics(hidden, head, targets).logprob


class _HeadStatistics(torch.autograd.Function):
    """With f = z's function of u:  ∂log p_t/∂z = e_t − p,   ∂H/∂z = −p (log p + H),   ∂Σp²/∂z = 2p (p − Σp²),   ∂lse/∂z
    = p.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden, weight, bias, targets, options):
        head, h = _head(weight, bias, options), wide(hidden)
        found = []
        for rows, pieces in tiles(len(h), len(weight), options[-1]):
            fold = Fold.start(h[rows])
            for columns in pieces:
                fold.add(head.logits(h[rows], columns))
            lse = fold.lse()
            found.append((target_logits(h[rows], head, targets[rows]) - lse, fold.entropy(), fold.sum_p2(), lse))
        return tuple(torch.cat(parts) for parts in zip(*found)) if found else tuple(h.new_zeros(0) for _ in range(4))

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, weight, bias, targets, options = inputs
        ctx.save_for_backward(hidden, weight, bias, targets, *output[1:])
        ctx.save_for_forward(hidden, weight, bias, targets, *output[1:])
        ctx.options = options

    @staticmethod
    def backward(ctx, g_logprob, g_entropy, g_sum_p2, g_lse):
        hidden, weight, bias, targets, entropy, sum_p2, lse = ctx.saved_tensors
        head, h = _head(weight, bias, ctx.options), wide(hidden)
        g = (g_logprob, g_entropy, g_sum_p2, g_lse)
        d_hidden, d_weight, d_bias = [], 0, 0
        for rows, pieces in tiles(len(h), len(weight), ctx.options[-1]):
            part, d_rows, d_columns, d_biases = tuple(x[rows, None] for x in (*g, entropy, sum_p2, lse)), 0, [], []
            for columns in pieces:
                d_raw = _tile_gradient(head, h[rows], columns, targets[rows], part)
                d_rows = d_rows + d_raw @ weight[columns].to(h.dtype)
                d_columns.append(d_raw.t() @ h[rows] if ctx.needs_input_grad[1] else None)
                d_biases.append(d_raw.sum(0))
            d_hidden.append(d_rows)
            d_weight = d_weight + torch.cat(d_columns) if ctx.needs_input_grad[1] else d_weight
            d_bias = d_bias + torch.cat(d_biases)
        if not d_hidden:
            return torch.zeros_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias), None, None
        d_weight = d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return (
            torch.cat(d_hidden).to(hidden.dtype),
            d_weight,
            d_bias.to(bias.dtype) if head.bias is not None else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, d_hidden, d_weight, d_bias, _targets, _options):
        hidden, weight, bias, targets, entropy, sum_p2, lse = ctx.saved_tensors
        head, h = _head(weight, bias, ctx.options), wide(hidden)
        found = []
        for rows, pieces in tiles(len(h), len(weight), ctx.options[-1]):
            mean, cross, square, at_target = 0, 0, 0, 0
            for columns in pieces:
                z, slope = head.bend(head.raw(h[rows], columns))
                log_p = z - lse[rows, None]
                p = log_p.exp()
                dz = (
                    _tangent(head, h[rows], None if d_hidden is None else d_hidden[rows], d_weight, d_bias, columns)
                    * slope
                )
                mean = mean + (p * dz).sum(1)
                cross = cross + (p * dz * (log_p + entropy[rows, None]).clamp(min=-torch.finfo(h.dtype).max)).sum(1)
                square = square + (p * p * dz).sum(1)
                at_target = at_target + (dz * _one_hot(targets[rows], columns, dz)).sum(1)
            found.append((at_target - mean, -cross, 2 * (square - sum_p2[rows] * mean), mean))
        return (
            tuple(torch.cat(parts) for parts in zip(*found))
            if found
            else tuple(torch.zeros_like(lse) for _ in range(4))
        )


def _head(weight: Tensor, bias: Tensor, options: tuple) -> Head:
    has_bias, temperature, softcap, scale, _ = options
    return Head(weight, bias if has_bias else None, temperature, softcap, scale)


def _one_hot(targets: Tensor, columns: slice, like: Tensor) -> Tensor:
    ids = torch.arange(columns.start, columns.stop, device=targets.device)
    return (targets[:, None] == ids).to(like.dtype)


def _tile_gradient(head: Head, hidden: Tensor, columns: slice, targets: Tensor, part: tuple[Tensor, ...]) -> Tensor:
    """[n, v]: the gradient of Σ g · statistic with respect to u, for one tile."""
    g_logprob, g_entropy, g_sum_p2, g_lse, entropy, sum_p2, lse = part
    z, slope = head.bend(head.raw(hidden, columns))
    log_p = z - lse
    p = log_p.exp()
    spread = (log_p + entropy).clamp(min=-torch.finfo(p.dtype).max)
    d_z = p * (g_lse - g_logprob - g_entropy * spread + 2 * g_sum_p2 * (p - sum_p2))
    return (d_z + g_logprob * _one_hot(targets, columns, d_z)) * slope


def _tangent(
    head: Head, hidden: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None, columns: slice
) -> Tensor:
    """[n, v]: du = dh Wᵀ + h dWᵀ + db for one tile."""
    du = hidden.new_zeros(len(hidden), columns.stop - columns.start)
    if d_hidden is not None:
        du = du + d_hidden.to(hidden.dtype) @ head.weight[columns].to(hidden.dtype).t()
    if d_weight is not None:
        du = du + hidden @ d_weight[columns].to(hidden.dtype).t()
    if d_bias is not None and head.bias is not None:
        du = du + d_bias[columns].to(hidden.dtype)
    return du
