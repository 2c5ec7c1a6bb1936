"""What a variance study looks at: methods, checkpoints, and how the true policy gradient is estimated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tokencredit.checkpoints import listed
from tokencredit.credit import Chain, Score
from tokencredit.durable import read_mapping
from tokencredit.dynamics.checkpoint import Checkpoint, open_checkpoint
from tokencredit.method import Method
from tokencredit.methods import METHODS
from tokencredit.objective import LogProb, SequenceSum
from tokencredit.scores.table import available
from tokencredit.studies.variance.question import VarianceConfig
from tokencredit.tasks.task import Task

DEFAULT = (
    "dapo",
    "grpo",
    "reinforce",
    "rloo",
    "gtpo",
    "grpo_s",
    "otb",
    "vineppo",
    "forking_tokens",
    "random_tokens",
    "oracle_positions",
    "token_sampling",
    "entropy_advantage",
    "ptw_entropy",
    "ptw_fisher",
    "ptw_gradient_norm",
    "ptw_perturbation",
    "ptw_attention",
    "exact_value",
)
EXACT = Method(
    "exact policy gradient",
    Chain(Score("exact_value")),
    LogProb(),
    SequenceSum(1),
    summary="Q − V of every token, summed",
)
TRUTHS = {"exact": EXACT, "rloo": METHODS["rloo"]}


def checkpoints(config: VarianceConfig) -> dict[str, Callable[[], Checkpoint]]:
    """Label -> how to open it. ValueError for a run of another task, or without such a checkpoint."""
    policy = config.policy.settled()
    found: dict[str, Callable[[], Checkpoint]] = {policy.model: lambda: open_checkpoint(config.policy)}
    for name in config.runs:
        if not (Path(name) / "run.json").exists():
            raise ValueError(
                f"{name} is no run directory: it has no run.json. `tokencredit train --out {name}` would make one"
            )
        task = read_mapping(Path(name) / "run.json", "task")["task"]
        if task != policy.task:
            raise ValueError(
                f"{name} was trained on {task}, the study is about {policy.task}: give --task {task}, or another run"
            )
        there = list(listed(Path(name) / "checkpoints"))
        if absent := sorted(set(config.steps) - set(there)):
            raise ValueError(
                f"{name} has no checkpoint of step {absent[0]}; it has those of {', '.join(map(str, there)) or 'none'}"
            )
        if not there:
            raise ValueError(f"{name} has no finished checkpoint; train it with save_every set")
        for step in config.steps or there:
            own = replace(config.policy, model=name)
            found[f"{Path(name).name}, step {step}"] = lambda own=own, step=step: open_checkpoint(own, step)
    return found


def names_of(config: VarianceConfig, task: Task | None) -> list[str]:
    """The methods, the unweighted one first: those asked for, or all of the default ones that can be measured on the
    task.
    """
    asked = config.methods or tuple(name for name in DEFAULT if name in METHODS)
    names = list(dict.fromkeys([config.baseline, *asked]))
    if config.methods or task is None:
        return names
    known = set(available(task))
    if "exact_value" not in known:
        known.discard("step_gain")  # nine rollouts from every step are for those who ask for them
    return [name for name in names if METHODS[name].needs <= known]
