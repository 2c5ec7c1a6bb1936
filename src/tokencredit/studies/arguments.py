"""What every question about an update is asked with: which run and checkpoint, how many rollouts, which method and
optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tokencredit.distribute.workers import Workers
from tokencredit.studies.options import option

if TYPE_CHECKING:
    from tokencredit.lm.policy import PolicyConfig
    from tokencredit.tasks.task import Task

PROMPTS = 64
"""Of the batch that a question about an update is asked of, where there are so many."""


def default_policy() -> PolicyConfig:
    """The shipped model on the embedded world; a model library is imported when it is asked for, not before."""
    from tokencredit.lm.policy import PolicyConfig

    return PolicyConfig()


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """A question about a policy, which the arguments that all commands share name."""

    policy: PolicyConfig = field(default_factory=default_policy)


@dataclass(frozen=True, kw_only=True)
class OnWorkers(OnPolicy):
    """A question about a policy whose answer several processes may find; who does changes nothing about it."""

    workers: Workers = field(default=Workers(), metadata={"identity": False})


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(OnPolicy):
    """A checkpoint of a run, or a model, and the rollouts that are asked about."""

    checkpoint: int | None = option(None, "its checkpoint of optimizer step N (default: the last one)", metavar="N")
    method: str | None = option(None, "a name that `tokencredit methods` lists (default: the run's own)")
    prompts: int | None = option(None, f"prompts of the batch (default: {PROMPTS}, or all that the task has)")
    group: int = option(8, "rollouts of every prompt")
    seed: int = option(0, "of prompts, sampling and resampling (default: 0)")


@dataclass(frozen=True, kw_only=True)
class StepConfig(CheckpointConfig):
    """The step that its optimizer makes, or that a fresh one would."""

    optimizer: Literal["adamw", "sgd"] | None = option(None, "a fresh optimizer in place of the checkpoint's")


FULL = 1 << 22
"""Parameters up to which a study has its full default size."""


def usual(number: float, parameters: int, there: int | None = None, least: int = 24) -> int:
    """A default number of prompts for a model of so many parameters on a task that has `there` of them (None:
    without end): `number`, for a model over 2²² parameters fewer in proportion but `least`, and no more than there
    are.

    >>> usual(8192, 109_000), usual(8192, 135_000_000), usual(8192, 109_000, there=7473)
    (8192, 255, 7473)
    """
    return at_most(max(round(number * min(1.0, FULL / parameters)), least), there)


def at_most(number: int, there: int | None) -> int:
    """A default number of prompts on a task that has `there` of them (None: without end)."""
    return number if there is None else min(number, there)


def of_checkpoint(checkpoint: Any) -> dict[str, Any]:
    """What `Work.begin` is told of a checkpoint: its task and data, and the model with its weights."""
    from tokencredit.lm.fingerprint import model_hash

    return {
        "task": checkpoint.config.task,
        "model": str(checkpoint.path),
        "judge": checkpoint.task,
        "weights": model_hash(checkpoint.model),
    }


def parameters_of(checkpoint: Any) -> int:
    return sum(p.numel() for p in checkpoint.model.parameters())


def task_of(asked: Any) -> tuple[Task, str]:
    """The task of an opened checkpoint, or of a policy's configuration, whose model is not opened for it; and what it
    is called.
    """
    from tokencredit.lm.policy import PolicyConfig

    if not isinstance(asked, PolicyConfig):
        return asked.task, asked.config.task
    settled = asked.settled()
    return settled.load_task(), str(settled.task)


def prompts_there(asked: Any, split: str = "train") -> int | None:
    """How many prompts a part of the task (`task_of`) has; None where it makes them without end."""
    from tokencredit.tasks.task import Endless

    task, _ = task_of(asked)
    return None if isinstance(task, Endless) else len(task.rows(split, None, 0))


def check_prompts(asked: Any, wanted: Mapping[str, int | None], split: str = "train", least: int = 1) -> None:
    """ValueError for the first flag that asks for more prompts than the task (`task_of`) has or, left out (None), would
    be fewer than `least`; with the policy's configuration before its model is opened.
    """
    there = prompts_there(asked, split)
    for flag, number in wanted.items():
        if there is None or least <= there >= (number or 0):
            continue
        told = f"{flag}{' (its default)' if number is None else f' {number:,}'}"
        mend = f"Ask for {there:,} at most, or leave it out" if least <= there else f"{least:,} at least are needed"
        raise ValueError(f"{told}: the {split} part of {task_of(asked)[1]} has {there:,} prompts. {mend}")


def open_from(config: CheckpointConfig, **options: Any) -> Any:
    """The checkpoint that a configuration names, with the method and the optimizer that it asks for; `options` as of
    `open_checkpoint`.
    """
    from tokencredit.dynamics.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(config.policy, config.checkpoint, method=config.method, **options)
    fresh = config.optimizer if isinstance(config, StepConfig) else None
    return checkpoint.fresh(fresh) if fresh else checkpoint
