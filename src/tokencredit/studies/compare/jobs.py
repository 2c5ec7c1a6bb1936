"""The runs of a comparison: what each is, running them side by side, and the learning rate that the checks choose."""

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

import numpy as np

from tokencredit.budget import Budget
from tokencredit.durable import read_lines
from tokencredit.runs import Run
from tokencredit.stats import pass_at_k
from tokencredit.studies.processes import Forked, last_words, run_all
from tokencredit.studies.remote import Remote
from tokencredit.tasks.data import held_out
from tokencredit.train_config import TrainConfig

FINAL = "final"  # the split under which the evaluation of a finished run is recorded
PRELOAD = ("tokencredit.engines.train", "tokencredit.lm.evaluate")


@dataclass(frozen=True)
class Job:
    """One run: its directory below the study's, its config, the multiple of the learning rate; `final` (prompts,
    samples) for those that count; `cost` orders jobs, the longest first, so that they end together."""

    name: str
    config: TrainConfig
    factor: float
    cost: int = 0
    final: tuple[int, int] | None = None


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
    """Run those that are not finished; {name: why} of those that failed."""
    waiting = sorted((job for job in jobs if not finished(out, job)), key=lambda job: -job.cost)
    tell.stage(title, len(jobs), len(jobs) - len(waiting))
    by_name, why = {job.name: job for job in waiting}, {}

    def watch(name: str, code: int | None) -> None:
        records = read_lines(out / name / "metrics.jsonl")
        budget, last = Budget.of(by_name[name].config.budget), records[-1] if records else {}
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


def finished(out: Path, job: Job) -> bool:
    """Whether this very run is there, to its end."""
    if not (out / job.name / "run.json").exists():
        return False
    run = Run.open(out / job.name)
    if run.status != "finished" or run.info["config"] != job.config.as_dict() or _left(run, job.config) > 0:
        return False
    return job.final is None or any(record["split"] == FINAL for record in run.evaluations())


def _left(run: Run, config: TrainConfig) -> float:
    """What is left of a run's budget."""
    budget, records = Budget.of(config.budget), run.metrics()
    return budget.amount - (records[-1][budget.unit] if records else 0)


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

    run = train(job.config, path, command=command_of(job.config, path))
    if (left := _left(run, job.config)) > 0:
        raise RuntimeError(
            f"{left:g} {Budget.of(job.config.budget).unit} were left after {job.config.steps} rollout batches: allow"
            " more with --steps"
        )
    if job.final and not any(record["split"] == FINAL for record in run.evaluations()):
        run.log_evaluation(_evaluated(run, job))
    print(f"{time.process_time():.1f} s of processor time")


def _evaluated(run: Run, job: Job) -> dict[str, Any]:
    from tokencredit.lm.evaluate import evaluate
    from tokencredit.lm.policy import PolicyConfig

    (prompts, samples), config = job.final, job.config
    policy = PolicyConfig(str(run.path)).open()
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


def choose(config: Any, out: Path, methods: Sequence[str], checks: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """{method: {"factor", "edge", "scores", "seeds"}}: the multiple with the highest validation pass@1 over the second
    half of the budget.

    `scores` {multiple: [per seed, per prompt]}; `edge` is "lowest" or "highest" where the choice is at an end of the
    rates that were checked. A single rate, or one that no check finished for, is the multiple nearest to 1.
    """
    found = {}
    for method in methods:
        jobs = [job for job in checks if job.config.method == method and finished(out, job)]
        scores: dict[float, list] = {}
        for job in jobs:
            scores.setdefault(job.factor, []).append(second_half(Run.open(out / job.name), config))
        best = (
            max(scores, key=lambda factor: np.mean(scores[factor]))
            if scores
            else min(config.rates, key=lambda rate: abs(np.log(rate)))
        )
        ends = {min(config.rates): "lowest", max(config.rates): "highest"} if len(scores) > 1 else {}
        seeds = sorted({job.config.seed for job in jobs})
        found[method] = {"factor": best, "edge": ends.get(best), "scores": scores, "seeds": seeds}
    return found


def second_half(run: Run, config: Any) -> list[float]:
    """Prompt by prompt: mean pass@1 of the evaluations from half of the budget on."""
    unit, half = config.budget.unit, config.budget.amount / 2
    late = [record for record in run.evaluations() if record["split"] != FINAL and record[unit] >= half]
    return np.mean(
        [pass_at_k(record["by_prompt"]["correct"], record["num_samples"], 1) for record in late], axis=0
    ).tolist()
