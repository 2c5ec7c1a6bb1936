"""The products of many gradients [n, n]: from the gradients as they are while they fit into memory, else from a sketch
of each.

    (Sg)ᵦ = Σᵢ σᵢ gᵢ over the i that share place b          E (Sg)·(Sh) = g·h,   Var ≤ 2 |g|² |h|² / m

σᵢ = ±1 at random; places are dealt block by block, each block of m coordinates turned by a random shift, so that
coordinates that are large together do not meet. Squared norms are exact either way. Source: count sketch, Charikar et
al. (2002).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.vectors import Vector, dot, size

LIMIT = 1 << 30
"""Bytes of gradients, or of sketches, that are kept, at most; half of what there is room for, where that is less."""
BLOCK = 1 << 14


def products(
    passes: Passes,
    weights: Iterable[Tensor],
    num: int,
    *,
    limit: int = LIMIT,
    seed: int = 0,
    heard: Callable[[int], Any] | None = None,
) -> tuple[Tensor, int | None]:
    """(products [num, num] float64 of the gradients ∇ Σᵢₜ wᵢₜ log πᵢₜ, one for each of `num` weights [B, T]; m, None
    where exact).

    One reverse pass each, over the rows with a weight; a gradient is looked at parameter by parameter, and let go.
    Numbers that are kept are float32. `heard` is told after each.
    """
    whole, limit = size(passes.parameters), min(limit, passes.room.space // 2)
    width = whole if num * whole * 4 <= limit else max(limit // (num * 4), 1)
    kept, squares = torch.zeros(num, width), torch.zeros(num, dtype=torch.float64)
    for i, weight in enumerate(weights):
        if weight.any():
            squares[i] = _keep(passes.reverse(weight), kept[i], width == whole, seed)
        if heard:
            heard(1)
    found = torch.zeros(num, num, dtype=torch.float64)
    for part in kept.split(BLOCK, 1):
        found += part.double() @ part.double().T
    return found.diagonal_scatter(squares), None if width == whole else width


def _keep(gradient: Vector, row: Tensor, exactly: bool, seed: int) -> float:
    """Writes a gradient, or its sketch, into a row; its squared norm."""
    pieces = [x.reshape(-1).cpu() for x in gradient.values()]
    if exactly:
        torch.cat([x.float() for x in pieces], out=row)
    else:
        row.copy_(sketch(pieces, len(row), seed))
    return dot(gradient, gradient)


def flat(vector: Vector) -> Tensor:
    """A vector by parameter name as one [D], on the CPU."""
    return torch.cat([x.flatten() for x in vector.values()]).cpu()


def sketch(gradient: Iterable[Tensor], width: int, seed: int) -> Tensor:
    """S g [width] of g [D], which is given in pieces, one after the other; the same seed gives the same S."""
    pieces = list(gradient)
    left = sum(map(len, pieces))
    generator, found = torch.Generator().manual_seed(seed), pieces[0].new_zeros(width)
    at, signs, shift = 0, torch.empty(0), 0
    for piece in pieces:
        while len(piece):
            if at == 0:
                signs = torch.randint(0, 2, (min(width, left),), generator=generator, dtype=torch.int8) * 2 - 1
                shift = int(torch.randint(width, (), generator=generator))
            some = piece[: len(signs) - at] * signs[at : at + len(piece)]
            for part, start in _around(some, (at + shift) % width, width):
                found[start : start + len(part)] += part
            piece, left, at = piece[len(some) :], left - len(some), (at + len(some)) % len(signs)
    return found


def _around(x: Tensor, start: int, width: int) -> list[tuple[Tensor, int]]:
    """x laid on a ring of `width` places from a start on: its parts, and where they begin."""
    first = x[: width - start]
    return [(first, start), (x[len(first) :], 0)] if len(first) < len(x) else [(first, start)]
