"""Stages of a work: each result is stored when it is made, so that what is killed goes on where it was, with the same
numbers.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from tokencredit.distribute.lost import Lost
from tokencredit.durable import DamagedFile, append_line, read_json, read_lines, replace_file, write_json


@contextmanager
def stored_arrays(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of a .npz, each read when it is asked for. DamagedFile names one that cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            yield stored
    except (ValueError, OSError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        raise DamagedFile(f"{path} cannot be read ({error}); remove it and run the same command again.") from error


class Stages:
    """Results under `folder`, by name: JSON values and groups of arrays. `seconds` says what was spent on each, by
    whichever process; of pieces that several make, the time from one to the next.

    A stage must be a function of what is asked and of earlier stages alone; whoever makes the folder sees to it that it
    belongs to that question (`runs.Run.create_study` refuses another).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where arrays of that name are."""
        return self.folder / f"{name}.npz"

    def has(self, name: str) -> bool:
        """Whether arrays of that name are stored."""
        return self.path(name).exists()

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value; what is returned has been through JSON whether it was made now or earlier."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            write_json(path, make())
            self._spent(name, start)
        try:
            return read_json(path)
        except DamagedFile as error:
            raise DamagedFile(f"{error} Remove it and run the same command again.") from error

    def arrays(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays by name."""
        path = self.path(name)
        if not path.exists():
            start = time.perf_counter()
            self._store(name, make(), start)
        with stored_arrays(path) as stored:
            return dict(stored)

    def pieces(
        self, names: Sequence[str], make: Callable[[list[int]], Iterable[tuple[int, Any]]]
    ) -> list[dict[str, np.ndarray]]:
        """Arrays under several names. Those that are not there are made by `make`, given their places in `names`: it
        yields (place, arrays or `Lost`) as they come, and each is stored at once. The error of the first that was lost
        is raised when all the others are stored.
        """
        absent = [place for place, name in enumerate(names) if not self.has(name)]
        lost: dict[int, Exception] = {}
        start = time.perf_counter()
        for place, made in make(absent) if absent else ():
            if isinstance(made, Lost):
                lost[place] = made.error
            else:
                self._store(names[place], made, start)
            start = time.perf_counter()
        if lost:
            error = lost[min(lost)]
            error.add_note(f"{len(lost)} of {len(names)} pieces failed, {names[min(lost)]} first; the rest is kept")
            raise error
        return [self.arrays(name, dict) for name in names]

    def drop(self, name: str) -> None:
        """Removes arrays of that name, and what a kill left of writing them."""
        for path in [self.path(name), *self.folder.glob(f".{name}.npz.*.tmp")]:
            path.unlink(missing_ok=True)

    def _store(self, name: str, made: Mapping[str, Any], start: float) -> None:
        replace_file(self.path(name), lambda file: np.savez_compressed(file, **made))
        self._spent(name, start)

    def _spent(self, name: str, start: float) -> None:
        append_line(self.folder / "seconds.jsonl", {"stage": name, "seconds": time.perf_counter() - start})

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every finished stage."""
        return {record["stage"]: record["seconds"] for record in read_lines(self.folder / "seconds.jsonl")}
