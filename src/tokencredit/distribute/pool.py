"""Who does pieces of work: workers, which are Ray actors that hold a host each (`Pool`), or this process (`Alone`).

A worker has at most `AHEAD` pieces at a time, so that neither memory nor a queue grows with the work. One that dies is
started again by Ray, and its pieces are done again, `RETRIES` times; a piece that ends it every time is lost. A worker
is asked who it is before it gets work, and with every piece again, since one that was started again may have found
another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokencredit.distribute.cluster import connected, share
from tokencredit.distribute.host import Facts, Host, HostSpec
from tokencredit.distribute.lost import Lost
from tokencredit.distribute.site import WrongWorker

if TYPE_CHECKING:
    from tokencredit.lm.policy import Policy
    from tokencredit.lm.sampling import Progress

AHEAD = 2
RETRIES = 3


class Worker:
    """The actor. A host that cannot be opened is told when it is asked for: what an actor raises while it is made
    reaches nobody as it is.
    """

    def __init__(self, spec: HostSpec) -> None:
        self.spec = spec

    @cached_property
    def host(self) -> Host:
        return self.spec.open()

    def facts(self) -> Facts:
        """Who it is."""
        return self.host.facts

    def do(self, identity: str, work: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """work(host, *given), or `Lost`."""
        if self.facts().model_hash != identity:
            raise WrongWorker(_other_model(self.facts(), identity))
        try:
            return work(self.host, *given)
        except Exception as error:
            return Lost(error)


Work = Callable[..., Any]
"""work(host, *call): a function of a module, so that it can be named to another process."""
Told = Callable[[Any], tuple[float, int]]
"""(rows, tokens) that a call's result is worth, for a progress that cannot hear of them while they are made."""


class Alone:
    """This process in the place of workers: call after call; what one raises is raised."""

    def __init__(self, spec: HostSpec) -> None:
        self.spec, self.host = spec, Host(spec)

    @property
    def facts(self) -> Facts:
        """What it is."""
        return self.host.facts

    @property
    def policy(self) -> Policy:
        """The policy, with its weights."""
        return self.host.policy

    def run(
        self, work: Work, calls: Iterable[tuple[Any, ...]], progress: Progress | None = None, told: Told | None = None
    ) -> Iterator[tuple[int, Any]]:
        """(number of the call, work(host, *call)), in order."""
        self.host.listen = progress
        for number, call in enumerate(calls):
            yield number, work(self.host, *call)
            if progress and told is None:
                progress(1)


class Pool:
    """Workers that all hold the same policy. WrongWorker names one that does not."""

    def __init__(self, ray: Any, spec: HostSpec, workers: int, gpus: float) -> None:
        self.ray, self.spec = ray, spec
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

    @cached_property
    def policy(self) -> Policy:
        """The policy without its weights, which the workers have."""
        return self.spec.outline()

    def run(
        self, work: Work, calls: Iterable[tuple[Any, ...]], progress: Progress | None = None, told: Told | None = None
    ) -> Iterator[tuple[int, Any]]:
        """(number of the call, work(host, *call) or `Lost`), as they end; `calls` are taken when there is room for
        them.

        progress   hears what `told` says of every result, or of one row for each
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
                found = self._outcome(reference)
                if progress and not isinstance(found, Lost):
                    progress(*(told(found) if told else (1,)))
                yield number, found
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


def done(
    pool: Pool | Alone,
    work: Work,
    calls: Iterable[tuple[Any, ...]],
    progress: Progress | None = None,
    told: Told | None = None,
) -> list[Any]:
    """work(host, *call) of every call, in order; the error of the first that was lost is raised, when all are done."""
    found = dict(pool.run(work, calls, progress, told))
    for number in sorted(found):
        if isinstance(found[number], Lost):
            raise found[number].error
    return [found[number] for number in sorted(found)]


@contextmanager
def pool(spec: HostSpec, address: str, workers: int | None = None, gpus: float | None = None) -> Iterator[Pool]:
    """Workers on the cluster at an address (`cluster.connected`), ended afterwards; `cluster.share` says how many."""
    with connected(address, workers) as ray:
        found = Pool(ray, spec, *share(ray, workers, gpus))
        try:
            yield found
        finally:
            found.close()


def _other_model(facts: Facts, identity: str) -> str:
    return (
        f"{facts.where} holds another model ({facts.model_hash}) than the others ({identity}): put the same files, and"
        " the same --dtype, on every machine"
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
