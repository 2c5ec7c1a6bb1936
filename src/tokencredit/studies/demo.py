"""The demo: several methods, several seeds, side by side on the embedded world, a small correlation study, and one
report.

Question: what does a laptop show of per-token credit in two minutes? Every run is a process of its own with one
thread; a run that was finished is not repeated, one that was interrupted goes on, one that fails is reported and does
not stop the others.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokencredit import report
from tokencredit.durable import write_json
from tokencredit.exclusive import holds_out
from tokencredit.figure import Figure, number
from tokencredit.lm.policy import PolicyConfig
from tokencredit.methods import METHODS
from tokencredit.report.findings import resolved_first
from tokencredit.studies.bars import bars
from tokencredit.studies.credits import credits_on_base
from tokencredit.studies.jobs import Job, run_jobs
from tokencredit.studies.learning import compare_and_say
from tokencredit.studies.study import status
from tokencredit.train_config import read_config

SETTINGS = ("threads=1", "record_rows=48")


@holds_out
def demo(
    out: Path, *, methods: Sequence[str], seeds: int, steps: int, workers: int | None, console: Console
) -> tuple[Path, list[str]]:
    """Train, evaluate, write `out`/report.html and `out`/result.json; returns the page, and the names of the runs that
    failed. RuntimeError where no run succeeded.
    """
    workers = max(1, min(os.cpu_count() or 1, 4)) if workers is None else workers
    for name, count in (("seeds", seeds), ("steps", steps), ("workers", workers)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    methods = list(dict.fromkeys(methods))
    for name in methods:
        METHODS[name]
    jobs = [job_of(method, seed, steps) for seed in range(seeds) for method in methods]
    console.print(
        f"{', '.join(methods)} on reckon: {len(jobs)} runs of {steps} rollout batches, {workers} side by side"
    )
    with bars(console) as tell:
        failed = list(run_jobs(out, jobs, workers, "runs", tell))
    done = [out / job.name for job in jobs if job.name not in failed]
    if not done:
        raise RuntimeError(f"no run succeeded; the first log is {out / failed[0]}.log")
    figures = compare_and_say(done)
    command = shlex.join(
        ["tokencredit", "demo", "--out", str(out), "--methods", *methods, "--seeds", str(seeds), "--steps", str(steps)]
    )
    write_json(out / "result.json", {"command": command, "seeds": list(range(seeds)), "failed": failed, **figures})
    show(figures, console)
    sections = correlate(out, done[0], command, console)
    opening = credits_on_base(PolicyConfig(model="reckon"), methods)
    title = f"{', '.join(methods)} on reckon"
    return report.write(done, out / "report.html", figures, title=title, first=[opening], extra=sections), failed


def correlate(out: Path, run: Path, command: str, console: Console) -> list[report.Section]:
    """A small study of which tokens matter, on the base and on the checkpoints of one run: its sections of the
    report. `command` is the demo's own, which makes both.
    """
    from tokencredit.studies.correlation.question import SMALL, STUDY, CorrelationConfig

    config, directory = CorrelationConfig(**SMALL, runs=(str(run),)), out / "correlation"
    with status(console) as say:
        result = STUDY.run(config, directory, command=command, say=say)
    for finding in result["findings"]:
        console.print(f"- {finding}", soft_wrap=True)
    return STUDY.sections(directory)


def job_of(method: str, seed: int, steps: int) -> Job:
    """One run: evaluated, recorded and saved after every third of it."""
    third = -(-steps // 3)
    every = dict.fromkeys(("eval_every", "record_every", "save_every"), third)
    return Job(f"{method}-{seed}", read_config(None, SETTINGS, method=method, seed=seed, steps=steps, **every))


def show(figures: dict, console: Console) -> None:
    """The last step's figures by method, and what they say about the papers' claims. A row is a figure, so that it fits
    80 columns.
    """
    methods = {method["name"]: method["summary"] for method in figures["methods"]}
    measures = [m for m in figures["curves"] if m in ("pass@1", "pass@8", "greedy", "entropy", "length")]
    for names in (list(methods)[i : i + 3] for i in range(0, len(methods), 3)):
        table = Table("held out", box=None, pad_edge=False)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for measure in measures:
            table.add_row(measure, *(_cell(methods[name].get(measure)) for name in names))
        console.print(table, "")
    console.print(f"In brackets: {figures['interval']}.")
    resolved, rest = resolved_first(figures["findings"])
    for finding in resolved or rest:
        console.print(f"\n{finding['verdict']}: {finding['claim']}\n  {finding['detail']}")
    if resolved and rest:
        console.print(f"\nnot resolved: {'; '.join(finding['claim'] for finding in rest)}")


def _cell(figure: dict | None) -> str:
    return number(None) if figure is None else Figure.from_json(figure).text()
