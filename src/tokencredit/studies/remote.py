"""A job as a Ray task: used like `processes.Forked`, on any machine that has the study's folder."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokencredit.distribute.site import Site, here


class Remote:
    """function(*arguments) in a process of its own, its output in `log`, which the driver has made: a machine that does
    not find it there does not share the folder.
    """

    def __init__(self, ray: Any, gpus: float, function: Callable[..., object], arguments: Sequence[Any], log: Path):
        self.ray, self.log, self.code = ray, log.resolve(), None
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=1)(_enter)
        self.reference = task.remote(Site(), function, tuple(arguments), str(self.log))

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.code is None and self.ray.wait([self.reference], timeout=0)[0]:
            self.code = self._ended()
        return self.code

    def _ended(self) -> int:
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayTaskError as error:
            told = str(error.cause)
        except self.ray.exceptions.RayError as error:
            told = f"its process ended ({_first_line(error)})"
        with self.log.open("a") as file:
            file.write(f"error: {told}\n")
        return 1

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code, when it has ended; TimeoutExpired where that takes longer."""
        if not self.ray.wait([self.reference], timeout=timeout)[0]:
            raise subprocess.TimeoutExpired("Ray task", timeout or 0.0)
        return self.poll()

    def terminate(self) -> None:
        self.ray.cancel(self.reference)

    def kill(self) -> None:
        self.ray.cancel(self.reference, force=True)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _enter(site: Site, function: Callable[..., object], arguments: tuple[Any, ...], log: str) -> int:
    site.enter()
    if not os.path.exists(log):
        raise FileNotFoundError(
            f"{here()} does not see {log}: runs on several machines need --out in a folder that all of them share"
        )
    with open(log, "ab") as file:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), number)
    try:
        function(*arguments)
    except Exception as error:
        traceback.print_exc()
        print("\n".join([f"error: {error or type(error).__name__}", *getattr(error, "__notes__", [])]), flush=True)
        return 1
    return 0
