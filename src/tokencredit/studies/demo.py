"""The demo: several methods, several seeds, side by side on the embedded world, a small correlation study, and one report.

Question: what does a laptop show of per-token credit in a few minutes? Every run is a process of its own with one thread; a run that
was finished is not repeated, one that was interrupted goes on, one that fails is reported and does not stop the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tokencredit import report
from tokencredit.durable import read_lines, write_json
from tokencredit.methods import METHODS
from tokencredit.progress import columns, watched
from tokencredit.studies.learning import compare

STEPS = 30
UPDATES = 2


def demo(out: Path, *, methods: Sequence[str], seeds: int, steps: int | None, workers: int | None, console: Console) -> Path:
    """Train, evaluate, write `out`/report.html and `out`/result.json; returns the page."""
    for name in methods:
        METHODS[name]
    steps = steps or STEPS
    jobs = [(f"{method}-{seed}", method, seed) for seed in range(seeds) for method in methods]
    workers = workers or max(1, min(os.cpu_count() or 1, 4))
    console.print(f"{len(jobs)} runs of {steps} rollout batches, {workers} side by side: {', '.join(methods)} on reckon, {seeds} seeds")
    failed = run_all(out, jobs, steps, workers, console)
    done = [out / name for name, _, _ in jobs if name not in failed and (out / name / "run.json").exists()]
    if not done:
        raise RuntimeError(f"no run succeeded; the first log: {out / jobs[0][0]}.log")
    figures = compare(done)
    write_json(out / "result.json", {"command": f"tokencredit demo --out {out}", "seeds": list(range(seeds)), **figures})
    show(figures, console)
    sections = correlate(out, done[0], console)
    return report.write(done, out / "report.html", figures, title=f"{', '.join(methods)} on reckon", extra=sections)


def correlate(out: Path, run: Path, console: Console) -> list[report.Section]:
    """A small study of which tokens matter, on the base and on the checkpoints of one run: its sections of the report."""
    from tokencredit.report.correlation import sections
    from tokencredit.studies import correlation
    from tokencredit.studies.correlation_command import SMALL

    config = correlation.CorrelationConfig(**SMALL, runs=(str(run),))
    with console.status("which tokens matter") as status:
        study = correlation.run(config, out / "correlation", command=f"tokencredit demo --out {out}", say=status.update)
    for finding in study.study["findings"]:
        console.print(f"- {finding}", highlight=False, markup=False)
    return sections(study.path)


def run_all(out: Path, jobs: Sequence[tuple[str, str, int]], steps: int, workers: int, console: Console) -> set[str]:
    """Run the jobs, `workers` at a time; the names of those that failed."""
    out.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(jobs), {}, set()
    with Progress(*columns(), console=console) as progress:
        bars = {name: progress.add_task(name, total=steps * UPDATES, figures="waiting") for name, _, _ in jobs}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    name, method, seed = waiting.pop(0)
                    running[name] = start(out, name, method, seed, steps)
                time.sleep(0.2)
                for name, process in list(running.items()):
                    _update(progress, bars[name], out / name)
                    if process.poll() is not None:
                        del running[name]
                        if process.returncode:
                            failed.add(name)
                            progress.console.print(f"{name} failed (exit {process.returncode}); its log: {out / name}.log", style="red")
        finally:
            for process in running.values():
                process.terminate()
    return failed


def start(out: Path, name: str, method: str, seed: int, steps: int) -> subprocess.Popen:
    settings = {"steps": steps, "updates": UPDATES, "eval_every": max(steps // 3, 1), "record_every": max(steps // 3, 1),
                "save_every": steps, "threads": 1, "record_rows": 48}  # fmt: skip
    command = [sys.executable, "-m", "tokencredit", "train", "--method", method, "--seed", str(seed), "--out", str(out / name), "--quiet"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (out / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)


def _update(progress: Progress, bar, path: Path) -> None:
    records = read_lines(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    figures = watched(records[-1]) if records else "starting" if not path.exists() else "first evaluation"
    progress.update(bar, completed=records[-1]["step"] if records else 0, figures=figures)


def show(figures: dict, console: Console) -> None:
    """The last step's figures by method, and what they say about the papers' claims."""
    from rich.table import Table

    names = [m for m in ("pass@1", "pass@8", "greedy", "entropy", "length") if m in figures["curves"]]
    table = Table(title=f"Held-out prompts, last step; {figures['interval']}", title_justify="left")
    for column in ("method", *names):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in figures["methods"]:
        cells = [method["summary"].get(name) for name in names]
        table.add_row(method["name"], *(f"{c['value']:.3f} ({c['low']:.3f}-{c['high']:.3f})" if c else "-" for c in cells))
    console.print(table)
    for finding in figures["findings"]:
        console.print(f"{finding['verdict']}: {finding['claim']}", f"({finding['detail']})", highlight=False, markup=False)
