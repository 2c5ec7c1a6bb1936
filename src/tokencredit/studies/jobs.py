"""Training runs as jobs, side by side: one that is finished is never repeated, one that was interrupted goes on, one
that fails is named and stops no other.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from tokencredit import limits
from tokencredit.budget import Budget
from tokencredit.durable import read_lines
from tokencredit.runs import Run
from tokencredit.scores.table import names_of
from tokencredit.studies.processes import Forked, last_words, run_all
from tokencredit.studies.remote import Remote
from tokencredit.tasks.data import held_out
from tokencredit.train_config import TrainConfig

FINAL = "final"  # the split under which the evaluation of a finished run is recorded
PRELOAD = ("tokencredit.engines.train", "tokencredit.lm.evaluate")


@dataclass(frozen=True)
class Job:
    """One run: its directory below the study's, its config; in a comparison also the multiple of the learning rate, and
    `final` (prompts, samples) for those that count; bytes of `memory` that its process may take, if they are given."""

    name: str
    config: TrainConfig
    factor: float = 1.0
    final: tuple[int, int] | None = None
    memory: int | None = None

    @property
    def cost(self) -> int:
        """The larger, the longer a step takes: proxies of tokens or further rounds of sampling, then prefix trees."""
        method = self.config.build_method()
        if "exact_value" in method.needs:
            return 2
        return int(method.mixed_groups_only or not method.needs.isdisjoint(names_of("importance")))

    @property
    def budget(self) -> Budget:
        """What it spends, as its records count it: that of its config, or the optimizer steps."""
        return Budget.of(self.config.budget) or Budget("step", self.config.optimizer_steps)


class Tell:
    """Who listens to a study; this one does not."""

    def stage(self, title: str, total: int, done: int) -> None:
        """Jobs of a stage begin; so many of them are done already."""

    def running(self, name: str, share: float, figures: Mapping[str, Any]) -> None:
        """A job's share of its budget, and the figures of its last step."""

    def ended(self, name: str, why: str | None) -> None:
        """A job ended; `why` where it failed."""

    def over(self) -> None:
        """The stage is over."""


Start = Callable[[Path, Job, Path], Any]
"""(the study's directory, a job, its log) -> what has the methods of `processes.Forked`."""


def forked(out: Path, job: Job, log: Path) -> Forked:
    """The job in a process of this machine."""
    return Forked(perform, (job, out / job.name), log, PRELOAD)


def on_ray(ray: Any, gpus: float, out: Path, job: Job, log: Path) -> Remote:
    """The job as a task of a Ray cluster, with so many GPUs."""
    return Remote(ray, gpus, perform, (job, (out / job.name).resolve()), log)


def run_jobs(
    out: Path, jobs: Sequence[Job], workers: int, title: str, tell: Tell, start: Start = forked
) -> dict[str, str]:
    """Run those that are not finished, the longest first, so that they end together; {name: why} of those that
    failed.
    """
    waiting = sorted((job for job in jobs if not finished(out, job)), key=lambda job: -job.cost)
    tell.stage(title, len(jobs), len(jobs) - len(waiting))
    by_name, why = {job.name: job for job in waiting}, {}

    def watch(name: str, code: int | None) -> None:
        records = read_lines(out / name / "metrics.jsonl")
        budget, last = by_name[name].budget, records[-1] if records else {}
        tell.running(name, last.get(budget.unit, 0) / budget.amount, last)
        if code is not None:
            if code:
                why[name] = f"exit {code}: {last_words(_log(out, name))}"
            tell.ended(name, why.get(name))

    try:
        run_all({job.name: partial(_started, out, job, start) for job in waiting}, workers, watch)
    finally:
        tell.over()
    return why


def side_by_side(config: TrainConfig, memory: int | None = None) -> int:
    """How many such runs go on together unless told: one with a GPU; otherwise one per core, but no more than the
    machine's memory holds, each with `memory` bytes or with what it takes by default.
    """
    import torch

    if torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if memory is None and config.model != "reckon":
        from tokencredit.lm.load import outlined
        from tokencredit.lm.room import of_training

        memory = of_training(outlined(config.model), adapters=bool(config.peft))
    return max(min(cores, limits.memory() // memory), 1) if memory else cores


def finished(out: Path, job: Job) -> bool:
    """Whether this very run is there, to its end, and its last checkpoint with it where that was kept."""
    if not (out / job.name / "run.json").exists():
        return False
    run = Run.open(out / job.name)
    if run.status != "finished" or run.info["config"] != job.config.as_dict() or _left(run, job) > 0:
        return False
    from tokencredit.engines.resume import lost_its_end

    if lost_its_end(run, job.config):
        return False
    return job.final is None or any(record["split"] == FINAL for record in run.evaluations())


def _left(run: Run, job: Job) -> float:
    """What is left of a run's budget."""
    records = run.metrics()
    return job.budget.amount - (records[-1][job.budget.unit] if records else 0)


def _started(out: Path, job: Job, start: Start) -> Any:
    log = _log(out, job.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    if (job.config.task, job.config.model) == ("reckon", "reckon"):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return start(out, job, log)


def _log(out: Path, name: str) -> Path:
    return out / f"{name}.log"


def perform(job: Job, path: Path) -> None:
    """Train to the end of the budget; then, for a run that counts, evaluate on more prompts. Called in the run's own
    process.
    """
    from tokencredit.engines.train import train

    run = train(job.config, path, command=command_of(job.config, path), memory=job.memory)
    if (left := _left(run, job)) > 0:
        raise RuntimeError(
            f"{left:g} {job.budget.unit} were left after {job.config.steps} rollout batches: allow more with --steps"
        )
    if job.final and not any(record["split"] == FINAL for record in run.evaluations()):
        run.log_evaluation(_evaluated(run, job))
    print(f"{time.process_time():.1f} s of processor time")


def _evaluated(run: Run, job: Job) -> dict[str, Any]:
    from tokencredit.lm.evaluate import evaluate
    from tokencredit.lm.policy import PolicyConfig

    (prompts, samples), config = job.final, job.config
    policy = PolicyConfig(str(run.path), memory=job.memory).open()
    figures = evaluate(
        policy,
        held_out(policy.task, prompts, config.eval_part),
        num_samples=samples,
        ks=sorted({1, samples}),
        seed=config.seed,
        batch=config.eval_batch,
    )
    last = run.metrics()[-1]
    return {key: last[key] for key in ("step", "seconds", "rollouts", "tokens")} | {"split": FINAL, **figures}


def command_of(config: TrainConfig, path: Path) -> str:
    """The command line of one run: what anybody would type."""
    told = ["tokencredit", "train", "--method", config.method, "--seed", str(config.seed), "--out", str(path)]
    usual = TrainConfig(task=config.task)
    changed = {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != getattr(usual, f.name)}
    settings = [
        f"{name}={json.dumps(value)}" for name, value in changed.items() if name not in ("method", "seed", "task")
    ]
    task = ["--task", config.task] if config.task != "reckon" else []
    return shlex.join([*told, *task, *(part for setting in settings for part in ("--set", setting))])
