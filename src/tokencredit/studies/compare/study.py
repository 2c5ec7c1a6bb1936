"""Which method learns faster, and which ends higher, at an equal budget? Methods × seeds from one initial policy on the
same prompts.

Every method first gets the learning rate that serves it best on validation prompts, because a weighting of tokens also
changes the size of a step. Then the runs that count: the same seeds for all, each ended when its budget is spent. What
comes out is the difference from one baseline with an interval over seeds and prompts, and a verdict that says where the
budget does not tell.

A run is a process of its own: one that fails is named and stops no other, one that was finished is never repeated, one
that was interrupted goes on when the command is given again. Methods and seeds may be added to a study later; the rest
of it stays as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokencredit import train_config
from tokencredit.budget import UNITS, Budget
from tokencredit.distribute.workers import Workers
from tokencredit.durable import append_line, read_lines
from tokencredit.methods import METHODS
from tokencredit.scores.table import OF_A_RUN, UNMEASURED, available
from tokencredit.studies.compare.figures import Marks, figures
from tokencredit.studies.compare.question import MOST_STEPS, QUICK_STEPS, STEPS, Comparison
from tokencredit.studies.compare.rates import choose
from tokencredit.studies.jobs import Job, Start, Tell, finished, forked, on_ray, run_jobs, side_by_side
from tokencredit.studies.study import Work
from tokencredit.tasks import load
from tokencredit.tasks.data import held_out
from tokencredit.tasks.task import Task
from tokencredit.train_config import TrainConfig

QUICK = ("grpo", "dapo", "gtpo", "ptw_gradient_norm", "exact_value")
BASE = ("prompts=32", "group=8", "record_every=0", "save_every=8", "threads=1")
SIZES = {
    True: {"eval": (128, 8), "check": (128, 4), "final": (512, 8)},
    False: {"eval": (64, 4), "check": (64, 4), "final": (128, 4)},
}
"""Prompts and samples of every evaluation along the way, of those of the rate check, and of the last one; on the
embedded task or not, unless told."""
DECIDED = ("method", "method_options", "seed", "budget", "steps", "eval_part", "eval_every", "task", "model")
COMPARED = (
    "grpo",
    "dapo",
    "gtpo",
    "grpo_s",
    "forking_tokens",
    "random_tokens",
    "oracle_positions",
    "entropy_advantage",
    "ptw_entropy",
    "ptw_fisher",
    "ptw_gradient_norm",
    "ptw_perturbation",
    "ptw_attention",
    "clip_cov",
    "kl_cov",
    "exact_value",
)
SITTINGS = "sittings.jsonl"
CHECK_SEED = 1000  # seeds of the rate check begin here: no run that counts has one of these


@dataclass(frozen=True)
class CompareConfig:
    """What is the same for all runs of a study; methods, seeds and the baseline are asked of it.

    base      the training of every run, but for method, seed, learning rate (whose multiples are checked), budget and
              evaluation
    budget    what every run may spend
    rates     multiples of the base learning rate that every method is checked at; a single one is taken without a check
    check_*   seeds of the check; validation prompts and samples of each of its evaluations
    final_*   prompts and samples of the evaluation of a finished run
    """

    base: TrainConfig
    budget: Budget
    rates: tuple[float, ...] = (1.0, 2.0, 4.0)
    check_seeds: int = 1
    check_prompts: int = 128
    check_samples: int = 4
    final_prompts: int = 512
    final_samples: int = 8

    def __post_init__(self) -> None:
        for name in ("check_seeds", "check_prompts", "check_samples", "final_prompts", "final_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates are different positive multiples of the learning rate, got {list(self.rates)}")
        object.__setattr__(self, "rates", tuple(sorted(self.rates)))

    def as_dict(self) -> dict[str, Any]:
        base = {
            k: v
            for k, v in self.base.as_dict().items()
            if k not in ("method", "method_options", "seed", "budget", "eval_part")
        }
        return asdict(self) | {"base": base, "rates": list(self.rates)}

    def job(self, method: str, factor: float, seed: int, *, final: bool) -> Job:
        """The run of a method at a multiple of the learning rate: to check the rate, or one of those that count."""
        options = {self.budget.unit: self.budget.amount, "marks": self.budget.marks}
        config = replace(
            self.base,
            method=method,
            learning_rate=self.base.learning_rate * factor,
            budget=options,
            seed=seed if final else CHECK_SEED + seed,
            eval_part="final" if final else "validation",
        )
        name = f"{method}-x{factor:g}-{seed}"
        if final:
            return Job(f"runs/{name}", config, factor, (self.final_prompts, self.final_samples))
        config = replace(config, eval_prompts=self.check_prompts, eval_samples=self.check_samples)
        return Job(f"checks/{name}", config, factor)


def plan(asked: Comparison) -> tuple[CompareConfig, list[str], int]:
    """(what is the same for all runs, methods, seeds) that are asked for."""
    if decided := [
        key for key in train_config.read_settings(asked.settings, "--set") if key.partition(".")[0] in DECIDED
    ]:
        raise ValueError(
            f"--set {decided[0]}: that is for the study to decide; see --methods, --seeds, --budget, --steps, --task,"
            " --model"
        )
    unit, given, amount = asked.budget.partition("=")
    if unit not in UNITS:
        raise ValueError(f"--budget is {', '.join(UNITS)}, each with =NUMBER if you like, not {asked.budget!r}")
    if unit != "rollouts" and not given:
        raise ValueError(
            f"--budget {unit}: say how many, like --budget {unit}={'100000' if unit == 'tokens' else '20'}"
        )
    steps = (QUICK_STEPS if asked.quick else STEPS) if asked.steps is None else asked.steps
    sizes = SIZES[(asked.training.get("task") or "reckon") == "reckon"]
    evaluated = (f"eval_{what}={number}" for what, number in zip(("prompts", "samples"), sizes["eval"]))
    base = train_config.read_config(None, [*BASE, *evaluated, *asked.settings], steps=steps, **asked.training)
    size = base.prompts * base.group
    spent = train_config.read_settings([f"{unit}={amount}"], "--budget") if given else {unit: steps * size}
    budget = Budget.of({**spent, "marks": asked.marks})
    if asked.steps is None and given:
        base = replace(base, steps=math.ceil(budget.amount / size) if unit == "rollouts" else MOST_STEPS)
    rates = asked.rates or ((1.0,) if asked.quick else (1.0, 2.0, 4.0))
    config = CompareConfig(
        base,
        budget,
        tuple(rates),
        asked.check_seeds,
        *sizes["check"],
        final_prompts=asked.final_prompts or sizes["final"][0],
        final_samples=asked.final_samples or sizes["final"][1],
    )
    methods = asked.methods
    if methods is None:
        wanted = QUICK if asked.quick else COMPARED
        absent = unavailable(wanted, load(base.task, **base.task_options))
        methods = [name for name in wanted if name not in absent]
    return config, list(methods), asked.seeds if asked.seeds is not None else 3 if asked.quick else 5


def run(asked: Comparison, work: Work) -> dict[str, Any]:
    """The whole study: its blocks."""
    config, methods, seeds = plan(asked)
    if asked.workers is not None and asked.workers < 1:
        raise ValueError(f"workers must be at least 1, got {asked.workers}")
    methods = check(config, methods, seeds, asked.baseline)
    with _starting(asked, config) as (workers, start):
        return _run(asked, config, methods, seeds, work, workers, start)


@contextmanager
def _starting(asked: Comparison, config: CompareConfig) -> Iterator[tuple[int, Start]]:
    """(runs side by side, how one is started)."""
    Workers(asked.ray, gpus=asked.gpus_per_worker)  # refuses GPUs of workers that are nowhere
    if asked.ray is None:
        yield asked.workers or side_by_side(config.base, asked.memory), forked
        return
    from tokencredit.distribute.cluster import connected, share

    with connected(asked.ray, asked.workers) as ray:
        number, gpus = share(ray, asked.workers, asked.gpus_per_worker)
        yield number, partial(on_ray, ray, gpus)


def _run(
    asked: Comparison,
    config: CompareConfig,
    methods: Sequence[str],
    seeds: int,
    work: Work,
    workers: int,
    start: Start,
) -> dict[str, Any]:
    amount, unit = config.budget.amount, config.budget.unit
    work.say(
        f"{len(methods)} methods, {seeds} seeds, {amount:,g} {unit} each, {workers} side by side, on {config.base.task}"
    )
    work.tell(forecast(config, len(methods), seeds))
    settings = Marks(collapse=asked.collapse)
    return compare(
        config,
        work,
        methods=methods,
        seeds=seeds,
        baseline=asked.baseline,
        workers=workers,
        settings=settings,
        start=start,
        memory=asked.memory,
    )


def forecast(config: CompareConfig, methods: int, seeds: int) -> str:
    """What the runs and their evaluations sample at most, greedy answers included, before any is made."""
    runs, checks = methods * seeds, methods * len(config.rates) * config.check_seeds if len(config.rates) > 1 else 0
    base, budget = config.base, config.budget
    along = (budget.marks + 1) * (runs * base.eval_prompts * (base.eval_samples + 1))
    along += (budget.marks + 1) * checks * config.check_prompts * (config.check_samples + 1)
    last = runs * config.final_prompts * (config.final_samples + 1)
    of_checks = f" and {checks} to choose learning rates" if checks else ""
    return (
        f"forecast: {runs} runs{of_checks}, {(runs + checks) * budget.amount:,g} {budget.unit} of training in all;"
        f" {along + last:,} completions to evaluate them: {base.eval_prompts} prompts × {base.eval_samples} at each of"
        f" {budget.marks + 1} marks (--marks, --set eval_prompts=...), {config.final_prompts} × {config.final_samples}"
        " at the end (--final-prompts, --final-samples)"
    )


def compare(
    config: CompareConfig,
    work: Work,
    *,
    methods: Sequence[str],
    seeds: int,
    baseline: str,
    workers: int = 1,
    settings: Marks | None = None,
    start: Start = forked,
    memory: int | None = None,
) -> dict[str, Any]:
    """The runs and what they say: the blocks of the result. A run takes `memory` bytes, where they are given.
    RunError where the directory holds a study with other settings.

    RuntimeError where the baseline has no finished run, so that there is nothing to compare with, or where another
    process is at it.
    """
    methods, tell, out = check(config, methods, seeds, baseline), work.say, work.path
    judge = load(config.base.task, **config.base.task_options)
    work.begin(task=config.base.task, model=config.base.model, judge=judge, config=config.as_dict())
    with _sitting(out):
        tell = tell if isinstance(tell, Tell) else Tell()

        def made(jobs: Sequence[Job], title: str) -> dict[str, str]:
            own = [replace(job, memory=memory) for job in jobs]
            return run_jobs(out, own, workers, title, tell, start)

        failed, chosen, runs = _train(config, out, methods, seeds, made)
    done = [job for job in runs if finished(out, job)]
    if not any(job.config.method == baseline for job in done):
        told = next((f": {why}" for name, why in failed.items() if name.startswith(f"runs/{baseline}-")), "")
        raise RuntimeError(f"the baseline {baseline} has no finished run, so nothing can be compared with it{told}")
    return {
        "seeds": list(range(seeds)),
        "baseline": baseline,
        "failed": failed,
        "workers": workers,
        **figures(config, out, done, baseline, chosen, settings or Marks(), work.book),
        "wall": sum(each["seconds"] for each in read_lines(out / SITTINGS)),
    }


def _train(
    config: CompareConfig,
    out: Path,
    methods: Sequence[str],
    seeds: int,
    made: Callable[[Sequence[Job], str], dict[str, str]],
) -> tuple[dict[str, str], dict[str, dict[str, Any]], list[Job]]:
    """({run that failed: why}, what was chosen for every method, the runs that count), all runs made."""
    checks = (
        [
            config.job(method, factor, seed, final=False)
            for method in methods
            for factor in config.rates
            for seed in range(config.check_seeds)
        ]
        if len(config.rates) > 1
        else []
    )
    failed = made(checks, "learning rates") if checks else {}
    chosen = choose(config, out, methods, checks)
    runs = [
        config.job(method, chosen[method]["factor"], seed, final=True) for seed in range(seeds) for method in methods
    ]
    return failed | made(runs, "runs"), chosen, runs


@contextmanager
def _sitting(out: Path) -> Iterator[None]:
    """Adds the seconds of this sitting to those of earlier ones, however it ends."""
    start = time.perf_counter()
    try:
        yield
    finally:
        append_line(out / SITTINGS, {"seconds": time.perf_counter() - start})


def check(config: CompareConfig, methods: Sequence[str], seeds: int, baseline: str) -> list[str]:
    """The methods, each once; whatever can be refused is refused here, before anything is made."""
    methods = list(dict.fromkeys(methods))
    for name in [*methods, baseline]:
        METHODS[name]
    if baseline not in methods:
        raise ValueError(
            f"the baseline {baseline} is not among the methods ({', '.join(methods)}): add it, or choose one of them"
        )
    if len(methods) < 2:
        raise ValueError(f"a comparison needs another method beside the baseline {baseline}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    task = load(config.base.task, **config.base.task_options)
    if absent := unavailable(methods, task):
        raise ValueError(
            "; ".join(f"{name} needs {', '.join(map(_told, needs))}" for name, needs in absent.items())
            + f", which the task {config.base.task} cannot give: leave it out of --methods"
        )
    for part in ("validation", "final") if len(config.rates) > 1 else ("final",):
        if (num := len(held_out(task, 8, part))) < 8:
            raise ValueError(
                f"{config.base.task} has {num} held-out prompts in its {part} part, too few to tell methods apart: "
                "give it a larger file of test prompts"
            )
    return methods


def _told(score: str) -> str:
    """A score, and of one that nobody measures what it would be."""
    return f"{score} ({UNMEASURED[score].what})" if score in UNMEASURED else score


def unavailable(methods: Sequence[str], task: Task) -> dict[str, list[str]]:
    """{method: scores that neither an engine nor this task can give}."""
    return {name: missing for name in methods if (missing := sorted(METHODS[name].needs - available(task) - OF_A_RUN))}
