"""The rows of log files, one after the other in bounded memory, each with the place it stands at."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokencredit.durable import DamagedFile, not_utf8

SUFFIXES = (".jsonl", ".parquet")
BATCH_BYTES = 8 << 20
"""Uncompressed bytes of a Parquet file that become Python objects together, which take some ten times as much."""
OWN = (("run.json", "tokens/step_*.parquet"), ("traces.parquet", "traces.parquet"))
"""Of our own directories, told by a file, the files that are a log."""

LogRow = dict[str, Any]


class Place(NamedTuple):
    """Where a row stands, counted from 1."""

    file: Path
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {'line' if self.file.suffix == '.jsonl' else 'row'} {self.number}"


def files_of(paths: Sequence[Path]) -> list[tuple[Path, bool]]:
    """(file, whether it was named itself) of files and of directories, whatever lies below them; numbers in names count
    as numbers: `2.jsonl` before `10.jsonl`.

    FileNotFoundError for a path that is not there, ValueError for a file of another kind or a directory without files.
    """
    found: list[tuple[Path, bool]] = []
    for path in paths:
        if path.is_dir():
            own = [found for marker, pattern in OWN if (path / marker).exists() for found in path.glob(pattern)]
            below = own or [each for each in path.rglob("*") if each.suffix in SUFFIXES and not _hidden(each, path)]
            if not below:
                raise ValueError(f"{path} holds no {' or '.join(SUFFIXES)} file")
            found += [(each, False) for each in sorted(below, key=natural)]
        elif not path.is_file():
            raise FileNotFoundError(f"no such file or directory: {path}")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: logs are read from {' and '.join(SUFFIXES)} files, not from {path.suffix!r}")
        else:
            found.append((path, True))
    return found


def natural(path: Path) -> list[tuple[int, str]]:
    """Sorts names with numbers in them by the numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _hidden(path: Path, top: Path) -> bool:
    """Whether a name begins with a dot, or it is what prime-rl notes beside its traces, which are read with them."""
    return any(part.startswith(".") or part == "annotations" for part in path.relative_to(top).parts)


def columns_of(path: Path) -> list[str]:
    """The columns of a file: those of its schema, or of its first line; none where it has no rows."""
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return list(file.schema_arrow.names) if file.metadata.num_rows else []
    return next((list(row) for _, row in rows(path)), [])


def rows(path: Path) -> Iterator[tuple[Place, LogRow]]:
    """The rows of a file. A last line that was cut off, as by a kill, is skipped with a warning; ValueError names any
    other line that is no JSON object, DamagedFile a Parquet file that is not whole.
    """
    return _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[Place, LogRow]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = Place(path, number)
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                if not raw.endswith(b"\n"):
                    warnings.warn(f"{place}: the last line is cut off and was left out", stacklevel=2)
                    return
                what = not_utf8(raw, error) if isinstance(error, UnicodeDecodeError) else f"not JSON ({error})"
                raise ValueError(f"{place}: {what}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a row is a JSON object with columns, not {type(row).__name__}")
            yield place, row


def _parquet_rows(path: Path) -> Iterator[tuple[Place, LogRow]]:
    import pyarrow

    number = 0
    with _parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        widest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=0)
        try:
            for batch in file.iter_batches(batch_size=max(1, min(4096, int(BATCH_BYTES / max(widest, 1))))):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(path, number), row
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DamagedFile:
    return DamagedFile(
        f"{path} is not a whole Parquet file ({' '.join(str(error).split())[:200]}): restore or remove it"
    )
