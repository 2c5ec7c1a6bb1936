"""What a command that writes one file keeps until that file is whole: a folder beside it, which holds what was asked
and the pieces that are done, so that the same command goes on where it was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokencredit.exclusive import exclusive
from tokencredit.runs import Run, RunError
from tokencredit.stages import Stages


def folder_of(out: Path) -> Path:
    """Where it is."""
    return out.with_name(f"{out.name}.parts")


@contextmanager
def pieces_beside(out: Path, what: str, **asked: Any) -> Iterator[Stages]:
    """The pieces of the file `out` that a command called `what` makes; the folder is gone when it is whole. `asked` is
    what `Run.create_study` tells one question from another by. RunError names what differs where pieces of another
    question are there; a folder without a piece is nobody's.
    """
    folder = folder_of(out)
    with exclusive(folder):
        if not _pieces(folder):
            _empty(folder)
        try:
            Run.create_study(folder, study=what, **asked)
        except RunError as error:
            raise RunError(
                f"{folder} holds what an unfinished `{what}` with the same --out has done, and it was asked something"
                f" else: give another --out, or remove that folder.\n{error}"
            ) from error
        try:
            yield Stages(folder / "stages")
        except BaseException:
            if not _pieces(folder):
                _empty(folder)
            raise
        _empty(folder)  # run.json after the pieces: whose they are is known as long as one is there
        shutil.rmtree(folder)


def _pieces(folder: Path) -> list[Path]:
    return list((folder / "stages").glob("*.npz"))


def _empty(folder: Path) -> None:
    """Removes what is in it but the lock, with which a folder that is empty goes."""
    shutil.rmtree(folder / "stages", ignore_errors=True)
    (folder / "run.json").unlink(missing_ok=True)
