"""The demo: several methods, several seeds, side by side on the embedded world, a small correlation study, and one
report.

Question: what does a laptop show of per-token credit in a few minutes? Every run is a process of its own with one
thread; a run that was finished is not repeated, one that was interrupted goes on, one that fails is reported and does
not stop the others.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tokencredit import report
from tokencredit.durable import read_lines, write_json
from tokencredit.exclusive import holds_out
from tokencredit.figure import Figure, number
from tokencredit.lifeline import tied
from tokencredit.lm.policy import PolicyConfig
from tokencredit.methods import METHODS
from tokencredit.progress import columns, watched
from tokencredit.report.findings import resolved_first
from tokencredit.studies import processes
from tokencredit.studies.credits import credits_on_base
from tokencredit.studies.learning import compare_and_say
from tokencredit.studies.study import status

UPDATES = 2
Job = tuple[str, str, int]


@holds_out
def demo(
    out: Path,
    *,
    methods: Sequence[str],
    seeds: int,
    steps: int,
    workers: int | None,
    console: Console,
    settings: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """Train, evaluate, write `out`/report.html and `out`/result.json; returns the page, and the names of the runs that
    failed.

    `settings` are further "key=value" of TrainConfig, the same for all. RuntimeError where no run succeeded.
    """
    workers = max(1, min(os.cpu_count() or 1, 4)) if workers is None else workers
    for name, count in (("seeds", seeds), ("steps", steps), ("workers", workers)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    methods = list(dict.fromkeys(methods))
    for name in methods:
        METHODS[name]
    jobs = [(f"{method}-{seed}", method, seed) for seed in range(seeds) for method in methods]
    console.print(
        f"{', '.join(methods)} on reckon: {len(jobs)} runs of {steps} rollout batches, {workers} side by side"
    )
    failed = run_all(out, jobs, steps, workers, console, settings)
    done = [out / name for name, _, _ in jobs if name not in failed]
    if not done:
        raise RuntimeError(f"no run succeeded; the first log is {out / jobs[0][0]}.log")
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


def run_all(
    out: Path, jobs: Sequence[Job], steps: int, workers: int, console: Console, settings: Sequence[str] = ()
) -> list[str]:
    """Run the jobs, `workers` at a time, each with a bar; the names of those that failed, whose last words are
    printed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with Progress(*columns(), console=console) as progress:
        bars = {name: progress.add_task(name, total=steps * UPDATES, figures="waiting") for name, _, _ in jobs}

        def watch(name: str, code: int | None) -> None:
            _update(progress, bars[name], out / name, code)
            if code:
                told = f"{name} failed (exit {code}): {processes.last_words(out / f'{name}.log')}"
                progress.console.print(told, style="red", soft_wrap=True)

        starts = {name: partial(start, out, name, method, seed, steps, settings) for name, method, seed in jobs}
        return processes.run_all(starts, workers, watch)


def command_of(out: Path, name: str, method: str, seed: int, steps: int, settings: Sequence[str] = ()) -> list[str]:
    """The command line of one run: what anybody would type."""
    third = -(-steps // 3)
    own = {
        "steps": steps,
        "updates": UPDATES,
        "eval_every": third,
        "record_every": third,
        "save_every": third,
        "threads": 1,
        "record_rows": 48,
    }
    command = [
        sys.executable,
        "-m",
        "tokencredit",
        "train",
        "--method",
        method,
        "--seed",
        str(seed),
        "--out",
        str(out / name),
        "--quiet",
    ]
    told = [*(f"{key}={json.dumps(value)}" for key, value in own.items()), *settings]
    return [*command, *(part for setting in told for part in ("--set", setting))]


def start(out: Path, name: str, method: str, seed: int, steps: int, settings: Sequence[str]) -> subprocess.Popen:
    environment = tied({**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    with (out / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            command_of(out, name, method, seed, steps, settings),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
        )


def _update(progress: Progress, bar, path: Path, code: int | None) -> None:
    records = read_lines(path / "metrics.jsonl")
    figures = watched(records[-1]) if records else "first evaluation" if (path / "run.json").exists() else "loading"
    progress.update(bar, completed=records[-1]["step"] if records else 0, figures="failed" if code else figures)


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
