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

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokencredit.budget import Budget
from tokencredit.durable import append_line, read_lines, write_json
from tokencredit.exclusive import exclusive
from tokencredit.methods import METHODS
from tokencredit.runs import Run
from tokencredit.scores.table import available, names_of
from tokencredit.studies.compare.figures import Settings, figures
from tokencredit.studies.compare.jobs import Job, Tell, choose, finished, run_jobs
from tokencredit.tasks import load
from tokencredit.tasks.data import held_out
from tokencredit.train_config import TrainConfig

STUDY = "compare"
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
FREE = frozenset({"entropy", "logprob"})
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
            return Job(f"runs/{name}", config, factor, _cost(method), (self.final_prompts, self.final_samples))
        config = replace(config, eval_prompts=self.check_prompts, eval_samples=self.check_samples)
        return Job(f"checks/{name}", config, factor, _cost(method))


def _cost(method: str) -> int:
    """The larger, the longer a step takes: proxies of tokens, then prefix trees."""
    needs = METHODS[method].needs
    return 2 if "exact_value" in needs else 1 if needs & set(names_of("importance")) else 0


def compare(
    config: CompareConfig,
    out: Path,
    *,
    methods: Sequence[str],
    seeds: int,
    baseline: str,
    workers: int = 1,
    command: str = "",
    settings: Settings | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """The whole study, in the directory `out`: what its result.json holds. RunError where `out` holds a study with
    other settings.

    RuntimeError where the baseline has no finished run, so that there is nothing to compare with, or where another
    process is at it.
    """
    methods, tell = check(config, methods, seeds, baseline), tell or Tell()
    record = Run.create(
        out,
        name=out.resolve().name,
        method="comparison of methods",
        method_name=STUDY,
        task=config.base.task,
        model=config.base.model,
        config=config.as_dict(),
        seed=config.base.seed,
        command=command,
    )
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
    with _sitting(out):
        failed = run_jobs(out, checks, workers, "learning rates", tell)
        chosen = choose(config, out, methods, checks)
        runs = [
            config.job(method, chosen[method]["factor"], seed, final=True)
            for seed in range(seeds)
            for method in methods
        ]
        failed |= run_jobs(out, runs, workers, "runs", tell)
    done = [job for job in runs if finished(out, job)]
    if not any(job.config.method == baseline for job in done):
        told = next((f": {why}" for name, why in failed.items() if name.startswith(f"runs/{baseline}-")), "")
        raise RuntimeError(f"the baseline {baseline} has no finished run, so nothing can be compared with it{told}")
    result = figures(config, out, done, baseline, chosen, settings or Settings(), command)
    result = {
        "study": STUDY,
        "command": command,
        "seeds": list(range(seeds)),
        "seed": config.base.seed,
        "config": config.as_dict(),
        "baseline": baseline,
        "failed": failed,
        "workers": workers,
        **result,
        "wall": sum(each["seconds"] for each in read_lines(out / SITTINGS)),
    }
    write_json(out / "result.json", result)
    record.finish()
    return result


@contextmanager
def _sitting(out: Path) -> Iterator[None]:
    """Holds the directory, and adds the seconds of this sitting to those of earlier ones, however it ends."""
    start = time.perf_counter()
    with exclusive(out):
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
            "; ".join(f"{name} needs {', '.join(needs)}" for name, needs in absent.items())
            + f", which the task {config.base.task} cannot give: leave it out of --methods"
        )
    for part in ("validation", "final") if len(config.rates) > 1 else ("final",):
        if (num := len(held_out(task, 8, part))) < 8:
            raise ValueError(
                f"{config.base.task} has {num} held-out prompts in its {part} part, too few to tell methods apart: "
                "give it a larger file of test prompts"
            )
    return methods


def unavailable(methods: Sequence[str], task: Any) -> dict[str, list[str]]:
    """{method: scores that neither an engine nor this task can give}."""
    return {name: missing for name in methods if (missing := sorted(METHODS[name].needs - available(task)))}
