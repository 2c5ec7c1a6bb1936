"""Comparing expressions within limits of time and memory, in processes that may be lost.

An answer such as ``9^{9^{9^{9}}}`` makes a computer algebra system compute for ever inside one operation on integers,
which neither an exception nor a thread can stop. So the comparison runs in a process of its own (`judge`), whose worker
dies alone when a question exceeds its limits and is replaced by one that waits (`server`). Questions and answers are
JSON lines on pipes. Works in threads, and after a fork.
"""

import atexit
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120.0
RECOVERY = 512  # questions that end in time before the time limit doubles again
SHARES = 5  # how often the time limit is halved at most: to about a thirtieth


@dataclass(frozen=True)
class Limits:
    """What one comparison may use: `seconds` of CPU time and `megabytes` of address space. `processes` may compare at
    the same time.

    After a question that went over, the next may take half the time, down to a thirtieth, and after `RECOVERY` that
    did not, twice: a batch of hostile answers costs a few times `seconds` in all, not that for each. A process that
    makes no progress at all is ended after ten times `seconds` of wall time.
    """

    seconds: float = 3.0
    megabytes: int = 2048
    processes: int = 2

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.megabytes < 256 or self.processes < 1:
            raise ValueError(f"limits need seconds > 0, megabytes >= 256 and processes >= 1, not {self}")


class Patience:
    """The CPU time that the next question may take, by what those before it took."""

    def __init__(self, seconds: float) -> None:
        self.full, self.halved, self.timeouts, self._ended = seconds, 0, 0, 0
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """The limit in seconds: the full one, halved as often as it had to be."""
        return self.full / 2**self.halved

    def saw(self, timeout: bool) -> None:
        """Take note of how a question ended."""
        with self._lock:
            self.timeouts += timeout
            self._ended = 0 if timeout else self._ended + 1
            if timeout:
                self.halved = min(self.halved + 1, SHARES)
            elif self._ended >= RECOVERY and self.halved:
                self.halved, self._ended = self.halved - 1, 0


class Judge:
    """One process, started at the first question. Not to be used by two threads at once: `Judges` lends it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def ask(self, gold: str, answer: str, seconds: float | None = None) -> str:
        """The reason of the verdict on `answer`, found within `seconds` of CPU time; "timeout" when its worker died of
        it.
        """
        question = {"gold": gold, "answer": answer, "seconds": seconds or self.limits.seconds}
        question = json.dumps(question).encode() + b"\n"
        try:
            if not self._send(question):  # the process was lost between questions, which is not this question's doing
                self.stop()
                self._send(question)
            reply = self._receive(10 * self.limits.seconds)
        except BaseException:  # an interrupted question must not leave its reply to the next one
            self.stop()
            raise
        if reply is None:
            self.stop()
            return "timeout"
        return reply

    def _send(self, question: bytes) -> bool:
        if self.process is None:
            self._start()
        if self.process.poll() is not None:
            return False
        try:
            self.process.stdin.write(question)
        except BrokenPipeError:
            return False
        return True

    def _start(self) -> None:
        self.starts += 1
        script = Path(__file__).with_name("judge.py")
        command = [sys.executable, "-P", str(script), str(self.limits.megabytes * 2**20)]
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
        }  # sympy's order of terms, and so its verdicts, must not vary
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        self._pending = b""
        if self._receive(START_SECONDS) != "ready":
            _kill(self.process)
            message = self.process.stderr.read().decode(errors="replace").strip()
            self.stop()
            raise RuntimeError(
                f"the process that compares expressions did not start (is math-verify installed?): {message[-400:]}"
            )

    def _receive(self, seconds: float) -> str | None:
        """The next line, or None when the process ended, or did not answer within `seconds` of wall time."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    return None
                chunk = os.read(self.process.stdout.fileno(), 4096)
                if not chunk:
                    return None
                self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def stop(self) -> None:
        """End the process; the next question starts another."""
        process, self.process = self.process, None
        if process is not None:
            _kill(process)
            process.wait()
            self._close(process)

    def forget(self) -> None:
        """Let go of a process that belongs to the parent of this, forked, process."""
        process, self.process = self.process, None
        if process is not None:
            process.returncode = 0
            self._close(process)

    @staticmethod
    def _close(process: subprocess.Popen[bytes]) -> None:
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its workers, which are of its group."""
    if hasattr(os, "killpg") and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


class Judges:
    """A few `Judge`s, lent to the threads that ask."""

    def __init__(self, limits: Limits) -> None:
        self.patience = Patience(limits.seconds)
        self.all = [Judge(limits) for _ in range(limits.processes)]
        self._idle: queue.LifoQueue[Judge] = queue.LifoQueue()
        for judge in self.all:
            self._idle.put(judge)

    def ask(self, gold: str, answer: str) -> str:
        """The reason of the verdict; waits for a process to be free."""
        judge = self._idle.get()
        try:
            reason = judge.ask(gold, answer, self.patience.seconds)
            self.patience.saw(reason == "timeout")
            return reason
        finally:
            self._idle.put(judge)


_pools: dict[Limits, Judges] = {}
_lock = threading.Lock()


def compare(gold: str, answer: str, limits: Limits | None = None) -> str:
    """Whether `answer` equals `gold` as mathematics: "correct", "wrong", "unparsed", or "timeout"."""
    limits = limits or Limits()
    with _lock:
        pool = _pools.get(limits) or _pools.setdefault(limits, Judges(limits))
    return pool.ask(gold, answer)


def close() -> None:
    """End all processes; done at exit, and harmless before it."""
    for pool in list(_pools.values()):
        for judge in pool.all:
            judge.stop()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for pool in _pools.values():
        for judge in pool.all:
            judge.forget()
    _pools.clear()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
