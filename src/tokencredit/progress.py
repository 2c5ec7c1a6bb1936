"""Progress: on a terminal bars with the figures that people watch, within 80 columns; in a log, where nothing can be
drawn anew, the same as a line a minute.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

EVERY = 60.0
"""Seconds between two lines of progress in a log."""
WATCHED = (
    ("pass_rate", "pass {:.2f}"),
    ("entropy", "entropy {:.3f}"),
    ("length", "length {:.0f}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
)


def plain_table(title: str, *heads: str, **options: Any) -> Table:
    """A table without lines; a column whose head begins with > is aligned to the right, one whose head begins with =
    holds names, which stay on one line. Where the table is wider than the terminal, other cells go over several lines:
    no digit is left out.
    """
    table = Table(title=title or None, box=None, pad_edge=False, title_justify="left", title_style="bold", **options)
    for head in heads:
        table.add_column(
            head.lstrip(">="),
            justify="right" if head.startswith(">") else "left",
            no_wrap=head.startswith("="),
            overflow="fold",
        )
    return table


def columns() -> tuple[ProgressColumn, ...]:
    """What a line of progress shows: name, bar, count, time left (then time taken), figures. Names are text, never
    markup.
    """
    return (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}", markup=False),
    )


@contextmanager
def progress_bars(console: Console, quiet: bool = False) -> Iterator[Progress]:
    """Bars of `columns`. Time left is reckoned from all that was seen, since a unit may take minutes."""
    progress = Progress(*columns(), console=console, disable=quiet, speed_estimate_period=math.inf)
    words = [column for column in columns() if not isinstance(column, BarColumn)]

    def now() -> str:
        return "\n".join(" ".join(str(column(task)) for column in words).rstrip() for task in progress.tasks)

    with progress, ExitStack() as stack:
        if not quiet:
            stack.enter_context(in_a_log(console, now))
        yield progress


@contextmanager
def in_a_log(console: Console, now: Callable[[], str]) -> Iterator[None]:
    """Prints what `now` gives every minute if it has changed, where the console is a file or a pipe."""
    if console.is_terminal or console.is_jupyter:
        yield
        return
    ended = threading.Event()

    def speak() -> None:
        last = ""
        while not ended.wait(EVERY):
            if (words := now()) != last:
                console.print(words, soft_wrap=True)
                last = words

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def bar(console: Console, description: str, total: float | None) -> Iterator[Callable]:
    """One bar; call what it yields with the number of units just done, of which a part may be done, and of the tokens
    sampled meanwhile.
    """
    with progress_bars(console) as progress:
        task, sampled = progress.add_task(description, total=total, figures=""), 0

        def advance(done: float, tokens: int = 0, total: float | None = None, absolute: bool = False) -> None:
            nonlocal sampled
            before = 0 if absolute else progress.tasks[task].completed
            sampled += tokens
            figures = sampled_figures(sampled, progress.tasks[task].elapsed) if sampled else ""
            # Parts of a unit add up to it but for rounding, and the count that is shown is cut.
            progress.update(task, total=total, completed=round(before + done, 6), figures=figures)

        yield advance
        if progress.tasks[task].total is None:
            progress.update(task, total=progress.tasks[task].completed)


def sampled_figures(tokens: int, seconds: float | None) -> str:
    """Tokens sampled so far, and the mean speed."""
    return f"{tokens:,} tokens" + (f", {tokens / seconds:,.0f} tok/s" if seconds else "")


def watched(figures: dict) -> str:
    """The few figures of a step worth a glance."""
    return "  ".join(form.format(figures[name]) for name, form in WATCHED if figures.get(name) is not None)


class TrainProgress:
    """A bar over optimizer steps; evaluations are printed above it."""

    def __init__(self, console: Console, config, quiet: bool = False):
        self.console, self.config, self.quiet = console, config, quiet
        self.stack = ExitStack()

    def __enter__(self) -> TrainProgress:
        self.progress = self.stack.enter_context(progress_bars(self.console, self.quiet))
        self.task = self.progress.add_task(self.config.method, total=self.config.optimizer_steps, figures="loading")
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def listen(self, event: str, figures: dict) -> None:
        """What `train` tells: the step and its figures, evaluations, and where the run starts or goes on."""
        if event == "evaluation":
            self._say(f"step {figures['step']:>5}, held out: {held_out(figures)}")
            return
        self.progress.update(self.task, completed=figures["step"])
        if event == "evaluating":
            self.progress.update(self.task, figures=f"evaluating: {figures['done']:,.0f} of {figures['total']:,}")
        if event == "step":
            self.progress.update(self.task, figures=watched(figures))
        if event == "resume":
            self._say(f"going on from the checkpoint of step {figures['step']}")
        elif event == "start":
            self._say(sizes(self.config))
            self.progress.update(self.task, figures="first evaluation" if self.config.eval_every else "first rollouts")
        elif event == "finished" and self.progress.tasks[0].fields["figures"] == "loading":
            self._say("this run is finished already: nothing to do")
            self.progress.update(self.task, figures="finished")

    def _say(self, line: str) -> None:
        if not self.quiet:
            self.progress.console.print(line, soft_wrap=True)


def sizes(config) -> str:
    """What a run samples and trains on, before it does: the fields to change where that is too much."""
    rollouts = config.prompts * config.group
    told = f"{config.steps} rollout batches (--steps) of {config.prompts} prompts × {config.group} = {rollouts:,}"
    told += f" completions, {config.updates} updates on each"
    if config.budget:
        told += f", or until {config.budget} is spent"
    if not config.eval_every:
        return told + "; no evaluation"
    return (
        f"{told}; evaluated on {config.eval_prompts} held-out prompts × {config.eval_samples} and greedily, before the"
        f" first and every {config.eval_every} (--set prompts=, group=, eval_prompts=, eval_samples=, eval_every=)"
    )


def held_out(figures: dict) -> str:
    """An evaluation in one line: the shares of correct answers with their intervals."""
    shares = {name: figures[name] for name in figures if name.startswith("pass@") or name == "greedy"}
    return "  ".join(f"{name} {f['value']:.2f} ({f['low']:.2f}-{f['high']:.2f})" for name, f in shares.items())
