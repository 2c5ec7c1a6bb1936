"""A process ends when the one that started it does, however that ended: what a killed command started goes with it.

On Linux the kernel sends the signal (prctl, PR_SET_PDEATHSIG); elsewhere a thread looks whether the parent is still
there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "TOKENCREDIT_PARENT"
"""The variable in which a command that is started by another finds whose end is its own."""
SET_DEATH_SIGNAL = 1
LOOK = 0.5


def tied(environment: dict[str, str]) -> dict[str, str]:
    """An environment for a command that is to end with this process."""
    return environment | {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Called by a command at its start; does nothing where it was not started with `tied`.

    The variable is taken out of the environment: what this process starts in turn has another parent.
    """
    parent = os.environ.pop(PARENT, "")
    if not parent.isdigit():
        return
    if sys.platform == "linux":
        ask_the_kernel()
    else:
        threading.Thread(target=_look, args=(int(parent),), daemon=True).start()
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        os._exit(1)


def ask_the_kernel() -> None:
    """SIGKILL to this process when the thread that started it ends; what it leaves is as after any kill."""
    ctypes.CDLL(None, use_errno=True).prctl(SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)


def _look(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)
