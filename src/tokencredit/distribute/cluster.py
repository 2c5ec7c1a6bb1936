"""A Ray cluster: one of this machine alone, or one that runs already."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCAL, AUTO = "local", "auto"
OBJECTS = 200_000_000  # bytes of Ray's own store on this machine; what travels are token ids and figures
ATTEMPTS = 4
PATIENCE = 5  # seconds in which an address has to answer


@contextmanager
def connected(address: str, workers: int | None = None) -> Iterator[Any]:
    """The module `ray`, connected: to a cluster of `workers` processes on this machine, which ends with this one, or to
    the one at an address (auto, HOST:PORT), of which this machine is a part. A connection that is there already is
    used, and left.

    ImportError where Ray is not installed; ConnectionError, within seconds, where nothing answers.
    """
    ray = import_ray()
    if address not in (LOCAL, AUTO):
        _check(address)
    if ray.is_initialized():
        yield ray
        return
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECTS, "num_cpus": workers}
    options = own if address == LOCAL else {"address": address}
    try:
        _start(ray, options)
    except ConnectionError as error:
        raise ConnectionError(_unreachable(address, str(error).splitlines()[0])) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, options: dict[str, Any]) -> None:
    """`ray.init`, again where Ray gave up on a machine so busy that it did not start within its half minute."""
    for left in reversed(range(ATTEMPTS)):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise RuntimeError(f"Ray did not start on this machine in {ATTEMPTS} attempts; is it busy?") from error


def import_ray() -> Any:
    """The module, which sends no statistics and leaves the visible GPUs of a process without any as they are."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'tokencredit[ray]'") from error
    return ray


def share(ray: Any, workers: int | None = None, gpus: float | None = None) -> tuple[int, float]:
    """(number of workers, GPUs of each) of a cluster.

    workers   by default one for every `gpus` GPUs, and where there is no GPU one for every processor
    gpus      by default 1 where the cluster has any; several workers share one with a part of 1

    ValueError where workers would wait for ever.
    """
    there = ray.cluster_resources()
    each = (1.0 if there.get("GPU") else 0.0) if gpus is None else gpus
    for name, amount in (("CPU", 1.0), ("GPU", each)):
        if (wanted := (workers or 1) * amount) > there.get(name, 0):
            raise ValueError(
                f"{workers or 1} workers need {wanted:g} {name}s, and the cluster has {there.get(name, 0):g}: ask for"
                " fewer --workers, or less of --gpus-per-worker"
            )
    return workers or int(there["GPU"] / each if each else there["CPU"]), each


def _check(address: str) -> None:
    """ConnectionError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise ValueError(f"--ray is local, auto or HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ConnectionError(_unreachable(address, str(error))) from error


def _unreachable(address: str, why: str) -> str:
    return (
        f"no Ray cluster answers at {address} ({why}). Start one with `ray start --head --port 6379` and give its"
        " HOST:6379, or use --ray local for the processors and GPUs of this machine"
    )
