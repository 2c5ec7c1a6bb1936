"""Anybody's estimates of tokens, as a file: Parquet or JSONL, a row per token or a row per completion.

    trace, position        of the token, as in truth.parquet; a row per completion has `trace` alone, and lists
    NAME                   the estimate, NAME one of `TRUTHS`: it is held against the truth by its size
    NAME_low, NAME_high    an interval of it, or NAME_standard_error, from which one follows
    anything else          a score: a number per token that only puts them in an order, the largest |score| first

Without `trace` a row per completion belongs to the completion in its place. A directory is one that
`tokencredit pivotality run` wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.durable import read_mapping, read_rows
from tokencredit.tasks.data import read_objects
from tokencredit.truth.table import TRUTHS

NORMAL = 1.959964
PLACES = ("trace", "position")
ENDS = ("_low", "_high", "_standard_error")


@dataclass(frozen=True)
class Estimates:
    """One estimator's numbers in the order of the truth's tokens, NaN where it says nothing.

    values    {column: [N]}
    bounds    {column: (low [N], high [N])}, for those with intervals
    spent     tokens sampled for them; None where nobody said
    """

    name: str
    values: dict[str, np.ndarray]
    bounds: dict[str, tuple[np.ndarray, np.ndarray]]
    spent: int | None = None


def read_estimates(path: Path, places: Sequence[tuple[int, int]], spent: int | None = None) -> Estimates:
    """The estimates in a file or a pivotality run's directory, put at the `places` (trace, position) of the truth.

    ValueError where it has no number per token, names a token that there is not, or one twice.
    """
    path = Path(path)
    name = path.stem if path.is_file() else path.name
    if path.is_dir():
        known = read_mapping(path / "result.json", "figures")["figures"]
        spent = int(known["generated"]["value"]) if spent is None and "generated" in known else spent
        path = path / "tokens.parquet"
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    rows = read_rows(path) if path.suffix == ".parquet" else [row for _, row in read_objects(path)]
    if not rows:
        raise ValueError(f"{path} has no rows")
    rows = rows if "position" in rows[0] else _exploded(rows, path, places)
    at = {place: k for k, place in enumerate(places)}
    found: dict[str, np.ndarray] = {}
    seen: set[tuple[int, int]] = set()
    for number, row in enumerate(rows, start=1):
        if any(column not in row for column in PLACES):
            raise ValueError(f"{path}, row {number}: needs trace and position; it has: {', '.join(row)}")
        place = (int(row["trace"]), int(row["position"]))
        if place not in at:
            raise ValueError(f"{path}, row {number}: there is no token {place[1]} in trace {place[0]} of the truth")
        if place in seen:
            raise ValueError(f"{path}, row {number}: token {place[1]} of trace {place[0]} stands there twice")
        seen.add(place)
        for column, value in row.items():
            if column not in PLACES and _is_number(value):
                found.setdefault(column, np.full(len(places), np.nan))[at[place]] = value
    if not found:
        raise ValueError(f"{path} has no column of numbers beside trace and position; it has: {', '.join(rows[0])}")
    bounds = {column: pair for column in found if (pair := _bounds(found, column)) is not None}
    values = {name: x for name, x in found.items() if not _is_end(name, found)}
    return Estimates(name, values, bounds, spent)


def _exploded(rows: list[dict[str, Any]], path: Path, places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """A row per token of rows with lists."""
    lengths: dict[int, int] = {}
    for trace, _ in places:
        lengths[trace] = lengths.get(trace, 0) + 1
    if "trace" not in rows[0] and len(rows) != len(lengths):
        raise ValueError(f"{path}: {len(rows)} rows without a column trace, for {len(lengths)} completions")
    flat = []
    for number, row in enumerate(rows):
        trace = int(row.get("trace", number))
        for position in range(lengths.get(trace, 0)):
            own = {
                name: values[position]
                for name, values in row.items()
                if isinstance(values, list)
                and len(values) == lengths[trace]
                and name not in ("tokens", "completion_ids")
            }
            flat.append({"trace": trace, "position": position, **own})
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_end(name: str, columns: dict[str, np.ndarray]) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) in columns for end in ENDS)


def _bounds(columns: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    if f"{name}_low" in columns and f"{name}_high" in columns:
        return columns[f"{name}_low"], columns[f"{name}_high"]
    if f"{name}_standard_error" in columns:
        half = NORMAL * columns[f"{name}_standard_error"]
        return columns[name] - half, columns[name] + half
    return None


def is_truth(name: str) -> bool:
    """Whether a column is an estimate of something that is known, rather than a score."""
    return name in TRUTHS
