"""N gradients, one a row, as a matrix [N, M] that is read by columns: in memory, or where memory may not hold it in a
file.

Numbers are float32, or better where the model is. In the file of a large model they are bfloat16: a product of such
long vectors hardly hears the roundings (`vectors.condensed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.vectors import FiledMatrix, large, size
from tokencredit.lm.room import Room
from tokencredit.masked import wide

LIMIT = 2 << 30
"""Bytes of gradients that are held in memory, at most; where a file may hold them, a quarter of the room there is."""
READ = 1 << 24
"""Numbers that are read at once, about."""

Matrix = Tensor | FiledMatrix


def gradient_bytes(parameters: Mapping[str, Tensor]) -> int:
    """Bytes of one gradient in a file."""
    return size(parameters) * _filed_as(parameters).itemsize


def file_bytes(parameters: Mapping[str, Tensor], num: int, room: Room) -> int:
    """Bytes of a file of `num` gradients, with a folder for it; 0 where memory may hold them."""
    held = num * size(parameters) * precision(parameters).itemsize
    return num * gradient_bytes(parameters) if held > min(LIMIT, room.space // 4) else 0


def precision(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a gradient in memory."""
    return wide(torch.empty(0, dtype=next(iter(parameters.values())).dtype)).dtype


def _filed_as(parameters: Mapping[str, Tensor]) -> torch.dtype:
    kept = precision(parameters)
    return torch.bfloat16 if large(parameters) and kept == torch.float32 else kept


def blank(
    passes: Passes,
    num: int,
    what: str,
    *,
    limit: int = LIMIT,
    folder: Path | None = None,
    device: torch.device | None = None,
) -> Matrix:
    """A matrix of zeros for the gradients of `num` tokens, completions or groups (`what`), on a device, the model's by
    default; more than `limit` bytes in a file of `folder`. ValueError for those without one.
    """
    parameters, width, dtype = passes.parameters, size(passes.parameters), precision(passes.parameters)
    device, needed = device or next(iter(parameters.values())).device, num * width * dtype.itemsize
    if needed <= (limit if folder is None else min(limit, passes.room.space // 4)):
        return torch.zeros(num, width, dtype=dtype, device=device)
    if folder is None:
        raise ValueError(
            f"{num:,} {what} × {width:,} parameters are {needed / 2**30:.1f} GiB of gradients, more than the "
            f"{limit / 2**30:.1f} GiB that may be held in memory. Name a folder for them, take fewer prompts or"
            " rollouts, whole completions, or a sketch (`sketched_features`)"
        )
    return FiledMatrix((num, width), _filed_as(parameters), folder, device)


def places(parameters: Mapping[str, Tensor]) -> dict[str, slice]:
    """The columns of every parameter."""
    found, start = {}, 0
    for name, p in parameters.items():
        found[name] = slice(start, start + p.numel())
        start += p.numel()
    return found


def blocks(width: int, rows: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of the columns, a multiple of so many each but the last, of which some rows are read together."""
    many = max(READ // max(rows, 1) // multiple, 1) * multiple
    yield from (slice(start, min(start + many, width)) for start in range(0, width, many))
