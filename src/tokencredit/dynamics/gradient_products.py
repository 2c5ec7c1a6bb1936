"""The products of many gradients [n, n]: from the gradients as they are while they fit into memory, else from a sketch
of each.

    (Sg)ᵦ = Σᵢ σᵢ gᵢ over the i that share place b          E (Sg)·(Sh) = g·h,   Var ≤ 2 |g|² |h|² / m

σᵢ = ±1 at random; places are dealt block by block, each block of m coordinates turned by a random shift, so that
coordinates that are large together do not meet. Squared norms are exact either way. Source: count sketch, Charikar et
al. (2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tokencredit.dynamics.passes import Passes

LIMIT = 1 << 30
"""Bytes of gradients, or of sketches, that are kept."""
BLOCK = 1 << 14


def products(
    passes: Passes, weights: Iterable[Tensor], num: int, *, limit: int = LIMIT, seed: int = 0
) -> tuple[Tensor, int | None]:
    """(products [num, num] float64 of the gradients ∇ Σᵢₜ wᵢₜ log πᵢₜ, one for each of `num` weights [B, T]; m, None
    where exact).

    One reverse pass each, over the rows with a weight. Numbers that are kept are float32.
    """
    size = sum(p.numel() for p in passes.parameters.values())
    width = size if num * size * 4 <= limit else max(limit // (num * 4), 1)
    kept, squares = torch.zeros(num, width), torch.zeros(num, dtype=torch.float64)
    for i, weight in enumerate(weights):
        if weight.any():
            gradient = flat(passes.reverse(weight))
            squares[i] = gradient.square().sum()
            kept[i] = gradient if width == size else sketch(gradient, width, seed)
    found = torch.zeros(num, num, dtype=torch.float64)
    for part in kept.split(BLOCK, 1):
        found += part.double() @ part.double().T
    return found.diagonal_scatter(squares), None if width == size else width


def flat(vector: Mapping[str, Tensor]) -> Tensor:
    """A vector by parameter name as one [D], on the CPU."""
    return torch.cat([x.flatten() for x in vector.values()]).cpu()


def sketch(gradient: Tensor, width: int, seed: int) -> Tensor:
    """S g [width] of g [D]; the same seed gives the same S."""
    generator = torch.Generator().manual_seed(seed)
    found = gradient.new_zeros(width)
    for block in gradient.split(width):
        signs = torch.randint(0, 2, (len(block),), generator=generator, dtype=torch.int8) * 2 - 1
        shift = int(torch.randint(width, (), generator=generator))
        found += torch.nn.functional.pad(block * signs, (0, width - len(block))).roll(shift)
    return found
