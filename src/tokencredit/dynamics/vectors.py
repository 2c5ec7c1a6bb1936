"""Vectors in parameter space: {parameter name: tensor}. What follows from others is computed entry by entry, when an
entry is read, and block by block: a vector that is only passed on takes no memory.

Kept vectors, such as gradients, are float64, so that a sum over many parameters keeps its digits. Over more than 2²⁴
numbers they are float32, as is what is computed from them, but for sums over blocks; and a question that needs many of
them keeps them in files.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from tokencredit.durable import read_mapping, sync, write_json
from tokencredit.lm.models import CausalModel

Vector = Mapping[str, Tensor]
FINE = 1 << 24
"""Numbers up to which a kept vector is float64."""
BLOCK = 1 << 16
ALIGNED = 64


def trained(model: CausalModel) -> dict[str, Tensor]:
    """The parameters in training, by name: what a vector has an entry for."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def size(parameters: Mapping[str, Tensor]) -> int:
    """The number of numbers."""
    return sum(p.numel() for p in parameters.values())


def large(parameters: Mapping[str, Tensor]) -> bool:
    """Whether vectors over them are too large to be made and kept without a thought."""
    return size(parameters) > FINE


def kept_as(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a vector that is kept."""
    if not large(parameters) or any(p.dtype == torch.float64 for p in parameters.values()):
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


class Filed(Mapping[str, Tensor]):
    """A vector in a file of `folder` that has no name and goes when the vector does; or, with a name, stays until
    `forget`, and is `found` by a later process. An entry is mapped when it is read, and takes memory of the process as
    long as it is held; what the machine has to spare caches the rest.
    """

    def __init__(self, vector: Vector, folder: Path, name: str = "") -> None:
        self._open(open(_file(folder, name), "w+b") if name else tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        self._write(vector, folder)
        if name:
            sync(_file(folder, name))
            kept = {key: (place, str(dtype), tuple(shape)) for key, (place, dtype, shape) in self.entries.items()}
            write_json(_about(folder, name), kept)

    @classmethod
    def found(cls, folder: Path, name: str) -> Filed | None:
        """The vector of that name, where it is there and whole."""
        if not _about(folder, name).exists():
            return None
        vector = cls.__new__(cls)
        vector._open(open(_file(folder, name), "rb"))  # noqa: SIM115
        for key, (place, dtype, shape) in read_mapping(_about(folder, name)).items():
            vector.entries[key] = place, getattr(torch, dtype.removeprefix("torch.")), torch.Size(shape)
        return vector

    def _open(self, file: IO[bytes]) -> None:
        self.file = file
        self.entries: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        weakref.finalize(self, file.close)

    def _write(self, vector: Vector, folder: Path) -> None:
        for name in vector:
            x = vector[name].detach()
            place = -(-self.file.tell() // ALIGNED) * ALIGNED
            with _named(folder):
                _write(self.file, place, x)
            self.entries[name] = (place, x.dtype, x.shape)

    def __getitem__(self, name: str) -> Tensor:
        place, dtype, shape = self.entries[name]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        mapped = np.memmap(self.file, np.uint8, "c", place, (shape.numel() * dtype.itemsize,))
        return torch.from_numpy(mapped).view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class FiledMatrix:
    """[N, M] numbers, zeros at first, in a file of `folder` that has no name and goes when the matrix does; such as N
    vectors, one a row. As of a tensor, columns are read as `matrix[:, start:end]` and parts of rows [n] written as
    `matrix[rows, start:end] = values`; what is read is a copy, in float32 where it is kept in less.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, folder: Path, device: torch.device) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.shape, self.dtype, self.folder, self.device = shape, dtype, folder, device
        weakref.finalize(self, self.file.close)
        self.file.truncate(shape[0] * shape[1] * dtype.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, place: tuple[Tensor, slice], values: Tensor) -> None:
        with _named(self.folder):
            for row, some in zip(place[0].tolist(), values.detach().to("cpu", self.dtype)):
                _write(self.file, self._at(row, place[1].start), some)

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        rows, columns = (range(size)[some] for size, some in zip(self.shape, place))
        found = torch.empty(len(rows), len(columns), dtype=self.dtype)
        for row, some in zip(rows, found):
            self.file.seek(self._at(row, columns.start))
            self.file.readinto(some.view(torch.uint8).numpy().data)
        return found.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def _at(self, row: int, column: int) -> int:
        return (row * self.shape[1] + column) * self.dtype.itemsize


def _write(file: IO[bytes], place: int, x: Tensor) -> None:
    file.seek(place)
    file.write(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    file.flush()


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Says of an error which folder is full, and of what."""
    try:
        yield
    except OSError as error:
        message = f"vectors as large as the model are kept in files there meanwhile: {error.strerror}"
        raise OSError(error.errno, message, str(folder)) from error


def forget(folder: Path, name: str) -> None:
    """Removes a vector that was kept under a name, where there is one."""
    for path in (_about(folder, name), _file(folder, name)):
        path.unlink(missing_ok=True)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.vector"


def _about(folder: Path, name: str) -> Path:
    """Where its entries are; written last."""
    return folder / f"{name}.vector.json"


def condensed(vector: Vector) -> Vector:
    """A vector to be multiplied with others, made entry by entry: of a large one every number in bfloat16, half of what
    it takes otherwise. A product of long vectors hardly hears the roundings, 2⁻⁹ |g| |u| over the root of their number.
    """
    return Derived(vector, lambda name: x.to(torch.bfloat16) if (x := vector[name]).dtype == torch.float32 else x)


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
    return sum(float(dots(a[name], [b[name]])) for name in a)


def dots(x: Tensor, others: Sequence[Tensor]) -> Tensor:
    """[K] float64: the products of an entry with those of K other vectors; sums over a block in float32 where both are
    no better.
    """
    found = torch.zeros(len(others), dtype=torch.float64, device=x.device)
    dtypes = [torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32 for y in others]
    flat = [y.reshape(-1) for y in others]
    for start, some in zip(range(0, x.numel(), BLOCK), x.reshape(-1).split(BLOCK)):
        wide = {dtype: some.to(dtype) for dtype in set(dtypes)}
        for k, (y, dtype) in enumerate(zip(flat, dtypes)):
            found[k] += torch.linalg.vecdot(wide[dtype], y[start : start + BLOCK].to(x.device, dtype))
    return found.cpu()


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
        dtype = _widest(*given)
        return elementwise(lambda *xs: sum(x.to(dtype) for x in xs), *given, dtype=dtype)

    return Derived(vectors[0], entry)


def scaled(a: Vector, factor: float | Vector) -> Vector:
    """a times a number, or elementwise times another vector."""

    def entry(name: str) -> Tensor:
        given = [a[name], *([factor[name]] if isinstance(factor, Mapping) else [])]
        number, dtype = 1.0 if isinstance(factor, Mapping) else factor, _widest(*given)
        return elementwise(lambda x, *more: x.to(dtype) * (more[0].to(dtype) if more else number), *given, dtype=dtype)

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
