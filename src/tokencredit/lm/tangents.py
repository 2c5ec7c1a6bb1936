"""Tangents through the LM head: how a change of the hidden states changes every token's log-prob and distribution, in one pass.

    dz = z'(u) · dh Wᵀ          s = dz_t − E_p dz          q = Var_p(dz)          dH = −Cov_p(dz, log p)

s is the directional derivative of log p_t and E s² = ‖∇log p_t‖² over isotropic directions; q is uᵀF u with the Fisher matrix F of the
token's distribution, exact over the vocabulary, so E q = tr F. The head's own gradient needs no direction: it is (e_t − p) hᵀ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.lm.head import Fold, Head, _one_hot, target_logits, tile_size, tiles
from tokencredit.masked import wide


class Tangents(NamedTuple):
    """Per direction and token, [K, N].

    logprob  s;  variance  q;  entropy  dH;  of a tied weight also, for its use in the head:  head_logprob  s of the head's own tangent,
    and  covariance  Cov_p(dz, dz of the head); None where the head's weight is not moved together with the body
    """

    logprob: Tensor
    variance: Tensor
    entropy: Tensor
    head_logprob: Tensor | None = None
    covariance: Tensor | None = None


class _Moments:
    """Running Σ e^x dz, Σ e^x dz², Σ e^x x dz for K tangents, and for a head tangent y: Σ e^x y, Σ e^x y dz; follows a Fold's maximum."""

    def __init__(self, like: Tensor, tied: bool):
        self.first, self.second, self.with_x, self.at_target = (torch.zeros_like(like) for _ in range(4))
        self.head, self.mixed, self.head_at_target = (torch.zeros_like(like) for _ in range(3)) if tied else (None, None, None)

    def rescale(self, factor: Tensor, delta: Tensor) -> None:
        self.with_x = factor * (self.with_x + delta * self.first)
        self.first, self.second = factor * self.first, factor * self.second
        if self.head is not None:
            self.head, self.mixed = factor * self.head, factor * self.mixed

    def add(self, k: int, dz: Tensor, x: Tensor, power: Tensor, hot: Tensor, y: Tensor | None) -> None:
        weighted = dz * power
        self.first[k] += weighted.sum(1)
        self.second[k] += torch.linalg.vecdot(weighted, dz)
        self.with_x[k] += torch.linalg.vecdot(weighted, x)
        self.at_target[k] += torch.linalg.vecdot(hot, dz)
        if y is not None:
            self.head[k] += torch.linalg.vecdot(power, y)
            self.mixed[k] += torch.linalg.vecdot(weighted, y)
            self.head_at_target[k] += torch.linalg.vecdot(hot, y)

    def finish(self, fold: Fold) -> Tangents:
        mean, mean_x = self.first / fold.e, fold.xe / fold.e
        d_entropy = mean * mean_x - self.with_x / fold.e
        variance = (self.second / fold.e - mean.square()).clamp(min=0)
        found = Tangents(self.at_target - mean, variance, d_entropy)
        if self.head is None:
            return found
        head = self.head / fold.e
        return found._replace(head_logprob=self.head_at_target - head, covariance=self.mixed / fold.e - mean * head)


@torch.no_grad()
def head_tangents(hidden: Tensor, tangents: Tensor, head: Head, targets: Tensor, tied: tuple[Tensor, Tensor] | None = None,
                  tile: int | None = None) -> Tangents:  # fmt: skip
    """Tangent statistics: hidden [N, D], tangents dh [K, N, D], targets [N] -> Tangents of [K, N].

    tied  (r [K, V], c [K, D]): the head's weight moves too, by r cᵀ, because the body uses the same weight elsewhere
    """
    h, found = wide(hidden), []
    for rows, pieces in tiles(len(h), head.vocabulary(h), tile or tile_size(h)):
        dh = tangents[:, rows].to(h.dtype)
        fold, moments = Fold.start(h[rows]), _Moments(dh[..., 0], tied is not None)
        along = None if tied is None else torch.einsum("nd,kd->kn", h[rows], tied[1].to(h.dtype))
        for columns in pieces:
            z, slope = head.bend(head.raw(h[rows], columns))
            before = fold.m
            x, power, factor = fold.add(z)
            moments.rescale(factor, torch.where(before == -torch.inf, 0.0, before - fold.m))
            hot = _one_hot(targets[rows], columns, z)
            for k in range(len(dh)):
                y = None if tied is None else along[k][:, None] * tied[0][k, columns].to(h.dtype) * slope
                moments.add(k, _push(head, dh[k], columns) * slope, x, power, hot, y)
        found.append(moments.finish(fold))
    return Tangents(*(None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*found)))


def _push(head: Head, dh: Tensor, columns: slice) -> Tensor:
    """[n, v]: the tangent of the raw logits u."""
    return dh[:, columns] if head.weight is None else dh @ head.weight[columns].to(dh.dtype).t()


@torch.no_grad()
def logit_norms(hidden: Tensor, head: Head, targets: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
    """(‖∂log p_t/∂u‖², tr of the Fisher matrix in u), each [N]: with slope c = dz/du

        c_t² (1 − 2 p_t) + Σᵥ cᵥ² pᵥ²            Σᵥ cᵥ² pᵥ (1 − pᵥ)

    Without soft-cap and at temperature 1 these are ‖e_t − p‖² and 1 − Σ p².
    """
    h, found = wide(hidden), []
    for rows, pieces in tiles(len(h), head.vocabulary(h), tile or tile_size(h)):
        fold, one, two, at_target = Fold.start(h[rows]), 0, 0, 0
        for columns in pieces:
            z, slope = head.bend(head.raw(h[rows], columns))
            _, power, factor = fold.add(z)
            square = power * slope * slope
            one = one * factor + square.sum(1)
            two = two * factor.square() + torch.linalg.vecdot(square, power)
            at_target = at_target + (_one_hot(targets[rows], columns, z) * slope * slope).sum(1)
        p = (target_logits(h[rows], head, targets[rows]) - fold.lse()).exp()
        one, two = one / fold.e, two / fold.e.square()
        found.append(((at_target * (1 - 2 * p) + two).clamp(min=0), (one - two).clamp(min=0)))
    return tuple(torch.cat(parts) for parts in zip(*found))
