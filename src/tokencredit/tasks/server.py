"""Answers questions, one line each, in processes that may be lost: what asks is told so and goes on at once.

The server forks the process that works, and one more that waits to replace it. Where a question ends the worker (its
limit of CPU time or memory, a crash), the server says `LOST`, the spare goes on with the next question, and a new spare
is forked. A fork of a process that has loaded everything costs milliseconds, where a new interpreter with sympy costs a
second or two. Imports nothing of tokencredit: `judge` runs it in a fresh interpreter.

One question is in flight at a time: a line is read by whoever works. Without `os.fork` the server works itself.
"""

import gc
import mmap
import os
from collections.abc import Callable
from typing import Any

LOST = b'"timeout"\n'

Handle = Callable[[bytes], bytes]


def limit_memory(num_bytes: int) -> None:
    """Cap the address space and leave no core file, where the system knows such limits."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if num_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    except (ImportError, ValueError, OSError):
        return


def limit_time(seconds: float) -> None:
    """End this process after `seconds` more of CPU time; 0 calls it off.

    The timer's signal keeps its default action, which ends the process even while it is inside one long operation on
    integers that no Python handler could interrupt. CPU time, so that a busy machine does not change a verdict.
    """
    import signal

    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a process may be born ignoring it
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve(handle: Handle, source: int, sink: int) -> None:
    """Answer the lines of the file descriptor `source` on `sink` by `handle`, until the source ends."""
    if not hasattr(os, "fork"):
        return work(handle, source, sink, bytearray(1))
    busy = mmap.mmap(-1, 1)  # shared with the workers: whether a question is being answered
    gc.collect()
    gc.freeze()
    spare, start = _fork(handle, source, sink, busy)
    while True:
        worker, started = spare, start
        spare, start = _fork(handle, source, sink, busy, started)
        os.write(started, b"1")
        _, status = os.waitpid(worker, 0)
        os.close(started)
        if status == 0:
            break
        if busy[0]:
            busy[0] = 0
            if not _write(sink, LOST):
                break
    os.close(start)  # the spare reads the end of its pipe, and ends
    os.waitpid(spare, 0)


def _fork(handle: Handle, source: int, sink: int, busy: Any, other: int | None = None) -> tuple[int, int]:
    """A worker that waits for a byte on a pipe before it reads a question: its process id, and the pipe's end here.
    `other` is such an end of another worker, which must not stay open in this one.
    """
    wait, start = os.pipe()
    if (child := os.fork()) != 0:
        os.close(wait)
        return child, start
    status = 1
    try:
        for end in (start, other):
            if end is not None:
                os.close(end)
        if os.read(wait, 1):
            work(handle, source, sink, busy)
        status = 0
    finally:
        os._exit(status)


def work(handle: Handle, source: int, sink: int, busy: Any) -> None:
    """Answer questions in this process."""
    pending = b""
    while True:
        while b"\n" not in pending:
            chunk = os.read(source, 1 << 16)
            if not chunk:
                return
            pending += chunk
        question, _, pending = pending.partition(b"\n")
        busy[0] = 1
        reply = handle(question)
        busy[0] = 0
        if not _write(sink, reply + b"\n"):
            return


def _write(sink: int, data: bytes) -> bool:
    try:
        while data:
            data = data[os.write(sink, data) :]
    except BrokenPipeError:
        return False
    return True
