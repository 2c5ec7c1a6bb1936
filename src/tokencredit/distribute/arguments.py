"""The arguments of commands whose work may be done by Ray."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokencredit.distribute.pool import Pool


def add_ray(parser: argparse.ArgumentParser, *, workers: bool = True) -> None:
    """Adds --ray, --workers and --gpus-per-worker. `workers`: False where the command has a flag of that name."""
    group = parser.add_argument_group("distribution", "the same figures, to the bit, from several processes (docs/ray.md)")
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="local: workers on this machine; auto, HOST:PORT or ray://HOST:PORT: on a cluster that runs",
    )
    if workers:
        group.add_argument(
            "--workers", type=int, metavar="N", help="with --ray (default: one per GPU, or per processor without any)"
        )
    group.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="X",
        help="with --ray; several workers share a GPU with a part of 1 (default: 1, or 0 where there is no GPU)",
    )


def check_ray(args: argparse.Namespace) -> None:
    """ValueError for workers that nobody asked Ray for."""
    if args.ray is None:
        for flag in ("workers", "gpus_per_worker"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag.replace('_', '-')} is of workers on Ray: say where with --ray, like --ray local")


@contextmanager
def pool_of(args: argparse.Namespace, policy: Mapping[str, Any], **options: Any) -> Iterator[Pool | None]:
    """The workers that the arguments ask for, holding a policy (fields of a settled `PolicyConfig`); None without
    --ray. `options`: other fields of `HostSpec`.
    """
    check_ray(args)
    if args.ray is None:
        yield None
        return
    from tokencredit.distribute.host import HostSpec
    from tokencredit.distribute.pool import pool

    with pool(HostSpec(policy, **options), args.ray, args.workers, args.gpus_per_worker) as found:
        yield found
