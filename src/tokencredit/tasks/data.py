"""Reading rows from files, with the line number each came from, and dividing them into a train and a test part."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from tokencredit.durable import not_utf8, read_rows
from tokencredit.tasks.task import Task

Split = Literal["train", "test"]
SUFFIXES = (".jsonl", ".parquet")
PARTS = ("all", "validation", "final")


def read(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSONL or Parquet file, each with its name for messages (file and 1-based line or row).

    JSONL is read line by line, because an error must name the line and because the answers of one file may be of
    several types. Blank lines are skipped and counted. ValueError names a file that is not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}{_neighbours(path)}")
    if path.suffix == ".jsonl":
        yield from ((f"{path.name}, line {number}", row) for number, row in read_objects(path))
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise ValueError(
            f"{path}: rows are read from files whose names end in {' or '.join(SUFFIXES)}, not in {path.suffix!r}"
        )


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers; blank lines are skipped. ValueError names file and line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: {not_utf8(raw, error)}") from error
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}, line {number}: not JSON ({where})") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: a row is a JSON object with columns, not {type(row).__name__}"
                )
            yield number, row


def split_of(prompt: Any) -> Split:
    """The part a prompt belongs to: a fifth of all prompts, by the MD5 of the prompt, are "test". Equal prompts are
    never divided.
    """
    return "test" if _digest(prompt) % 5 == 0 else "train"


def _digest(value: Any) -> int:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16)


def part_of(prompt: Any) -> Literal["validation", "final"]:
    """The part of the test split that a prompt belongs to: a quarter, by MD5, serves to choose settings, the rest to
    report.
    """
    return "validation" if _digest(["part", prompt]) % 4 == 0 else "final"


def held_out(task: Task, num: int, part: str = "all", seed: int = 0) -> list[dict[str, Any]]:
    """`num` prompts of a task's test split; of one part of it, `num` different ones, drawn by `seed` (fewer where it
    has fewer).
    """
    if part == "all":
        return task.rows("test", num, seed)
    rows = {str(row["prompt"]): row for row in task.rows("test", None, seed) if part_of(row["prompt"]) == part}
    return take(list(rows.values()), num, seed)


def check_split(split: str) -> None:
    """Refuse a split that is not "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")


def take(rows: list[dict[str, Any]], limit: int | None, seed: int) -> list[dict[str, Any]]:
    """At most `limit` rows, drawn by `seed`, in file order. A smaller limit draws a subset of what a larger one
    draws.
    """
    if limit is None or limit >= len(rows):
        return rows
    if limit < 0:
        raise ValueError(f"limit is a number of rows or None, not {limit}")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[index] for index in sorted(order[:limit])]


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(read_rows(path), start=1):
        yield f"{path.name}, row {number}", row


def inner(row: Mapping[str, Any], column: str) -> Any:
    """What stands in a column; dots go down into objects, `reward_model.ground_truth`. None where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _neighbours(path: Path) -> str:
    if path.is_dir():
        return " (it is a directory)"
    if not path.parent.is_dir():
        return f" (nor is there a directory {path.parent})"
    found = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in SUFFIXES)
    return (
        f" (in {path.parent} there are: {', '.join(found[:8])})"
        if found
        else f" ({path.parent} holds no .jsonl or .parquet file)"
    )
