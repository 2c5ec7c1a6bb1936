"""A function of your own, such as a verifier, in a process of its own: one that hangs costs a bounded time, no run.

The process is forked when this is made, so any function works, a closure or a lambda too, and nothing of it is
sent: the arguments go there as JSON, the result comes back as JSON. It is made early, before a model is loaded,
and replaces its own workers (`server`): nothing large is forked later. A call costs some tens of microseconds besides
the function's own.

What it does to globals stays there. Where it raises, it is called once more here, so that the error is a true one. A
row that JSON cannot hold (dates, bytes) is verified here, without limit, and so is everything where there is no fork.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from tokencredit.tasks import server

WALL = 10  # a call that neither ends nor uses CPU time is ended after so many times the limit of CPU time
WARMING = 10  # the first call of a worker, which imports what the function needs, has so many times the limit

WARMED = 3  # first calls that may be lost with that limit: a function that always hangs is not given it for ever

LOST = object()  # the result of a call that went over its limit, or ended its process

_alive: weakref.WeakSet[Isolated] = weakref.WeakSet()


class Isolated:
    """Calls `function(completion, row, **told)`, whose results JSON can hold, within `seconds` of CPU time; `LOST` is
    the result where that was not enough.
    """

    def __init__(self, function: Callable[..., Any], seconds: float) -> None:
        if seconds <= 0:
            raise ValueError(f"the limit of a verifier is above 0 seconds, not {seconds}; None sets none")
        self.function, self.seconds = function, seconds
        self.lost = 0  # calls that went over
        self._lock = threading.Lock()
        self._process: int | None = None
        self._known: bytes | None = None  # a question that ended in time: it warms a new worker
        self._cold = True
        if hasattr(os, "fork"):
            self._start()
            _alive.add(self)

    def __call__(self, completion: str, row: dict, **told: Any) -> Any:
        question = _as_line(completion, row, told) if hasattr(os, "fork") else None
        if question is None:
            return self.function(completion, row, **told)
        with self._lock:
            if self._cold and self._known is not None:
                self._ask(self._known, WARMING * self.seconds)
            warming = self._cold and self.lost < WARMED
            reply = self._ask(question, self.seconds * (WARMING if warming else 1))
            if reply == "timeout":
                self.lost += 1
                return LOST
            self._known = self._known or question
        # What raised there raises here, where the caller sees it; what only failed for being there succeeds.
        return self.function(completion, row, **told) if reply == "raised" else reply["result"]

    def _ask(self, question: bytes, seconds: float) -> Any:
        if self._process is None:
            self._start()
        try:
            with contextlib.suppress(BrokenPipeError):
                _write_all(self._questions, json.dumps(seconds).encode() + b" " + question)
            reply = self._receive(WALL * seconds)
        except BaseException:  # an interrupted call must not leave its reply to the next one
            self.close()
            raise
        if reply is None:
            self.close()
            reply = "timeout"
        self._cold = reply == "timeout"
        return reply

    def _receive(self, seconds: float) -> Any:
        deadline, pending = time.monotonic() + seconds, b""
        while not pending.endswith(b"\n"):
            ready, _, _ = select.select([self._replies], [], [], max(deadline - time.monotonic(), 0.0))
            chunk = os.read(self._replies, 4096) if ready else b""
            if not chunk:
                return None
            pending += chunk
        return json.loads(pending)

    def _start(self) -> None:
        source, self._questions = os.pipe()
        self._replies, sink = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Threads of this process do not exist in the child, which calls the function and nothing else.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            self._serve(source, sink)
        os.close(source)
        os.close(sink)
        self._process, self._cold = child, True

    def _serve(self, source: int, sink: int) -> None:
        """Answer questions until there are no more; never returns."""
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.close(self._questions)
            os.close(self._replies)
            server.serve(self._answer, source, sink)
        finally:
            os._exit(0)

    def _answer(self, line: bytes) -> bytes:
        seconds, _, question = line.partition(b" ")
        completion, row, told = json.loads(question)
        server.limit_time(float(seconds))
        try:
            reply = json.dumps({"result": self.function(completion, row, **told)})
        except Exception:
            reply = json.dumps("raised")
        server.limit_time(0)
        sys.stdout.flush()
        sys.stderr.flush()
        return reply.encode()

    def close(self) -> None:
        """End the process; the next call starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)
        self.forget()

    def forget(self) -> None:
        """Let go of a process that belongs to the parent of this, forked, process."""
        self._process, self._cold = None, True
        for pipe in (self._questions, self._replies):
            with contextlib.suppress(OSError):
                os.close(pipe)

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()


def _as_line(completion: str, row: dict, told: dict) -> bytes | None:
    """A question as one line of JSON, None where JSON does not give back the same."""
    question = [completion, row, told]
    try:
        line = json.dumps(question)
        return line.encode() + b"\n" if json.loads(line) == question else None
    except (TypeError, ValueError):
        return None


def _write_all(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def _close_all() -> None:
    for isolated in list(_alive):
        isolated.close()


def _after_fork() -> None:
    for isolated in list(_alive):
        if isolated._process is not None:
            isolated._lock = threading.Lock()
            isolated.forget()


if hasattr(os, "fork"):
    atexit.register(_close_all)
    os.register_at_fork(after_in_child=_after_fork)
