"""The stages of a study: each result is stored when it is made, so that a killed study goes on where it was, with the
same numbers.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from tokencredit.durable import DamagedFile, append_line, read_json, read_lines, replace_file, write_json


class Stages:
    """Results under `folder`, by name: JSON values and groups of arrays. `seconds` says what was spent on each, by
    whichever process.

    A stage must be a function of the study's configuration and of earlier stages alone; whoever makes the folder sees
    to it that it belongs to that configuration (`runs.Run.create` refuses another).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether arrays of that name are stored."""
        return (self.folder / f"{name}.npz").exists()

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
            raise DamagedFile(f"{error} Remove it and run the study again.") from error

    def arrays(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays by name."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            start = time.perf_counter()
            made = make()
            replace_file(path, lambda file: np.savez_compressed(file, **made))
            self._spent(name, start)
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (ValueError, OSError, EOFError, KeyError, BadZipFile, zlib.error) as error:
            raise DamagedFile(f"{path} cannot be read ({error}); remove it and run the study again.") from error

    def _spent(self, name: str, start: float) -> None:
        append_line(self.folder / "seconds.jsonl", {"stage": name, "seconds": time.perf_counter() - start})

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every finished stage."""
        return {record["stage"]: record["seconds"] for record in read_lines(self.folder / "seconds.jsonl")}
