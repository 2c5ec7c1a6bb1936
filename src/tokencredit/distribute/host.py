"""What a worker holds: a policy and its sampler, opened where the worker is from names and numbers."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokencredit import __version__

if TYPE_CHECKING:
    from tokencredit.lm.policy import Policy
    from tokencredit.lm.sampling import Sampler

PASSED_ON = ("HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY")
"""What of a command's environment its workers get as well."""


class WrongWorker(RuntimeError):
    """A worker that would compute something else: another version, another model, or none."""


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


@dataclass(frozen=True)
class HostSpec:
    """Which policy a host holds, and what it has in common with the process that asks for it.

    policy          fields of a settled `PolicyConfig`, as plain values
    top_k, top_p    of sampling          batch   rows of a pass, at most
    threads         of torch: results are the same to the bit for the same number
    folder          where relative paths of models and verifiers begin
    """

    policy: Mapping[str, Any]
    top_k: int = 0
    top_p: float = 1.0
    batch: int = 512
    version: str = __version__
    threads: int = field(default_factory=lambda: int(os.environ.get("OMP_NUM_THREADS") or 1))
    folder: str = field(default_factory=os.getcwd)
    environment: Mapping[str, str] = field(default_factory=_environment)

    def open(self) -> Host:
        """The host, in this process. WrongWorker where this is another version of tokencredit."""
        if self.version != __version__:
            raise WrongWorker(
                f"{here()} has tokencredit {__version__}, and the command that asks has {self.version}: install the"
                " same version everywhere"
            )
        os.environ.update(self.environment)
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
            sys.path.append(self.folder)
        return Host(self)


@dataclass(frozen=True)
class Facts:
    """What a host is.

    where        the machine and the process           parameters   of the model
    model_hash   as of `lm.fingerprint`                sampler      the name of its class
    ends         token ids that end a completion       source       of the task's verifier, as `tasks.source` hashes it
    """

    where: str
    model_hash: str
    parameters: int
    sampler: str
    ends: tuple[int, ...]
    source: str | None


class Host:
    """A policy and its sampler in a process that works for another."""

    def __init__(self, spec: HostSpec) -> None:
        import torch

        torch.set_num_threads(spec.threads)
        from dataclasses import replace

        from tokencredit.lm.fingerprint import model_hash
        from tokencredit.lm.policy import PolicyConfig
        from tokencredit.tasks.source import task_source

        opened = PolicyConfig(**spec.policy).open()
        self.policy: Policy = replace(opened, top_k=spec.top_k, top_p=spec.top_p)
        self.sampler: Sampler = self.policy.sampler(spec.batch)
        self.facts = Facts(
            here(),
            model_hash(self.policy.model),
            sum(p.numel() for p in self.policy.model.parameters()),
            type(self.sampler).__name__,
            self.policy.ends,
            task_source(self.policy.task),
        )


def here() -> str:
    """This process, for messages."""
    return f"the worker {os.getpid()} on {socket.gethostname()}"
