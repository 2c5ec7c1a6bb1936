"""A pool of workers: Ray actors that hold a host each, and the pieces of work on their way to them.

A worker has at most `AHEAD` pieces at a time, so that neither memory nor a queue grows with the work. One that dies is
started again by Ray, and its pieces are done again, `RETRIES` times; a piece that ends it every time is lost, and named.
A worker is asked who it is before it gets work, and with every piece again, since one that was started again may have
found another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tokencredit.distribute.cluster import connected
from tokencredit.distribute.host import Facts, HostSpec, WrongWorker
from tokencredit.distribute.lost import Lost

AHEAD = 2
RETRIES = 3


class Worker:
    """The actor: a host, or why there is none."""

    def __init__(self, spec: HostSpec) -> None:
        try:
            self.host, self.trouble = spec.open(), None
        except Exception as error:
            self.trouble = error

    def facts(self) -> Facts:
        """Who it is."""
        if self.trouble is not None:
            raise self.trouble
        return self.host.facts

    def do(self, identity: str, work: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """work(host, *given), or `Lost`."""
        facts = self.facts()
        if facts.model_hash != identity:
            raise WrongWorker(_other_model(facts, identity))
        try:
            return work(self.host, *given)
        except Exception as error:
            return Lost(error)


class Pool:
    """Workers that all hold the same policy. WrongWorker names one that does not."""

    def __init__(self, ray: Any, spec: HostSpec, workers: int, gpus: float) -> None:
        self.ray = ray
        kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=RETRIES)(Worker)
        self.workers = [kind.remote(spec) for _ in range(workers)]
        self.facts = self._identities()

    def _identities(self) -> Facts:
        """Who the workers are, which is one and the same."""
        found = [self._ask(worker.facts.remote()) for worker in self.workers]
        for other in found[1:]:
            if other.model_hash != found[0].model_hash:
                raise WrongWorker(f"{_other_model(other, found[0].model_hash)} ({found[0].where})")
            if other.source != found[0].source:
                raise WrongWorker(
                    f"{other.where} has another verifier than {found[0].where}: copy the same file to both machines"
                )
        return found[0]

    def _ask(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayActorError as error:
            raise WrongWorker(
                "a worker could not be started; is this version of tokencredit, with the task's libraries, installed"
                f" where it runs? {_last_line(error)}"
            ) from error

    def run(self, work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """(number of the call, work(host, *call) or `Lost`), as they end. `work` is a function of a module; `calls` are
        taken when there is room for them.
        """
        waiting, load = enumerate(calls), [0] * len(self.workers)
        running: dict[Any, tuple[int, int]] = {}
        try:
            while True:
                while min(load) < AHEAD and (call := next(waiting, None)) is not None:
                    place = load.index(min(load))
                    load[place] += 1
                    reference = self.workers[place].do.remote(self.facts.model_hash, work, call[1])
                    running[reference] = call[0], place
                if not running:
                    return
                (reference,), _ = self.ray.wait(list(running), num_returns=1)
                number, place = running.pop(reference)
                load[place] -= 1
                yield number, self._outcome(reference)
        finally:
            for reference in running:
                self.ray.cancel(reference)

    def _outcome(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, WrongWorker):
                raise error.cause from error
            return Lost(RuntimeError(f"{type(error.cause).__name__}: {error.cause}"))
        except self.ray.exceptions.RayActorError as error:
            told = f"its worker died {RETRIES + 1} times; did its machine run out of memory?"
            return Lost(RuntimeError(f"{told} {_last_line(error)}"))

    def close(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            self.ray.kill(worker)


@contextmanager
def pool(spec: HostSpec, address: str, workers: int | None = None, gpus: float | None = None) -> Iterator[Pool]:
    """Workers on the cluster at an address (`cluster.connected`), ended afterwards.

    workers   by default one for every `gpus` GPUs, and where there is no GPU one for every processor
    gpus      of every worker, by default 1 where the cluster has any; several workers share one with a part of 1
    """
    with connected(address, workers) as ray:
        there = ray.cluster_resources()
        share = (1.0 if there.get("GPU") else 0.0) if gpus is None else gpus
        _check_room(there, workers, share)
        number = workers or int(there["GPU"] / share if share else there["CPU"])
        found = Pool(ray, spec, number, share)
        try:
            yield found
        finally:
            found.close()


def _check_room(there: dict[str, float], workers: int | None, gpus: float) -> None:
    """ValueError where workers would wait for ever."""
    wanted = workers or 1
    for name, each in (("CPU", 1.0), ("GPU", gpus)):
        if wanted * each > there.get(name, 0):
            raise ValueError(
                f"{wanted} workers need {wanted * each:g} {name}s and the cluster has {there.get(name, 0):g}: ask for"
                f" fewer --workers{', or less than ' + format(gpus, 'g') + ' --gpus-per-worker' if name == 'GPU' else ''}"
            )


def _other_model(facts: Facts, identity: str) -> str:
    return (
        f"{facts.where} holds another model ({facts.model_hash}) than the others ({identity}): put the same files, and"
        " the same --dtype, on every machine"
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
