"""The progress of training runs side by side: a bar for all of them, and one for every run that is going on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tokencredit.progress import progress_bars, watched
from tokencredit.studies.jobs import Tell


class Bars(Tell):
    """Shows what it is told; failures are printed above the bars."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.bars: dict[str, Any] = {}

    def __call__(self, text: str) -> None:
        self.progress.console.print(text)

    def stage(self, title: str, total: int, done: int) -> None:
        self.whole = self.progress.add_task(title, total=total, completed=done, figures="")
        self.bars.clear()

    def running(self, name: str, share: float, figures: Mapping[str, Any]) -> None:
        if name not in self.bars:
            self.bars[name] = self.progress.add_task(f"  {Path(name).name}", total=100, figures="starting")
        done = min(int(100 * share), 100)
        self.progress.update(self.bars[name], completed=done, figures=watched(figures) or "starting")

    def ended(self, name: str, why: str | None) -> None:
        self.progress.remove_task(self.bars.pop(name))
        self.progress.advance(self.whole)
        if why:
            self.progress.console.print(f"{name} failed: {why}", style="red", soft_wrap=True)


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Whom `run_jobs` tells what it does."""
    with progress_bars(console) as progress:
        yield Bars(progress)
