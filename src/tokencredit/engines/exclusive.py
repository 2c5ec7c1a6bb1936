"""One process at a time for a run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None


@contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Hold a directory, which is made; RuntimeError where another process holds it. A killed process lets go.

    Where there are no POSIX locks (Windows), nothing is checked.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                f"{path} is being written by another process: wait for it, or choose another directory"
            ) from error
        yield
