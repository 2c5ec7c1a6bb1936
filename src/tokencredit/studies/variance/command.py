"""`tokencredit study variance`: the command line of the variance study."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.table import Table

from tokencredit.console import console
from tokencredit.lm.arguments import add_policy, policy_config

SUMMARY = "Does weighting the tokens make the gradient less noisy, and at what bias?"
EXAMPLES = """examples:
  tokencredit study variance
  tokencredit study variance --runs runs/demo/grpo-0 --out runs/variance-grpo
  tokencredit study variance --methods gtpo ptw_entropy --prompts 128
  tokencredit study variance --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --prompts 64 --out runs/qwen-variance"""
COLUMNS = {"relative_variance": "noise", "truth_angle": "angle °", "ess": "ESS", "efficiency_ratio": "per token"}


def add_action(actions: Any) -> None:
    """Adds `variance` to the actions of `study`."""
    p = actions.add_parser(
        "variance",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run_command)
    p.add_argument("--out", type=Path, default=Path("runs/variance"), help="run directory (default: %(default)s)")
    add_policy(p)
    p.add_argument("--runs", nargs="*", help="training runs whose checkpoints are looked at as well")
    p.add_argument("--steps", nargs="*", type=int, help="which of their checkpoints (default: all)")
    p.add_argument("--methods", nargs="+", help="methods to compare (default: all weightings that the task can give)")
    p.add_argument("--baseline", help="the unweighted method (default: dapo)")
    p.add_argument(
        "--truth",
        choices=("auto", "exact", "rloo"),
        help=(
            "true policy gradient: from Q − V or from leave-one-out REINFORCE "
            "(default: auto, exact where there are prefix trees)"
        ),
    )
    p.add_argument("--prompts", type=int, help="prompts, two groups of rollouts each (default: 384)")
    p.add_argument("--group", type=int, help="rollouts of a group (default: 8)")
    p.add_argument("--batch", type=int, help="prompts of a step, for mean squared errors (default: 64)")
    p.add_argument(
        "--directions", type=int, help="random directions for larger models; 0 is exact (default: exact where it fits)"
    )
    p.add_argument("--seed", type=int, help="(default: 0)")


def read_config(args: argparse.Namespace) -> Any:
    """The configuration that the arguments ask for."""
    from tokencredit.studies.variance.plan import VarianceConfig

    names = {each.name for each in fields(VarianceConfig)}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in names and value is not None
    }
    return VarianceConfig(**given, policy=policy_config(args))


def run_command(args: argparse.Namespace) -> int:
    """Runs the study, prints its tables and writes its page."""
    from tokencredit.report import variance as pages
    from tokencredit.studies.variance.study import run

    config = read_config(args)
    with console.status("loading") as status:
        result = run(config, args.out, command=args.command_line, say=status.update)
    for block in result.study["checkpoints"]:
        console.print(table(result.figures, block, config))
    for finding in result.study["findings"]:
        console.print(f"- {finding}")
    page = pages.write(args.out, args.out / "report.html")
    console.print(f"Report: {page}; figures: {args.out / 'result.json'}")
    return 0


def table(figures: Mapping[str, dict], block: Mapping[str, Any], config: Any) -> Table:
    """One row per method of one checkpoint."""
    shown = Table(
        box=None,
        pad_edge=False,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        title=f"{block['label']}, {block['num']['prompts']} prompts, 95 % intervals over prompts",
        caption=(
            "noise: tr Cov / |mean|², prompts; angle: to the true policy gradient; ESS: rollouts of "
            f"{config.baseline} that one is worth, with bias; per token: signal per credited token, against "
            f"{config.baseline}; -: not resolved"
        ),
    )
    shown.add_column("method", no_wrap=True)
    for name in COLUMNS.values():
        shown.add_column(name, justify="right")
    for name, each in block["methods"].items():
        shown.add_row(
            name, *(_cell(figures[each["figures"][column]]) if each["figures"] else "-" for column in COLUMNS)
        )
    return shown


def _cell(figure: Mapping[str, float]) -> str:
    if math.isnan(figure["value"]):
        return "-"
    value, low, high = (_short(figure[key]) for key in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


def _short(x: float) -> str:
    return "∞" if math.isinf(x) else f"{x:.2g}" if abs(x) < 99.5 else f"{x:,.0f}"
