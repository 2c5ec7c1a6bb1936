"""What a task's prompts and verdicts depend on besides its options, as hashes: the files that its rows are read from,
and the source of its verifier.

    hash of   the task's class and every function it holds: their own text, and the file of the module each stands in
              of a task of tokencredit: all of `tokencredit.tasks`, which holds every verifier and what it reads

What such a module imports from other modules of your own is not followed, and neither are libraries.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokencredit.durable import digest_of
from tokencredit.tasks.task import OnDisk, Task

OWN = Path(__file__).parent
READ = (".py", ".txt")  # the files of our own verifiers: code, and the vocabulary it reads


class NoSource(ValueError):
    """A part of a verifier that has no source, or holds what cannot be named; the message says which."""


def task_source(task: Task) -> str | None:
    """32 hex digits of the source of a task's verifier; None, with a warning that names it, where there is none."""
    return verifier_source(*_parts(task))


def own_source(task: Task) -> str | None:
    """`task_source` of what is not tokencredit's own, whose version a run records: None where nothing else is there."""
    yours = [part for part in _parts(task) if not _is_own(part)]
    return verifier_source(*yours) if yours else None


def rows_source(task: Task) -> str | None:
    """32 hex digits of the files that a task reads its rows from, byte by byte; None of one that reads none."""
    files = [file for file in task.files() if file.is_file()] if isinstance(task, OnDisk) else []
    return digest_of(files) if files else None


def _parts(task: Task) -> list[Callable[..., Any]]:
    """What its verdicts are made by: its class, and every function it holds."""
    return [type(task), *(value for _, value in sorted(vars(task).items()) if callable(value))]


def verifier_source(*parts: Callable[..., Any]) -> str | None:
    """32 hex digits of the source of functions and classes; None, with a warning that names the one without."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in parts:
            for text in _texts(part):
                digest.update(len(text).to_bytes(8, "big") + text)
    except NoSource as error:
        warnings.warn(
            f"{error}, so a verifier that was edited cannot be told from the one before: stored rewards are used by its"
            " name alone. Put it into a file of its own, as a plain function, or use another directory after a change",
            stacklevel=3,
        )
        return None
    return digest.hexdigest()


def _texts(part: Any) -> Iterator[bytes]:
    """What a function, class, method, partial or callable object says, and what it was given."""
    if isinstance(part, functools.partial):
        yield _value([part.args, part.keywords], part)
        yield from _texts(part.func)
        return
    part = inspect.unwrap(part)
    if inspect.ismethod(part):
        yield from _texts(part.__func__)
        part = type(part.__self__)
    if not (inspect.isroutine(part) or inspect.isclass(part)):
        part = type(part)
    if _is_own(part):
        yield from (path.read_bytes() for path in sorted(OWN.iterdir()) if path.suffix in READ)
        return
    yield _own_text(part)
    file = inspect.getsourcefile(part)
    if file is not None and Path(file).is_file():
        yield Path(file).read_bytes()
    for cell in getattr(part, "__closure__", None) or ():
        inside = cell.cell_contents
        yield from _texts(inside) if callable(inside) else [_value(inside, part)]


def _is_own(part: Any) -> bool:
    return (getattr(part, "__module__", "") or "").startswith("tokencredit.tasks.")


def _own_text(part: Any) -> bytes:
    try:
        return inspect.getsource(part).encode()
    except (OSError, TypeError) as error:
        raise NoSource(f"the verifier {_name(part)} has no source that can be read ({error})") from error


def _value(value: Any, owner: Any) -> bytes:
    """What a function was made with: plain values alone, since only they read the same in another process."""
    try:
        return json.dumps(value, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise NoSource(f"the verifier {_name(owner)} was made with {type(value).__name__} values ({error})") from error


def _name(part: Any) -> str:
    part = part.func if isinstance(part, functools.partial) else part
    return getattr(part, "__qualname__", type(part).__name__)
