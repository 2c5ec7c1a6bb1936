"""Progress on the terminal: bars with the figures that people watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

WATCHED = (
    ("pass_rate", "pass", "{:.2f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("tokens_per_second", "tok/s", "{:,.0f}"),
)


def columns() -> tuple:
    return (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"))  # fmt: skip


@contextmanager
def bar(console: Console, description: str, total: int | None) -> Iterator[Callable]:
    """One bar; call what it yields with the number of units just done."""
    with Progress(*columns(), console=console) as progress:
        task = progress.add_task(description, total=total, figures="")

        def advance(done: int, total: int | None = None, absolute: bool = False) -> None:
            progress.update(task, total=total, **({"completed": done} if absolute else {"advance": done}))

        yield advance


def watched(figures: dict) -> str:
    """The few figures of a step worth a glance."""
    return "  ".join(f"{label} {form.format(figures[name])}" for name, label, form in WATCHED if figures.get(name))


class TrainProgress:
    """A bar over optimizer steps; evaluations are printed above it."""

    def __init__(self, console: Console, config, quiet: bool = False):
        self.console, self.config, self.quiet = console, config, quiet
        self.progress = Progress(*columns(), console=console, disable=quiet)

    def __enter__(self) -> TrainProgress:
        self.progress.start()
        self.task = self.progress.add_task(f"{self.config.method} on {self.config.task}", total=self.config.optimizer_steps, figures="")
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def listen(self, event: str, figures: dict) -> None:
        if event in ("step", "resume"):
            self.progress.update(self.task, completed=figures["step"], figures=watched(figures))
        if self.quiet:
            return
        if event == "resume":
            self.progress.console.print(f"going on from the checkpoint of step {figures['step']}")
        if event == "evaluation":
            best = {name: figures[name] for name in figures if name.startswith("pass@") or name == "greedy"}
            shown = "  ".join(f"{name} {f['value']:.3f} ({f['low']:.3f}-{f['high']:.3f})" for name, f in best.items())
            self.progress.console.print(f"step {figures['step']:>5}  held out: {shown}")
