"""`tokencredit dynamics entropy`: does the change of entropy that is predicted of the next step come true?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tokencredit.console import console
from tokencredit.lm.arguments import policy_config
from tokencredit.studies.arguments import add_common

SUMMARY = "How does the next step change entropy, as predicted and in truth, over two decades of learning rates?"
EXAMPLES = """examples:
  tokencredit dynamics entropy --run runs/demo/grpo-0
  tokencredit dynamics entropy --run runs/grpo --checkpoint 40 --updates 16 --workers 4
  tokencredit dynamics entropy --run runs/grpo --small
  tokencredit dynamics entropy --run runs/sft --optimizer sgd"""
SMALL = {"updates": 4, "eval_prompts": 2048, "sweep_prompts": 256}


def add_action(actions: Any) -> None:
    """Adds `entropy` to the actions of `dynamics`."""
    p = actions.add_parser(
        "entropy",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run_command)
    add_common(p, out="runs/entropy")
    p.add_argument(
        "--small",
        action="store_true",
        help="half the updates on a quarter of the prompts: one minute in place of several",
    )
    p.add_argument("--updates", type=int, help="steps that are looked at, each on a batch of its own (default: 8)")
    p.add_argument("--rates", type=int, help="learning rates of the sweep (default: 12)")
    p.add_argument("--decades", type=float, help="that they span, half of one above the optimizer's own (default: 2)")
    p.add_argument(
        "--eval-prompts", type=int, help="prompts, with one rollout each, that a prediction is made on (default: 8192)"
    )
    p.add_argument(
        "--fresh", type=int, help="fresh rollouts of each of them, on either side of the policy (default: 2)"
    )
    p.add_argument("--sweep-prompts", type=int, help="prompts at the other learning rates (default: 1024)")
    p.add_argument("--sweep-fresh", type=int, help="fresh rollouts of each of these (default: 1)")
    p.add_argument(
        "--sub-batch", type=int, help="rollouts of the small predictions whose spread is shown (default: 256)"
    )
    p.add_argument("--workers", type=int, help="updates side by side (default: one per core, at most 4; 1 on a GPU)")


def read_config(args: argparse.Namespace) -> Any:
    """The configuration that the arguments ask for."""
    from tokencredit.studies.entropy.study import SweepConfig

    names = {each.name for each in fields(SweepConfig)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    return SweepConfig(**((SMALL if args.small else {}) | given | {"policy": policy_config(args)}))


def run_command(args: argparse.Namespace) -> int:
    """Runs the study, prints its tables and writes its page."""
    from tokencredit.report import entropy as pages
    from tokencredit.studies.entropy.study import run

    with console.status("loading") as status:
        result = run(read_config(args), args.out, workers=args.workers, command=args.command_line, say=status.update)
    for each in (updates_table(result), figures_table(result)):
        console.print(each)
    for finding in result["findings"]:
        console.print(f"- {finding}", soft_wrap=True)
    page = pages.write(args.out, args.out / "report.html")
    console.print(f"Report: {page}; figures: {args.out / 'result.json'}", soft_wrap=True)
    return 0


def updates_table(result: Mapping[str, Any]) -> Any:
    """Every update: predicted, and by fresh samples."""
    shown = _table(
        "Change of mean token entropy by the next step, in thousandths of a nat, learning rate"
        f" {result['about']['lr']:g}"
    )
    for name in ("update", "linear", "true, odd half", "quadratic", "true, whole"):
        shown.add_column(name, justify="right")
    for k, update in enumerate(result["updates"], start=1):
        names = [update[name] for name in ("linear", "true", "quadratic", "true_whole")]
        shown.add_row(str(k), *(_cell(result["figures"][name], 1e3) for name in names))
    return shown


def figures_table(result: Mapping[str, Any]) -> Any:
    """The figures of the whole study."""
    shown = _table("Over all updates")
    for name in ("figure", "value (95 %, by prompt)", "unit"):
        shown.add_column(name)
    names = [
        "slope",
        "r2",
        "relative_error_mean",
        f"relative_error_spread_{result['sub_batch']}",
        "precision_floor",
        "linear_range",
    ]
    for name in names:
        shown.add_row(name, _cell(result["figures"][name], digits=4), result["figures"][name]["unit"])
    return shown


def _table(title: str) -> Any:
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _cell(figure: Mapping[str, Any], scale: float = 1.0, digits: int = 3) -> str:
    low, high = figure["low"], figure["high"]
    ends = "" if low is None or low != low else f" ({scale * low:.{digits}g} to {scale * high:.{digits}g})"
    return f"{scale * figure['value']:.{digits}g}{ends}"
