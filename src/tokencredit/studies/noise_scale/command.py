"""`tokencredit dynamics noise-scale`: how noisy a checkpoint's gradient is, where the noise comes from, and the best
batch for the cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from tokencredit.console import console
from tokencredit.exclusive import exclusive
from tokencredit.studies.arguments import add_common, open_from

SUMMARY = "How noisy is a checkpoint's gradient, and how should prompts and rollouts share the budget?"
EXAMPLES = """examples:
  tokencredit dynamics noise-scale --run runs/demo/grpo-0
  tokencredit dynamics noise-scale --run runs/demo/grpo-0 --checkpoint 20 --prompts 256 --cost-prompt 4
  tokencredit dynamics noise-scale --run Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --prompts 32"""


def add_action(actions: Any) -> None:
    """Adds `noise-scale` to the actions of `dynamics`."""
    p = actions.add_parser(
        "noise-scale",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run_command)
    add_common(p, out="runs/noise-scale", optimizer=False)
    p.add_argument("--cost-prompt", type=float, default=0.0, help="cost of a prompt, its rollouts apart (default: 0)")
    p.add_argument("--cost-rollout", type=float, default=1.0, help="cost of one rollout (default: 1)")
    p.add_argument("--budget", type=float, help="cost of a batch (default: that of the run's own batch)")


def run_command(args: argparse.Namespace) -> int:
    """Measures, prints the figures and the advice, writes result.json, grid.parquet and the page."""
    from tokencredit.report import noise_scale as pages
    from tokencredit.runs import write_json
    from tokencredit.studies.noise_scale.result import ask, write_grid

    check(args)
    with exclusive(args.out), console.status("loading") as status:
        checkpoint = open_from(args)
        status.update(f"{args.prompts} prompts x {args.group} rollouts")
        result = ask(
            checkpoint,
            args.prompts,
            args.group,
            args.seed,
            cost_prompt=args.cost_prompt,
            cost_rollout=args.cost_rollout,
            budget=args.budget,
        )
        result["command"] = args.command_line
        write_json(args.out / "result.json", result)
        if result["grid"]:
            write_grid(args.out / "grid.parquet", result["grid"])
    page = pages.write(args.out, args.out / "report.html")
    console.print(table(result))
    for line in result["findings"]:
        console.print(f"- {line}", soft_wrap=True)
    if result["grid"]:
        console.print(grid_table(result))
    console.print(f"Report: {page}; figures: {args.out / 'result.json'}", soft_wrap=True)
    return 0


def check(args: argparse.Namespace) -> None:
    """ValueError, before a model is loaded, for numbers that cannot give an answer."""
    if args.prompts < 3:
        raise ValueError(f"--prompts must be at least 3 for an interval, got {args.prompts}; 64 or more are useful")
    if args.group < 2:
        raise ValueError(
            f"--group must be at least 2, got {args.group}: a rollout is compared with the others of its prompt. From 4"
            " on the noise is also split between prompts and rollouts"
        )
    if args.cost_prompt < 0 or args.cost_rollout <= 0:
        raise ValueError(
            f"--cost-rollout must be above 0 and --cost-prompt not below it, got {args.cost_rollout:g},"
            f" {args.cost_prompt:g}"
        )


def table(result: Mapping[str, Any]) -> Any:
    """The figures with their intervals."""
    from rich.table import Table

    shown = Table(
        title=(
            f"Gradient noise of {result['method']} at {result['checkpoint']}, {result['prompts']} prompts x"
            f" {result['group']} rollouts, seed {result['seed']}"
        ),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for name in ("figure", "value", "95 %, by prompt", "unit"):
        shown.add_column(name, justify="right" if name in ("value", "95 %, by prompt") else "left")
    for figure in result["figures"].values():
        ends = f"{short(figure['low'])} to {short(figure['high'])}"
        shown.add_row(figure["label"], short(figure["value"]), ends, figure["unit"])
    return shown


def grid_table(result: Mapping[str, Any]) -> Any:
    """Predicted variance by prompts and rollouts, that of the run's own batch being 1."""
    from rich.table import Table

    grid = result["grid"]
    groups, prompts = (sorted({row[name] for row in grid}) for name in ("group", "prompts"))
    shown = Table(
        title=(
            "Predicted variance with leave-one-out credit, the run's own batch = 1; prompts across, rollouts of each"
            " down"
        ),
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    shown.add_column("", justify="right")
    for number in prompts:
        shown.add_column(str(number), justify="right")
    cell = {(row["group"], row["prompts"]): row["relative"] for row in grid}
    for number in groups:
        shown.add_row(str(number), *(short(cell[number, each]) for each in prompts))
    return shown


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
