"""Which workers a command asks for, and the arguments that say it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokencredit.distribute.pool import Alone, Pool
    from tokencredit.lm.policy import PolicyConfig


@dataclass(frozen=True)
class Workers:
    """Workers on Ray, or none: the work is then done in this process.

    address   local, auto or HOST:PORT; None for no Ray
    number    of workers; by default one for every GPU, and where there is none one for every processor
    gpus      of each, by default 1 where there are any; several workers share one with a part of 1
    """

    address: str | None = None
    number: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.address is None:
            for flag, value in (("--workers", self.number), ("--gpus-per-worker", self.gpus)):
                if value is not None:
                    raise ValueError(f"{flag} is of workers on Ray: say where they are with --ray, like --ray local")

    @contextmanager
    def open(self, policy: PolicyConfig, **options: Any) -> Iterator[Pool | Alone]:
        """The workers, each holding the policy, which is settled; or this process, holding it. `options`: other fields
        of `HostSpec`.
        """
        from tokencredit.distribute.host import HostSpec
        from tokencredit.distribute.pool import Alone, pool

        spec = HostSpec(policy.as_dict() | {"memory": policy.memory}, **options)
        if self.address is None:
            yield Alone(spec)
            return
        with pool(spec, self.address, self.number, self.gpus) as found:
            yield found


def add_ray(parser: argparse.ArgumentParser, *, number: bool = True) -> None:
    """Adds --ray, --workers and --gpus-per-worker; `number` is False where the command has --workers already."""
    group = parser.add_argument_group("Ray", "the same numbers, to the bit, from several processes (docs/ray.md)")
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="local: workers on this machine; auto or HOST:PORT: on a running cluster that this machine is a part of",
    )
    if number:
        group.add_argument("--workers", type=int, metavar="N", help="(default: one per GPU, else one per processor)")
    group.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="X",
        help="several workers share a GPU with a part of 1 (default: 1, and 0 where there is no GPU)",
    )


def workers_of(args: argparse.Namespace) -> Workers:
    """What the arguments ask for."""
    return Workers(args.ray, args.workers, args.gpus_per_worker)
