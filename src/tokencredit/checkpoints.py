"""What vouches for a checkpoint: a mark that lists its files with their sizes and SHA-256.

    checkpoint-10/complete   {"format": 1, "files": {"model.safetensors": {"size": 436232, "sha256": "..."}, ...}}

The mark is written last, when every file it lists is on the disk. A checkpoint without it was cut short; one that
differs from it is damaged: it is named in a warning, and the one before it is used. An empty mark is that of a version
that listed nothing: the checkpoint is used, and a warning says that nobody can vouch for it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokencredit.durable import DamagedFile, read_json, sync, write_json

COMPLETE = "complete"
FORMAT = 1
RESUMED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""What training goes on from besides the weights; every process of several has a random state of its own."""


class CheckpointWarning(UserWarning):
    """A checkpoint that is not used, or that nobody can vouch for."""


def warn(message: str) -> None:
    """Tell it, with the caller's caller as its place."""
    warnings.warn(message, CheckpointWarning, stacklevel=3)


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder, by its name; None for any other name."""
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(named[1]) if named else None


def seal(folder: str | Path) -> None:
    """Put every file of the folder on the disk, then write the mark that lists them."""
    folder = Path(folder)
    files = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and each.name != COMPLETE):
        sync(path)
        stat = path.stat()
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": stat.st_size, "sha256": _sha256(path, stat.st_size, stat.st_mtime_ns)}
    for directory in {path.parent for path in folder.rglob("*")} | {folder.parent}:
        sync(directory)
    write_json(folder / COMPLETE, {"format": FORMAT, "files": files})


def is_vouched(folder: Path) -> bool:
    """Whether the mark says anything."""
    return (folder / COMPLETE).stat().st_size > 0


def damage(folder: Path, needs: Sequence[str] = (), *, hashes: bool = True) -> str | None:
    """How a marked checkpoint differs from what was written; None where it does not.

    needs    files that must be there, by name or pattern, besides those that the mark lists
    hashes   False compares sizes alone, which is enough for a list of what there is
    """
    if not is_vouched(folder):
        found: dict[str, Any] = {path.name: None for path in folder.iterdir() if path.is_file()}
        del found[COMPLETE]
    else:
        try:
            found = read_json(folder / COMPLETE)["files"]
            found = {name: (about["size"], about["sha256"]) for name, about in found.items()}
        except (DamagedFile, TypeError, KeyError, AttributeError):
            return f"its mark ({COMPLETE}) cannot be read"
    found |= {pattern: None for pattern in needs if not fnmatch.filter(found, pattern)}
    return next((told for name, listed in found.items() if (told := _differs(folder / name, listed, hashes))), None)


def _differs(path: Path, listed: tuple[int, str] | None, hashes: bool) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    stat = path.stat()
    if listed is None:
        return None if stat.st_size else f"{path.name} is empty"
    if stat.st_size != listed[0]:
        return f"{path.name} has {stat.st_size:,} bytes in place of {listed[0]:,}"
    if hashes and _sha256(path, stat.st_size, stat.st_mtime_ns) != listed[1]:
        return f"{path.name} holds other bytes than were written"
    return None


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of a file with this size and time of change: a process that opens a checkpoint twice reads it once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def marked(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder that have a mark, the newest first."""
    there = [path for path in Path(folder).glob("checkpoint-*") if (path / COMPLETE).is_file()]
    steps = {step: path for path in there if (step := step_of(path)) is not None}
    return [steps[step] for step in sorted(steps, reverse=True)]


def listed(folder: str | Path) -> dict[int, Path]:
    """{step: checkpoint} of those whose files are all there, by size, in ascending order; a damaged one is warned of.

    Whoever opens one checks its bytes (`check`).
    """
    found: dict[int, Path] = {}
    for path in reversed(marked(folder)):
        if told := damage(path, hashes=False):
            warn(f"{path} is damaged ({told}) and is left out")
        else:
            found[int(path.name.rpartition("-")[2])] = path
    return found


def check(folder: str | Path) -> None:
    """DamagedFile where a checkpoint that was asked for by name is damaged, or one of a run was cut short; any other
    folder without a mark is not checked.
    """
    folder = Path(folder)
    if not (folder / COMPLETE).is_file():
        if step_of(folder) is not None and (folder.parent.parent / "run.json").is_file():
            raise DamagedFile(f"{folder} was cut short while it was written: it has no mark ({COMPLETE})")
        return
    if told := damage(folder):
        raise DamagedFile(f"{folder} is damaged: {told}. Open another checkpoint, or train it again")
    if not is_vouched(folder):
        warn(_unvouched(folder))


def newest(folder: str | Path, needs: Sequence[str] = ()) -> Path | None:
    """The newest whole checkpoint; those that are passed over are named in a warning."""
    return next(whole(folder, needs), None)


def whole(folder: str | Path, needs: Sequence[str] = ()) -> Iterator[Path]:
    """The whole checkpoints, the newest first, each checked when it is asked for."""
    for path in marked(folder):
        if told := damage(path, needs):
            warn(f"{path} is damaged ({told}): the one before it is used")
            continue
        if not is_vouched(path):
            warn(_unvouched(path))
        yield path


def _unvouched(folder: Path) -> str:
    return f"{folder} was written by a version that listed no files in its mark: nobody can vouch for what it holds"


def keep_newest(folder: str | Path, number: int | None) -> None:
    """Remove the older checkpoints; None or 0 keeps all. The mark goes first: what is half removed is unfinished."""
    for path in marked(folder)[number:] if number else []:
        (path / COMPLETE).unlink()
        shutil.rmtree(path, ignore_errors=True)


def clear_after(folder: Path, step: int) -> None:
    """Make way for training that goes on from `step`: what was cut short is removed, what is damaged or later is set
    aside under another name, where no count of checkpoints finds it.
    """
    for path in folder.glob("checkpoint-*"):
        number = step_of(path)
        if number is None or (number <= step and (path / COMPLETE).is_file() and not damage(path, hashes=False)):
            continue
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path, ignore_errors=True)
            continue
        aside = path.with_name(f"unused-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
