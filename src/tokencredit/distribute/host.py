"""What a worker holds: a policy and its sampler, opened where the worker is from names and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokencredit.distribute.site import Site, here
from tokencredit.distribute.together import tokens_together

if TYPE_CHECKING:
    from tokencredit.lm.policy import Policy
    from tokencredit.lm.sampling import Progress, Sampler


@dataclass(frozen=True)
class HostSpec:
    """Which policy a host holds: names and numbers, never live objects.

    policy          fields of a settled `PolicyConfig`, as plain values
    top_k, top_p    of sampling          batch   rows of a pass, at most
    """

    policy: Mapping[str, Any]
    top_k: int = 0
    top_p: float = 1.0
    batch: int = 512
    site: Site = field(default_factory=Site)

    def open(self) -> Host:
        """The host, in a process of its own. WrongWorker where this is another version of tokencredit."""
        self.site.enter()
        return Host(self)

    def outline(self) -> Policy:
        """The policy without its weights, for the process that asks: see `PolicyConfig.open`."""
        from tokencredit.lm.policy import PolicyConfig

        opened = PolicyConfig(**self.policy).open(weights=False)
        return replace(opened, top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True)
class Facts:
    """What a host is.

    where        the machine and the process           parameters   of the model
    model_hash   as of `lm.fingerprint`                sampler      the name of its class
    ends         token ids that end a completion       source       of the task's verifier, as `tasks.source` hashes it
    device       cpu, cuda ...
    """

    where: str
    model_hash: str
    parameters: int
    sampler: str
    ends: tuple[int, ...]
    source: str | None
    device: str

    @property
    def together(self) -> int:
        """Tokens that it reads or writes before what came of them is stored."""
        return tokens_together(self.parameters, self.device)


class Host:
    """A policy and its sampler, for pieces of work; nothing is loaded before it is asked for.

    listen   hears of rows and tokens while they are sampled, where the work is for this process itself
    """

    listen: Progress | None = None

    def __init__(self, spec: HostSpec) -> None:
        self.spec = spec

    @cached_property
    def policy(self) -> Policy:
        """The policy, with its weights."""
        from tokencredit.lm.policy import PolicyConfig

        return replace(PolicyConfig(**self.spec.policy).open(), top_k=self.spec.top_k, top_p=self.spec.top_p)

    @cached_property
    def sampler(self) -> Sampler:
        """What samples it."""
        return self.policy.sampler(self.spec.batch)

    @cached_property
    def facts(self) -> Facts:
        """What it is."""
        from tokencredit.lm.fingerprint import model_hash
        from tokencredit.tasks.source import task_source

        return Facts(
            here(),
            model_hash(self.policy.model),
            sum(p.numel() for p in self.policy.model.parameters()),
            type(self.sampler).__name__,
            self.policy.ends,
            task_source(self.policy.task),
            self.policy.model.device.type,
        )
