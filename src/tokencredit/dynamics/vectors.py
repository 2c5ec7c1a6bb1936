"""Vectors in parameter space: {parameter name: tensor}, float64, so that a sum over many parameters keeps its
digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Vector = dict[str, Tensor]


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Σ a·b over the parameters of a."""
    return float(sum(torch.linalg.vecdot(a[name].double().flatten(), b[name].double().flatten()) for name in a))


def norm(a: Mapping[str, Tensor]) -> float:
    return dot(a, a) ** 0.5


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """NaN where one of them is zero."""
    length = norm(a) * norm(b)
    return dot(a, b) / length if length else float("nan")


def total(*vectors: Mapping[str, Tensor]) -> Vector:
    """Their sum."""
    return {name: sum(v[name].double() for v in vectors) for name in vectors[0]}


def scaled(a: Mapping[str, Tensor], factor: float | Mapping[str, Tensor]) -> Vector:
    """a times a number, or elementwise times another vector."""
    return {
        name: x.double() * (factor[name].double() if isinstance(factor, Mapping) else factor) for name, x in a.items()
    }


@contextmanager
def moved(parameters: Mapping[str, Tensor], by: Mapping[str, Tensor], factor: float = 1.0) -> Iterator[None]:
    """The parameters at θ + factor · by inside, added in float64 and rounded once; bit for bit as they were after."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_((before[name].double() + factor * by[name].to(p.device, torch.float64)).to(p.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
