"""Vectors in parameter space: {parameter name: tensor}. What follows from others is computed entry by entry, when an
entry is read, in float64 and block by block: a vector that is only passed on takes no memory.

Kept vectors, such as gradients, are float64, so that a sum over many parameters keeps its digits; over more than 2²⁴
numbers they are float32, or they would take twice what the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Vector = Mapping[str, Tensor]
FINE = 1 << 24
"""Numbers up to which a kept vector is float64."""
BLOCK = 1 << 20


def size(parameters: Mapping[str, Tensor]) -> int:
    """The number of numbers."""
    return sum(p.numel() for p in parameters.values())


def kept_as(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a vector that is kept."""
    if size(parameters) <= FINE or any(p.dtype == torch.float64 for p in parameters.values()):
        return torch.float64
    return torch.float32


class Derived(Mapping[str, Tensor]):
    """A vector whose entry is made when it is read, by `make(name)`."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self.names, self.make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def condensed(vector: Vector) -> Vector:
    """A vector that is made, to be multiplied with others: of a large one every number in bfloat16, half of what it
    takes otherwise. A product of long vectors hardly hears the roundings, 2⁻⁹ |g| |u| over the root of their number.
    """
    made = {name: x.to(torch.bfloat16) if x.dtype == torch.float32 else x for name, x in vector.items()}
    return made if size(made) > FINE else vector


def elementwise(make: Callable[..., Tensor], *given: Tensor, dtype: torch.dtype) -> Tensor:
    """make(x, y, ...) of tensors of one shape, block by block."""
    if given[0].numel() <= BLOCK:
        return make(*given).to(dtype)
    flat = [x.reshape(-1) for x in given]
    found = torch.empty(flat[0].shape, dtype=dtype, device=flat[0].device)
    for start in range(0, len(found), BLOCK):
        found[start : start + BLOCK] = make(*(x[start : start + BLOCK] for x in flat))
    return found.view(given[0].shape)


def dot(a: Vector, b: Vector) -> float:
    """Σ a·b over the parameters of a."""
    found = 0.0
    for name in a:
        for x, y in zip(a[name].reshape(-1).split(BLOCK), b[name].reshape(-1).split(BLOCK)):
            found += float(torch.linalg.vecdot(x.double(), y.double()))
    return found


def norm(a: Vector) -> float:
    return dot(a, a) ** 0.5


def cosine(a: Vector, b: Vector) -> float:
    """NaN where one of them is zero."""
    length = norm(a) * norm(b)
    return dot(a, b) / length if length else float("nan")


def total(*vectors: Vector) -> Vector:
    """Their sum."""

    def entry(name: str) -> Tensor:
        given = [vector[name] for vector in vectors]
        return elementwise(lambda *xs: sum(x.double() for x in xs), *given, dtype=_widest(*given))

    return Derived(vectors[0], entry)


def scaled(a: Vector, factor: float | Vector) -> Vector:
    """a times a number, or elementwise times another vector."""

    def entry(name: str) -> Tensor:
        given = [a[name], *([factor[name]] if isinstance(factor, Mapping) else [])]
        number = 1.0 if isinstance(factor, Mapping) else factor
        return elementwise(
            lambda x, *more: x.double() * (more[0].double() if more else number), *given, dtype=_widest(*given)
        )

    return Derived(a, entry)


def _widest(*given: Tensor) -> torch.dtype:
    """float64, but float32 where all of a large entry is."""
    large = given[0].numel() > BLOCK and all(x.dtype != torch.float64 for x in given)
    return torch.float32 if large else torch.float64


@contextmanager
def moved(parameters: Mapping[str, Tensor], by: Vector, factor: float = 1.0) -> Iterator[None]:
    """The parameters at θ + factor · by inside, added in float64 and rounded once; bit for bit as they were after."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                step = by[name].to(p.device)
                p.copy_(elementwise(lambda x, u: x.double() + factor * u.double(), before[name], step, dtype=p.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
