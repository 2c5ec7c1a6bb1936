"""Where a command stands: what a process elsewhere needs in order to do the same there."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokencredit import __version__

PASSED_ON = ("HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY")
"""What of a command's environment its workers get as well."""


class WrongWorker(RuntimeError):
    """A worker that would compute something else: another version, another model, or none."""


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


@dataclass(frozen=True)
class Site:
    """What a command and its workers have in common.

    threads   of torch, as OMP_NUM_THREADS says, else 1: results are the same to the bit for the same number
    folder    where relative paths of models and verifiers begin
    """

    version: str = __version__
    threads: int = field(default_factory=lambda: int(os.environ.get("OMP_NUM_THREADS") or 1))
    folder: str = field(default_factory=os.getcwd)
    environment: Mapping[str, str] = field(default_factory=_environment)

    def enter(self) -> None:
        """Make this process one of the command's. WrongWorker where it has another version of tokencredit."""
        if self.version != __version__:
            raise WrongWorker(
                f"{here()} has tokencredit {__version__}, and the command that asks has {self.version}: install the"
                " same version everywhere"
            )
        os.environ.update(self.environment)
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
            sys.path.append(self.folder)
        import torch

        torch.set_num_threads(self.threads)


def here() -> str:
    """This process, for messages."""
    return f"the worker {os.getpid()} on {socket.gethostname()}"
