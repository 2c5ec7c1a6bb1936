"""`tokencredit study compare`: the command line of the comparison of methods, its progress and its tables."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from tokencredit.console import console, visible
from tokencredit.lm.arguments import add_policy, training_arguments

SUMMARY = "Which method learns faster, and which ends higher, at an equal budget of rollouts, tokens or seconds?"
EXAMPLES = """examples:
  tokencredit study compare
  tokencredit study compare --quick
  tokencredit study compare --methods grpo gtpo my_method --seeds 8 --rates 1 --out runs/mine
  tokencredit study compare --methods grpo exact_value --budget seconds=20 --out runs/seconds
  tokencredit study compare --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --methods grpo gtpo --seeds 3 --steps 100 \\
      --set prompts=64 --set trl.bf16=true --out runs/qwen
  tokencredit study compare --table --out runs/compare"""
QUICK = ("grpo", "dapo", "gtpo", "ptw_gradient_norm", "exact_value")
BASE = ("prompts=32", "group=8", "eval_prompts=128", "eval_samples=8", "record_every=0", "save_every=8", "threads=1")
DECIDED = ("method", "method_options", "seed", "budget", "steps", "eval_part", "eval_every", "task", "model")
STEPS, QUICK_STEPS, MOST_STEPS = 24, 16, 500


def add_action(actions: Any) -> None:
    """Adds `compare` to the actions of `study`."""
    p = actions.add_parser(
        "compare",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run_command)
    p.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="directory of the study (default: %(default)s)"
    )
    p.add_argument(
        "--methods", nargs="+", metavar="NAME", help="methods to compare (default: sixteen, those the task can give)"
    )
    p.add_argument("--baseline", default="grpo", help="what the others are compared with (default: %(default)s)")
    p.add_argument("--seeds", type=int, help="runs per method, on the same prompts for all methods (default: 5)")
    p.add_argument(
        "--budget",
        default="rollouts",
        metavar="UNIT[=N]",
        help=(
            "what is equal: rollouts, tokens or seconds, and how much of "
            "it every run may spend (default: the rollouts of --steps)"
        ),
    )
    p.add_argument(
        "--steps",
        type=int,
        help=(
            f"rollout batches (default: {STEPS}); with tokens or seconds, the most there may be (default: {MOST_STEPS})"
        ),
    )
    p.add_argument(
        "--rates",
        type=float,
        nargs="+",
        metavar="X",
        help=(
            "multiples of the learning rate that every method is checked at on "
            "validation prompts; one is taken without a check (default: 1 2 4)"
        ),
    )
    p.add_argument(
        "--check-seeds", type=int, default=1, help="runs per method and rate of that check (default: %(default)s)"
    )
    p.add_argument(
        "--final-prompts", type=int, default=512, help="held-out prompts of the last evaluation (default: %(default)s)"
    )
    p.add_argument(
        "--collapse",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="a run collapses when its entropy falls under this share of the initial policy's (default: %(default)s)",
    )
    add_policy(p)
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help=(
            "any other field of `tokencredit "
            "train`, for all runs: prompts, group, updates, learning_rate, trl.bf16 ...; repeatable"
        ),
    )
    p.add_argument("--workers", type=int, help="runs side by side (default: one per core, one with a GPU)")
    p.add_argument(
        "--quick",
        action="store_true",
        help="five methods, three seeds, two thirds of the budget, no check of learning rates",
    )
    p.add_argument(
        "--table", action="store_true", help="print the Markdown table of the study in --out, and do nothing else"
    )


def read_config(args: argparse.Namespace) -> tuple[Any, list[str], int]:
    """(CompareConfig, methods, seeds) that the arguments ask for."""
    from tokencredit import train_config as engines
    from tokencredit.budget import UNITS, Budget
    from tokencredit.studies.compare.study import COMPARED, CompareConfig, unavailable
    from tokencredit.tasks import load

    if decided := [key for key in engines.read_settings(args.settings, "--set") if key.partition(".")[0] in DECIDED]:
        raise ValueError(
            f"--set {decided[0]}: that is for the study to decide; see --methods, --seeds, --budget, --steps, --task,"
            " --model"
        )
    unit, given, amount = args.budget.partition("=")
    if unit not in UNITS:
        raise ValueError(f"--budget is {', '.join(UNITS)}, each with =NUMBER if you like, not {args.budget!r}")
    if unit != "rollouts" and not given:
        raise ValueError(
            f"--budget {unit}: say how many, like --budget {unit}={'100000' if unit == 'tokens' else '20'}"
        )
    steps = (QUICK_STEPS if args.quick else STEPS) if args.steps is None else args.steps
    base = engines.read_config(None, [*BASE, *args.settings], steps=steps, **training_arguments(args))
    size = base.prompts * base.group
    budget = Budget.of(engines.read_settings([f"{unit}={amount}"], "--budget") if given else {unit: steps * size})
    if args.steps is None and given:
        base = replace(base, steps=math.ceil(budget.amount / size) if unit == "rollouts" else MOST_STEPS)
    rates = args.rates or ((1.0,) if args.quick else (1.0, 2.0, 4.0))
    config = CompareConfig(base, budget, tuple(rates), args.check_seeds, final_prompts=args.final_prompts)
    methods = args.methods
    if methods is None:
        wanted = QUICK if args.quick else COMPARED
        absent = unavailable(wanted, load(base.task, **base.task_options))
        methods = [name for name in wanted if name not in absent]
    return config, list(methods), args.seeds if args.seeds is not None else 3 if args.quick else 5


def run_command(args: argparse.Namespace) -> int:
    """Runs the study, prints its table and findings, writes its page and its Markdown table."""
    from tokencredit.durable import read_json, replace_file

    if args.table:
        if not (args.out / "result.json").exists():
            raise ValueError(f"{args.out} holds no finished study (no result.json): run it first, without --table")
        print(visible(markdown(read_json(args.out / "result.json"))))
        return 0
    config, methods, seeds = read_config(args)
    from tokencredit.report import compare as pages
    from tokencredit.studies.compare.figures import Settings
    from tokencredit.studies.compare.study import check, compare

    methods, workers = (
        check(config, methods, seeds, args.baseline),
        _workers() if args.workers is None else args.workers,
    )
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    unit, amount = config.budget.unit, config.budget.amount
    console.print(
        f"{len(methods)} methods, {seeds} seeds, {amount:,g} {unit} each, {workers} side by side, on {config.base.task}"
    )
    with _progress() as tell:
        result = compare(
            config,
            args.out,
            methods=methods,
            seeds=seeds,
            baseline=args.baseline,
            workers=workers,
            command=args.command_line,
            settings=Settings(collapse=args.collapse),
            tell=tell,
        )
    console.print(table(result))
    console.print(
        f"In brackets: 95 %, over seeds and prompts. Differences from {args.baseline}, same seeds; verdicts after Holm."
    )
    for finding in result["findings"]:
        console.print(f"- {finding}")
    replace_file(args.out / "table.md", lambda file: file.write((markdown(result) + "\n").encode()))
    page = pages.write(args.out, args.out / "report.html")
    console.print(
        f"Report: {page}; figures: {args.out / 'result.json'}; table: {args.out / 'table.md'}", soft_wrap=True
    )
    if result["failed"]:
        console.print(
            f"{len(result['failed'])} runs failed and are not in it: {', '.join(result['failed'])}",
            style="red",
            soft_wrap=True,
        )
    return 1 if result["failed"] else 0


def _workers() -> int:
    import torch

    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar for the stage and one for every run that is going on; failures are printed above them."""
    from tokencredit.progress import columns, watched
    from tokencredit.studies.compare.jobs import Tell

    with Progress(*columns(), console=console) as progress:

        class Bars(Tell):
            def stage(self, title: str, total: int, done: int) -> None:
                self.whole = progress.add_task(title, total=total, completed=done, figures="")
                self.bars: dict[str, Any] = {}

            def running(self, name: str, share: float, figures: Mapping[str, Any]) -> None:
                if name not in self.bars:
                    self.bars[name] = progress.add_task(f"  {Path(name).name}", total=100, figures="starting")
                progress.update(
                    self.bars[name], completed=min(int(100 * share), 100), figures=watched(figures) or "starting"
                )

            def ended(self, name: str, why: str | None) -> None:
                progress.remove_task(self.bars.pop(name))
                progress.advance(self.whole)
                if why:
                    progress.console.print(f"{name} failed: {why}", style="red", soft_wrap=True)

        yield Bars()


def rows_of(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row per method: its learning rate, final figures, and what differs from the baseline with the verdicts."""
    from tokencredit.studies.compare.verdicts import number

    figures, found = result["figures"], []
    verdicts = {(row["method"], row["measure"]): row for row in result["verdicts"]}

    def told(name: str | None, sign: bool = False) -> str:
        figure = figures.get(name) if name else None
        if figure is None or figure["value"] is None:
            return "–"
        plus = "+" if sign and figure["value"] > 0 else ""
        ends = "" if figure["low"] is None else f" [{number(figure['low'])}, {number(figure['high'])}]"
        return f"{plus}{number(figure['value'])}{ends}".replace("-", "−")

    for method in result["methods"]:
        row = {
            "method": method["name"],
            "rate": f"{method['learning_rate']:.3g}",
            "pass@1": told(method["figures"]["pass@1"]),
        }
        for measure in ("pass@1", "area", "budget_to"):
            verdict = verdicts.get((method["name"], measure))
            row[f"d {measure}"] = told(verdict["difference"], sign=True) if verdict else "–"
            row[f"v {measure}"] = verdict["verdict"].replace(" at this budget", "") if verdict else "–"
        row |= {"budget_to": told(method["figures"].get("budget_to")), "seconds": told(method["figures"]["seconds"])}
        row |= {name: told(method["figures"][name]) for name in ("area", "entropy", "length")}
        found.append(row)
    return found


def table(result: Mapping[str, Any]) -> Table:
    """Final pass@1 with its verdict, and that on learning speed (mean pass@1 over the budget), for a terminal of 80
    columns.
    """
    shown = Table("method", box=None, pad_edge=False)
    for name in ("pass@1", "difference", "verdict", "speed"):
        shown.add_column(name, justify="left" if name in ("verdict", "speed") else "right", no_wrap=True)
    for row in rows_of(result):
        value = row["pass@1"].split(" ")[0]
        shown.add_row(row["method"], value, row["d pass@1"], row["v pass@1"], row["v area"])
    return shown


def markdown(result: Mapping[str, Any]) -> str:
    """The table for a page of documentation, with the command that made it."""
    from tokencredit.studies.compare.verdicts import percent

    unit, reach = result["config"]["budget"]["unit"], percent(result["settings"]["reach"])
    heads = {
        "method": "method",
        "rate": "learning rate",
        "pass@1": "final pass@1",
        "d pass@1": "difference",
        "v pass@1": "verdict",
        "d area": "mean pass@1 over the budget, difference",
        "v area": "verdict",
        "budget_to": f"{unit} to {reach}",
        "d budget_to": "difference",
        "v budget_to": "verdict",
        "seconds": "training seconds",
    }
    lines = [f"| {' | '.join(heads.values())} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(row[key] for key in heads)} |" for row in rows_of(result)]
    target = f"{result['target']['value']:.3f}"
    along, last = result["prompts"]["marks"], result["prompts"]["final"]
    note = (
        f"`{result['command']}`: {result['config']['budget']['amount']:,g} {unit} per run, seeds"
        f" {', '.join(map(str, result['seeds']))}, {last} held-out prompts ({along} along the way); 95 % intervals over"
        f" seeds and prompts, differences from {result['baseline']} by seed, verdicts after Holm; {reach} of the"
        f" baseline's final pass@1 is {target}."
    )
    return "\n".join([*lines, "", note])
