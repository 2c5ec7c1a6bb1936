"""One process at a time for a directory of results."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tokencredit.durable import fcntl

P = ParamSpec("P")
R = TypeVar("R")
LOCK = ".lock"
_held: set[int] = set()


@contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Hold a directory, which is made; RuntimeError, with its number, where another process holds it.

    The lock is the operating system's, so that a process lets go however it ends; a process that it forks does not
    share it. Nothing is left behind: a directory that was made for this and that nothing was put into is removed. Where
    there are no POSIX locks (Windows), nothing is checked.
    """
    path = Path(path)
    made = not path.exists()
    if fcntl is None:
        path.mkdir(parents=True, exist_ok=True)
        yield
        return
    descriptor = _lock(path)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:
            _held.discard(descriptor)
            (path / LOCK).unlink(missing_ok=True)
            if made and path.is_dir() and not os.listdir(path):
                path.rmdir()
            os.close(descriptor)


def _lock(path: Path) -> int:
    """The descriptor of the locked file, which names this process."""
    while True:
        path.mkdir(parents=True, exist_ok=True)  # its last holder may have removed it again
        try:
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            named = f" (process {holder})" if holder.isdigit() else ""
            raise RuntimeError(
                f"{path} is being written by another process{named}: wait for it, or choose another directory"
            ) from error
        if _is_still(path / LOCK, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)  # its holder removed the file between our opening and our locking it


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def holds_out(function: Callable[P, R]) -> Callable[P, R]:
    """A function that holds the directory which is its argument `out` while it runs."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> Any:
        with exclusive(signature.bind(*args, **kwargs).arguments["out"]):
            return function(*args, **kwargs)

    return held


def _let_go() -> None:
    """In a forked process: the lock is the parent's, and must end with it."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
