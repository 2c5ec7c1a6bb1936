"""Tangents through the LM head: how a change of the hidden states changes every token's log-prob and distribution, in
one pass.

    dz = z'(u) · dh Wᵀ          s = dz_t − E_p dz          q = Var_p(dz)          dH = −Cov_p(dz, log p)

s is the directional derivative of log p_t, which is also dh · ∂log p_t/∂h and E s² = ‖∇log p_t‖² over isotropic
directions; q is uᵀF u with the Fisher matrix F of the token's distribution, exact over the vocabulary, so E q = tr
F. The head's own gradient needs no direction: it is (e_t − p) hᵀ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.lm.directions import Coverage
from tokencredit.lm.head import Fold, Head, _one_hot, target_logits, tile_size, tiles
from tokencredit.masked import wide


class Tangents(NamedTuple):
    """Per direction and token, [K, N].

    logprob  s;  variance  q;  entropy  dH;  of a tied weight also, for its use in the head:  head_logprob
                                                                                           s of the head's own tangent,
    and  covariance  Cov_p(dz, dz of the head); None where the head's weight is not moved together with the body.
    variance, entropy and covariance are None where log-probs alone were asked for
    """

    logprob: Tensor
    variance: Tensor | None = None
    entropy: Tensor | None = None
    head_logprob: Tensor | None = None
    covariance: Tensor | None = None


class _Moments:
    """Running Σ e^x d, Σ e^x d², Σ e^x x d of K tangents d = dz − dz_t, and of a head tangent y − y_t: Σ e^x y, Σ e^x d
    y.

    Everything is relative to the target's tangent, whose own term is exactly 0: a near-certain token's s is a small
    number, and the difference of dz_t and E_p dz would leave only roundings of it.
    """

    def __init__(self, like: Tensor, tied: bool):
        self.first, self.second, self.with_x = (torch.zeros_like(like) for _ in range(3))
        self.head, self.mixed = (torch.zeros_like(like) for _ in range(2)) if tied else (None, None)

    def rescale(self, factor: Tensor, delta: Tensor) -> None:
        self.with_x = factor * (self.with_x + delta * self.first)
        self.first, self.second = factor * self.first, factor * self.second
        if self.head is not None:
            self.head, self.mixed = factor * self.head, factor * self.mixed

    def add(self, k: int, d: Tensor, x: Tensor, power: Tensor, y: Tensor | None) -> None:
        weighted = d * power
        self.first[k] += weighted.sum(1)
        self.second[k] += torch.linalg.vecdot(weighted, d)
        self.with_x[k] += torch.linalg.vecdot(weighted, x)
        if y is not None:
            self.head[k] += torch.linalg.vecdot(power, y)
            self.mixed[k] += torch.linalg.vecdot(weighted, y)

    def finish(self, fold: Fold) -> Tangents:
        mean, mean_x = self.first / fold.e, fold.xe / fold.e
        d_entropy = mean * mean_x - self.with_x / fold.e
        variance = (self.second / fold.e - mean.square()).clamp(min=0)
        found = Tangents(-mean, variance, d_entropy)
        if self.head is None:
            return found
        head = self.head / fold.e
        return found._replace(head_logprob=-head, covariance=self.mixed / fold.e - mean * head)


@torch.no_grad()
def head_tangents(
    hidden: Tensor,
    tangents: Tensor,
    head: Head,
    targets: Tensor,
    tied: tuple[Tensor, Tensor] | None = None,
    tile: int | None = None,
) -> Tangents:
    """Tangent statistics: hidden [N, D], tangents dh [K, N, D], targets [N] -> Tangents of [K, N].

    tied  (r [K, V], c [K, D]): the head's weight moves too, by r cᵀ, because the body uses the same weight elsewhere
    """
    h, found = wide(hidden), []
    for rows, pieces in tiles(len(h), head.vocabulary(h), tile or tile_size(h)):
        dh = tangents[:, rows].to(h.dtype)
        fold, moments = Fold.start(h[rows]), _Moments(dh[..., 0], tied is not None)
        slope_t = _target_slope(h[rows], head, targets[rows])
        dz_t = _at_targets(dh, head, targets[rows]) * slope_t
        along = None if tied is None else torch.einsum("nd,kd->kn", h[rows], tied[1].to(h.dtype))
        for columns in pieces:
            z, slope = head.bend(head.raw(h[rows], columns))
            before = fold.m
            x, power, factor = fold.add(z)
            moments.rescale(factor, torch.where(before == -torch.inf, 0.0, before - fold.m))
            others = 1 - _one_hot(targets[rows], columns, z)
            for k in range(len(dh)):
                d = (_push(head, dh[k], columns) * slope - dz_t[k, :, None]) * others
                y = (
                    None
                    if tied is None
                    else _head_tangent(tied[0][k], along[k], columns, targets[rows], slope, slope_t) * others
                )
                moments.add(k, d, x, power, y)
        found.append(moments.finish(fold))
    return Tangents(*(None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*found)))


def _push(head: Head, dh: Tensor, columns: slice) -> Tensor:
    """[n, v]: the tangent of the raw logits u."""
    return dh[:, columns] if head.weight is None else dh @ head.weight[columns].to(dh.dtype).t()


def _at_targets(dh: Tensor, head: Head, targets: Tensor) -> Tensor:
    """[K, N]: the tangent of the targets' raw logits."""
    if head.weight is None:
        return dh.gather(2, targets.expand(len(dh), -1)[..., None])[..., 0]
    return torch.linalg.vecdot(dh, head.weight[targets].to(dh.dtype))


def _target_slope(hidden: Tensor, head: Head, targets: Tensor) -> Tensor | float:
    """[N], or a number where it is the same everywhere: dz/du of the targets."""
    if head.softcap is None:
        return head.scale / head.temperature
    z = target_logits(hidden, head, targets) * (head.temperature / head.softcap)
    return (1 - z.square()) * (head.scale / head.temperature)


def _head_tangent(
    r: Tensor, along: Tensor, columns: slice, targets: Tensor, slope: Tensor | float, slope_t: Tensor | float
) -> Tensor:
    """[n, v]: the tangent (h·c) r of the head's logits, less that of the target."""
    r = r.to(along.dtype)
    return along[:, None] * (r[columns] * slope - (r[targets] * slope_t)[:, None])


def head_norms(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    coverage: Coverage | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(squared gradient norm over the head, its tr F), each [N]: those in the logits, `known` or made here, times
    ‖h‖² for the weight, plus 1 for the bias, of what is covered (None: all there is).
    """
    h = wide(hidden)
    parts = [x is not None and (coverage is None or coverage.name_of(x) is not None) for x in (head.weight, head.bias)]
    size = h.square().sum(1) * parts[0] + float(parts[1])
    norm2, trace = known or logit_norms(hidden, head, targets)
    return norm2 * size, trace * size


class HeadGradient(NamedTuple):
    """Of every token's log p_t: the norms of `logit_norms` [N]; its gradient in the hidden state [N, D]; its derivative
    when every row v of the head's weight moves by r_v times what h·c is, per unit of that, [K, N], or None.
    """

    norm2: Tensor
    trace: Tensor
    states: Tensor
    along: Tensor | None


@torch.no_grad()
def head_gradient(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    r: Tensor | None = None,
    tile: int | None = None,
    with_states: bool = True,
) -> HeadGradient:
    """One pass over the vocabulary for everything that log p_t alone needs of the head; r [K, V]. Without states these
    are 0, and half of the work is left out.

        ∂log p_t/∂h = o c_t W_t − Σ_{v≠t} p_v c_v W_v            o = Σ_{v≠t} p_v, c = dz/du

    A near-certain token keeps its digits: no 1 − p_t is formed.
    """
    h, found = wide(hidden), []
    for rows, pieces in tiles(len(h), head.vocabulary(h), tile or tile_size(h)):
        some, target = h[rows], targets[rows]
        fold = Fold.start(some)
        others = one = two = torch.zeros_like(fold.e)
        states, along = torch.zeros_like(some), None if r is None else some.new_zeros(len(r), len(some))
        for columns in pieces:
            z, slope = head.bend(head.raw(some, columns))
            _, power, factor = fold.add(z)
            _zero_targets(power, target, columns)
            sloped = power * slope
            others = others * factor + power.sum(1)
            one = one * factor + (sloped * slope).sum(1)
            two = two * factor.square() + sloped.square().sum(1)
            states = states * factor[:, None]
            if head.weight is None:
                states[:, columns] = sloped
            elif with_states:
                states.addmm_(sloped, head.weight[columns].to(h.dtype))
            along = None if r is None else (along * factor).addmm_(r[:, columns].to(h.dtype), sloped.t())
        others, one, two = others / fold.e, one / fold.e, two / fold.e.square()
        slope_t, p = (
            _target_slope(some, head, target),
            (target_logits(some, head, target) - fold.lse()).exp(),
        )
        c2, lead = slope_t**2, (others * slope_t)[:, None]
        own = (
            torch.zeros_like(some).scatter_(1, target[:, None], 1.0)
            if head.weight is None
            else head.weight[target].to(h.dtype)
        )
        states = lead * own - states / fold.e[:, None]
        if r is not None:
            along = lead.t() * r[:, target].to(h.dtype) - along / fold.e
        norms = c2 * others.square() + two, (c2 * p * others + one - two).clamp(min=0)
        found.append((*norms, states, along))
    norm2, trace, states, along = zip(*found)
    return HeadGradient(
        torch.cat(norm2), torch.cat(trace), torch.cat(states), None if r is None else torch.cat(along, 1)
    )


def _zero_targets(x: Tensor, targets: Tensor, columns: slice) -> None:
    """Sets x [n, v] to 0 where a column of the tile is the row's target."""
    row = ((targets >= columns.start) & (targets < columns.stop)).nonzero()[:, 0]
    x[row, targets[row] - columns.start] = 0


@torch.no_grad()
def logit_norms(hidden: Tensor, head: Head, targets: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
    """(‖∂log p_t/∂u‖², tr of the Fisher matrix in u), each [N]: with slope c = dz/du,

        c_t² o² + Σ_{v≠t} cᵥ² pᵥ²            c_t² p_t o + Σ_{v≠t} cᵥ² pᵥ (1 − pᵥ)
                                                                          o = Σ_{v≠t} pᵥ, 1 − p_t without its roundings

    Without soft-cap and at temperature 1 these are ‖e_t − p‖² and 1 − Σ p².
    """
    found = head_gradient(hidden, head, targets, tile=tile, with_states=False)
    return found.norm2, found.trace
