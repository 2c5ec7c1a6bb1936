"""Jobs as processes of their own, side by side: one that fails is named and stops no other; interrupted, all are
stopped first.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tokencredit.lifeline import ask_the_kernel

GRACE = 10


def run_all(jobs: Mapping[str, Callable[[], Any]], workers: int, watch: Callable[[str, int | None], None]) -> list[str]:
    """Run the jobs in their order, `workers` at a time; the names of those that failed.

    jobs   {name: function that starts it}; what it returns has the methods poll, terminate, wait and kill of
           subprocess.Popen
    watch  called with the name and None, a few times a second while a job runs, and with its exit code when it has
           ended
    """
    waiting, running, failed = dict(jobs), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = next(iter(waiting))
                running[name] = waiting.pop(name)()
            time.sleep(0.2)
            for name, process in list(running.items()):
                code = process.poll()
                watch(name, code)
                if code is not None:
                    del running[name]
                    failed += [name] if code else []
    finally:
        stop(running.values())
    return failed


def stop(processes: Iterable[Any]) -> None:
    """Ask them to end, wait, and kill those that do not, or all at a second interrupt: a run goes on from its last
    checkpoint anyway.
    """
    processes = list(processes)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def last_words(log: Path) -> str:
    """The end of a log: the error it names, and where the rest is."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    )
    errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
    told = " ".join(lines[errors[-1] :] if errors else lines[-1:])[:400] or "it wrote nothing"
    return f"{told} (log: {log})"


class Forked:
    """function(*arguments) in a process that has imported `preload` already, its output in `log`; used like a
    subprocess.Popen.

    The process is forked from a server that did nothing but import, so that starting one costs a fraction of a second
    and a crash takes nothing with it; where there is no such server (Windows), it starts from scratch. It ends when the
    process that asked for it does, however that ended.
    """

    def __init__(
        self, function: Callable[..., object], arguments: Sequence[Any], log: Path, preload: tuple[str, ...] = ()
    ):
        self.process = _context(preload).Process(target=_enter, args=(function, tuple(arguments), log))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


@cache
def _context(preload: tuple[str, ...]) -> Any:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the server imports torch; the processes share the cores
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def _enter(function: Callable[..., object], arguments: tuple, log: Path) -> None:
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # an interrupt at the terminal reaches every process; who started this one decides
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if sys.platform == "linux":
        ask_the_kernel()  # of the server, which a thread that waits for the interpreter may outlive
    try:
        function(*arguments)
    except Exception as error:
        traceback.print_exc()
        print("\n".join([f"error: {error or type(error).__name__}", *getattr(error, "__notes__", [])]), flush=True)
        sys.exit(1)


def _end_with(parent: Any) -> None:
    connection.wait([parent.sentinel])
    os._exit(1)
