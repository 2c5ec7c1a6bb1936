"""Reads logs: files or directories in, `LoggedRollout` out, one after the other in bounded memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokencredit.logs.files import LogRow, Place, columns_of, files_of, rows
from tokencredit.logs.formats import FORMATS, Format, format_of
from tokencredit.logs.rollout import LoggedRollout
from tokencredit.logs.values import number
from tokencredit.tasks.data import inner

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def read(
    paths: Paths, *, format: str | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[LoggedRollout]:
    """The rollouts of log files, in the order of their names (by the numbers in them) and of their rows.

    paths     JSONL and Parquet files, or directories of them
    format    a name of FORMATS; by default told from the columns
    columns   {field: column}: what a column is, where the file calls it otherwise, {"reward": "score"}; dots go down
              into an object, {"answer": "reward_model.ground_truth"}

    ValueError names a file that fits no format and what it lacks, files of several formats, and the first row that is
    wrong; all of that but the last before the first row is read. A last line that was cut off, a file of a
    directory that is no log, and steps that go back are said in warnings.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"there is no format {format!r}; there are: {', '.join(FORMATS)}")
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found = _formats(files_of([Path(path) for path in paths]), format, columns or {})
    return _rollouts(found, columns or {})


def _formats(files: list[tuple[Path, bool]], name: str | None, columns: Mapping[str, str]) -> list[tuple[Path, Format]]:
    """Every file with its format, all of one. What a directory holds besides is left out with a warning."""
    found: list[tuple[Path, Format]] = []
    refused: dict[Path, ValueError] = {}
    for path, named in files:
        there = columns_of(path)
        if not there:
            refused[path] = ValueError(f"{path} has no rows")
            continue
        try:
            found.append((path, _format(path, there, name, columns)))
        except ValueError as error:
            if named:
                raise
            refused[path] = error
    if not found:
        raise next(iter(refused.values()))
    if refused:
        warnings.warn(f"left out, since they hold no rollouts: {', '.join(map(str, refused))}", stacklevel=4)
    first: dict[str, Path] = {}
    for path, each in found:
        first.setdefault(each.name, path)
    if len(first) > 1:
        raise ValueError(
            f"the files are of several formats: {', '.join(f'{path} ({kind})' for kind, path in first.items())}."
            " Read one at a time, or say which with format= or --format"
        )
    return found


def _format(path: Path, there: list[str], name: str | None, columns: Mapping[str, str]) -> Format:
    for name_of, column in columns.items():
        if column.split(".")[0] not in there:
            raise ValueError(f"{path}: no column {column!r} for {name_of!r}; there are: {', '.join(there)}")
    there = [*there, *columns]
    if name is None:
        return format_of(there, str(path))
    if missing := FORMATS[name].missing(there):
        raise ValueError(
            f"{path} is not of the format {name} ({FORMATS[name].what}): no column {' and no '.join(missing)}; there"
            f" are: {', '.join(there)}"
        )
    return FORMATS[name]


def _rollouts(files: list[tuple[Path, Format]], columns: Mapping[str, str]) -> Iterator[LoggedRollout]:
    remarks = _Remarks()
    before: Path | None = None
    for path, kind in files:
        usual: Collection[str] = ()
        previous, before = before, path
        if kind.again and previous and path.suffix == ".parquet" and kind.again(previous, path):
            warnings.warn(f"{path} holds the rollouts of the table before it, and was left out", stacklevel=2)
            continue
        for place, row in rows(path):
            if row.keys() != usual:
                if missing := kind.missing([*row, *columns]):
                    raise ValueError(f"{place} has no {' and no '.join(missing)}, which {kind.name} rows have")
                usual = row.keys()
            for rollout in _read(row, place, kind, columns):
                remarks.step(rollout)
                if kind.sums and "reward" not in columns:
                    remarks.sum(rollout)
                yield rollout


@dataclass
class _Remarks:
    """What is said once of a log while it is read."""

    last: int | None = None
    said: set[str] = field(default_factory=set)

    def step(self, rollout: LoggedRollout) -> None:
        """A step that stands after a later one."""
        if rollout.step is None:
            return
        if self.last is not None and rollout.step < self.last:
            self._once("step", f"{rollout.place}: step {rollout.step} stands after step {self.last}")
        self.last = rollout.step

    def sum(self, rollout: LoggedRollout) -> None:
        """A reward that is the sum of several."""
        if len(rollout.rewards) > 1:
            self._once(
                "sum",
                f"{rollout.place}: the reward is the sum of {', '.join(rollout.rewards)}, which were logged without"
                ' their weights; columns={"reward": NAME} or --column reward=NAME takes one of them',
            )

    def _once(self, what: str, text: str) -> None:
        if what not in self.said:
            self.said.add(what)
            warnings.warn(text, stacklevel=4)


def _read(row: LogRow, place: Place, kind: Format, columns: Mapping[str, str]) -> list[LoggedRollout]:
    """The rollouts of a row, its columns under the names of the fields that they are said to be. A reward that is named
    is the reward, whatever else the format would make it of.
    """
    if not columns:
        found = kind.read(row, place)
        return found if isinstance(found, list) else [found]
    moved = {field: inner(row, column) for field, column in columns.items()}
    rewards = {"reward": moved.pop("reward")} if "reward" in moved else {}
    gone = {column for field, column in columns.items() if field in moved}
    rollouts = _read({name: x for name, x in row.items() if name not in gone} | moved, place, kind, {})
    return [replace(each, reward=number(rewards, "reward", place)) for each in rollouts] if rewards else rollouts
