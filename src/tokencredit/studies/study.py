"""The frame of a study: one question, asked with a configuration, answered in a directory.

A study is a folder. Its parts, by name:

    question.py   the question in words, the configuration, and `STUDY`; imports no model and no statistic
    study.py      run(config, work) -> the blocks of the result; figures go into `work.book`
    tables.py     tables(result) -> what the terminal shows
    page.py       sections(result, directory) -> what the report shows

Everything else is here: flags, the run directory, stages that are stored when they are made, result.json, terminal and
page. A killed study goes on where it was and ends with the same numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokencredit.distribute.workers import add_ray, workers_of
from tokencredit.exclusive import exclusive
from tokencredit.lm.arguments import add_policy, add_sampler, policy_config
from tokencredit.runs import Run
from tokencredit.stages import Stages
from tokencredit.studies.book import Book
from tokencredit.studies.options import add_flags, identity, read, told
from tokencredit.studies.result import Result, read_result, write_result
from tokencredit.tasks.source import own_source, rows_source
from tokencredit.tasks.task import Task

if TYPE_CHECKING:
    from rich.console import Console

    from tokencredit.report.section import Section

Say = Callable[[str], Any]


def silent(text: str) -> None:
    """Says nothing."""


@dataclass
class Work:
    """What a study works with: its directory, its figures, and whom it tells what it does: `say` for what is going on,
    `tell` for what is to stay on the terminal.

    Nothing is made before `begin`, so that whatever can be refused is refused without a trace.
    """

    study: str
    config: Any
    path: Path
    book: Book
    say: Say = silent
    tell: Say = silent
    record: Run = field(init=False)
    stages: Stages = field(init=False)

    def begin(
        self,
        *,
        task: str,
        model: str,
        judge: Task | None,
        weights: str | None = None,
        config: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Makes the directory, or opens it to go on. What makes it this study and no other are the fields of its
        configuration, or `config` in their place, and `more`; of `judge`, the task of that name, the verifier, if it
        is one of your own, and its data; and the `weights` of that model, as `lm.fingerprint` hashes them.

        RunError where the directory holds another run, with every field that differs.
        """
        own = identity(self.config) if config is None else config
        self.record = Run.create_study(
            self.path,
            study=self.study,
            task=task,
            model=model,
            config={**own, **more},
            seed=self.book.seed,
            command=self.book.command,
            verifier=own_source(judge) if judge else None,
            rests_on={
                f"the data of {task}": rows_source(judge) if judge else None,
                f"the weights of {model}": weights,
            },
        )
        self.stages = Stages(self.path / "stages")

    def counting(self, what: str, unit: str, total: float | None = None) -> Counting:
        """Says how far something is, and how long the rest will take at that pace, while it is told what is done."""
        return Counting(self.say, what, unit, total)


@dataclass
class Counting:
    """A `Progress` in words: "rolling out: 130 of 512 rollouts, 4,100 tokens, 3 min left"."""

    say: Say
    what: str
    unit: str
    total: float | None = None
    done: float = 0.0
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)

    def __call__(self, rows: float, tokens: int = 0, total: float | None = None) -> None:
        self.done, self.tokens, self.total = self.done + rows, self.tokens + tokens, total or self.total
        of = f" of {self.total:,.0f}" if self.total else ""
        parts = [f"{self.what}: {self.done:,.0f}{of} {self.unit}"]
        parts += [f"{self.tokens:,} tokens"] if self.tokens else []
        if self.total and self.done:
            spent = time.perf_counter() - self.began
            parts.append(f"{told_time(spent * max(self.total - self.done, 0) / self.done)} left")
        self.say(", ".join(parts))


def told_time(seconds: float) -> str:
    """A time in words: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Shared:
    """Flags that commands share: `add` adds them to a parser, `read` answers what they say by field of a
    configuration.
    """

    add: Callable[[argparse.ArgumentParser], None]
    read: Callable[[argparse.Namespace], Mapping[str, Any]]


def add_on_workers(parser: argparse.ArgumentParser) -> None:
    """Flags of a policy, of what samples from it, and of the workers that do."""
    for add in (add_policy, add_sampler, add_ray):
        add(parser)


POLICY = Shared(add_policy, lambda args: {"policy": policy_config(args)})
ON_WORKERS = Shared(add_on_workers, lambda args: POLICY.read(args) | {"workers": workers_of(args)})
RUN = Shared(partial(add_policy, model=("--run", "--model")), POLICY.read)
"""A policy; with who does the work; the same policy of a question about a run, which names it so."""


@dataclass(frozen=True)
class Study:
    """One question with its parts.

    package   the folder that holds them
    summary   the question in a line        title     of its page
    config    a frozen dataclass with `seed`; its `option`s are the flags of the command
    group     the command that it is an action of: "study" or "dynamics"
    small     fields of the configuration in a quick look, for --small
    shared    flags that it shares with other commands: those of a policy
    """

    package: str
    summary: str
    title: str
    config: type
    examples: str
    group: str = "study"
    action: str = ""
    small: Mapping[str, Any] = field(default_factory=dict)
    shared: Shared | None = None

    @property
    def name(self) -> str:
        return self.package.rpartition(".")[2]

    def part(self, name: str) -> ModuleType:
        """A module of the folder, imported when it is needed: the command line has to start without a model."""
        return import_module(f"{self.package}.{name}")

    def run(self, config: Any, out: Path, *, command: str = "", say: Say = silent, tell: Say = silent) -> Result:
        """The whole study, in the directory `out`, which it holds meanwhile: its result, as `read_result` reads it."""
        work = Work(self.name, config, Path(out), Book(command, config.seed), say, tell)
        with exclusive(work.path):
            found = self.part("study").run(config, work)
            result = {"study": self.name, "command": command, "seed": config.seed, "config": work.record.info["config"]}
            write_result(work.path, {**result, "figures": work.book.figures, "seconds": work.stages.seconds, **found})
            work.record.finish()
        return read_result(work.path)

    def sections(self, directory: str | Path) -> list[Section]:
        """What the report shows of the study in a directory."""
        return self.part("page").sections(read_result(directory), Path(directory))

    def write_page(self, directory: str | Path) -> Path:
        """The study's own page, in its directory."""
        from tokencredit import report

        out = Path(directory) / "report.html"
        return report.write([], out, {}, title=self.title, extra=self.sections(directory))

    def add_action(self, actions: Any) -> None:
        """Adds the study's own command."""
        from tokencredit.console import add_command

        action = self.action or self.name.replace("_", "-")
        p = add_command(actions, action, self.command, self.summary, f"examples:\n{self.examples}")
        out = Path("runs") / self.name.replace("_", "-")
        p.add_argument("--out", type=Path, default=out, help="directory of the study (default: %(default)s)")
        if self.small:
            p.add_argument("--small", action="store_true", help=f"a quick look: {told(self.small, self.config)}")
        add_flags(p, self.config)
        if self.shared:
            self.shared.add(p)

    def read(self, args: argparse.Namespace) -> Any:
        """The configuration that the arguments ask for."""
        given = self.shared.read(args) if self.shared else {}
        return read(args, self.config, self.small, given)

    def command(self, args: argparse.Namespace) -> int:
        """Runs the study, prints its tables and findings, writes its page; 1 where the result names parts that
        failed.
        """
        from tokencredit.console import console

        config = self.read(args)
        with self.display(console) as say:
            tell = partial(console.print, soft_wrap=True, markup=False, highlight=False)
            result = self.run(config, args.out, command=args.command_line, say=say, tell=tell)
        self.show(result, console)
        page = self.write_page(args.out)
        console.print(f"Report: {page}; figures: {args.out / 'result.json'}", soft_wrap=True)
        if failed := result.get("failed"):
            told = f"{len(failed)} failed and are not in it: {', '.join(failed)}"
            console.print(told, style="red", soft_wrap=True)
        return 1 if failed else 0

    def display(self, console: Console) -> AbstractContextManager[Say]:
        """Shows what is being done, which is told to what it yields."""
        return status(console)

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """The tables and findings of a result, on the terminal."""
        for each in self.part("tables").tables(result):
            console.print(each)
        for finding in result["findings"]:
            console.print(f"- {finding}", soft_wrap=True)


@contextmanager
def status(console: Console) -> Iterator[Say]:
    """One line that says what is being done; what it yields changes it."""
    from rich.text import Text

    from tokencredit.progress import in_a_log

    now = ["loading"]
    with console.status(Text(now[0])) as shown, in_a_log(console, lambda: now[0]):

        def say(text: str) -> None:
            now[0] = text
            shown.update(Text(text))

        yield say
