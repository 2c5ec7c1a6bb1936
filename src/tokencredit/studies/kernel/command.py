"""`tokencredit dynamics kernel`: who moves whom in the next step, and whether real steps agree."""

from __future__ import annotations

import argparse
from typing import Any

from tokencredit.console import console
from tokencredit.lm.arguments import policy_config
from tokencredit.studies.arguments import add_common, open_from

SUMMARY = "Who moves whom: the Fisher kernel of the rollouts a step learns from, and its influence against real steps."
EXAMPLES = """examples:
  tokencredit dynamics kernel --run runs/demo/grpo-0
  tokencredit dynamics kernel --run runs/demo/grpo-0 --checkpoint 20 --sequences
  tokencredit dynamics kernel --run runs/demo/grpo-0 --preconditioner identity
  tokencredit dynamics kernel --run runs/qwen --sequences --directions 512 --prompts 16"""


def add_action(actions: Any) -> None:
    """Adds `kernel` to the actions of `dynamics`."""
    p = actions.add_parser(
        "kernel",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run_command)
    add_common(p, out="runs/kernel")
    p.add_argument(
        "--preconditioner",
        choices=("adamw", "identity"),
        default="adamw",
        help="of the step: AdamW's, or none, which is plain gradient descent (default: %(default)s)",
    )
    level = p.add_mutually_exclusive_group()
    level.add_argument("--tokens", action="store_const", const="tokens", dest="level", help="between tokens (default)")
    level.add_argument(
        "--sequences", action="store_const", const="sequences", dest="level", help="between whole completions"
    )
    p.add_argument(
        "--directions",
        type=int,
        default=0,
        metavar="K",
        help="sketch with K random directions, where exact gradients are too large; 256 or more (default: exact)",
    )
    p.add_argument(
        "--held-out", type=int, default=32, help="prompts on which real steps are compared (default: %(default)s)"
    )
    p.add_argument("--samples", type=int, default=2, help="completions of each of these (default: %(default)s)")


def run_command(args: argparse.Namespace) -> int:
    """Runs the study, prints its tables and writes its page."""
    from tokencredit.report import kernel as pages
    from tokencredit.studies.kernel.study import KernelConfig, run

    config = KernelConfig(
        policy_config(args),
        args.checkpoint,
        args.method,
        args.optimizer,
        args.preconditioner,
        args.level or "tokens",
        args.directions,
        args.prompts,
        args.group,
        args.held_out,
        args.samples,
        seed=args.seed,
    )
    with console.status("loading") as status:
        result = run(open_from(args), config, args.out, command=args.command_line, say=status.update)
    for table in tables(result):
        console.print(table)
    for finding in result.study["findings"]:
        console.print(f"- {finding}", soft_wrap=True)
    page = pages.write(args.out, args.out / "report.html")
    console.print(f"Report: {page}; figures: {args.out / 'result.json'}", soft_wrap=True)
    return 0


def tables(result: Any) -> list[Any]:
    """R² by learning rate, and the parts of a predicted change."""
    from rich.table import Table

    figures, study = result.figures, result.study
    first = Table(
        title="Real steps against the prediction, held-out log-probabilities",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    words = {"r2_fresh": "the batch's part", "slope": "real / predicted", "r2_completions": "completions"}
    columns = [name for name in words if name in study["influence"]["rates"][0]]
    for name in ("of the rate", "R², 95 % by prompt", *(words[name] for name in columns)):
        first.add_column(name, justify="right", no_wrap=True)
    for row in study["influence"]["rates"]:
        rest = (f"{figures[row[name]]['value']:.4f}" for name in columns)
        first.add_row(f"{row['factor']:g}", cell(figures[row["r2"]], 4), *rest)
    if not study["shares"]:
        return [first]
    second = Table(
        title="Who makes the predicted change of the tokens that send", title_justify="left", box=None, pad_edge=False
    )
    for name in ("sender", "share of the squared change, 95 % by prompt"):
        second.add_column(name)
    for name, figure in study["shares"].items():
        if name.startswith("share/") and name.count("/") == 1:
            second.add_row(name.split("/")[1], cell(figures[figure]))
    return [first, second]


def cell(figure: dict[str, Any], digits: int = 3) -> str:
    """Value and interval; a dash for what is not defined."""
    import math

    shown = [
        f"{x:.{digits}f}" if x is not None and math.isfinite(x) else "-"
        for x in (figure["value"], figure["low"], figure["high"])
    ]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
