"""`tokencredit dynamics attribute`: who causes the change of entropy and reward that the next step makes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from tokencredit.console import console
from tokencredit.studies.arguments import add_common, open_from

SUMMARY = (
    "Who causes the next step's change of entropy and reward, and what would other methods have done with the same"
    " rollouts?"
)
EXAMPLES = """examples:
  tokencredit dynamics attribute --run runs/grpo
  tokencredit dynamics attribute --run runs/grpo --checkpoint 20 --methods dapo gtpo "clip_cov(fraction=0.02)"
  tokencredit dynamics attribute --run runs/grpo --optimizer sgd --trees 0
  tokencredit dynamics attribute --run runs/grpo --pivotality runs/pivots"""


def add_action(actions: Any) -> None:
    """Adds `attribute` to the actions of `dynamics`."""
    p = actions.add_parser(
        "attribute",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run_command)
    add_common(p, out="runs/attribution")
    p.add_argument(
        "--methods",
        nargs="+",
        help=(
            "methods to compare on the same rollouts: names, name(field=value), or reprs "
            "(default: grpo, the covariance control, the entropy-shaped and the weighted ones, dapo)"
        ),
    )
    p.add_argument(
        "--baseline", default="grpo", help="the method that the others are compared with (default: %(default)s)"
    )
    for goal, size in (("entropy", "1024 4"), ("reward", "1024 8")):
        p.add_argument(
            f"--{goal}",
            type=int,
            nargs=2,
            metavar=("PROMPTS", "ROLLOUTS"),
            help=f"what the gradient of {goal} is estimated on, prompts and rollouts of each (default: {size})",
        )
    p.add_argument(
        "--trees",
        type=int,
        default=32,
        help="prompts with exact pivotality, on reckon; 0 for none (default: %(default)s)",
    )
    p.add_argument(
        "--pivotality",
        metavar="DIR",
        help="a run of `tokencredit pivotality run` on this checkpoint, in place of trees",
    )
    p.add_argument(
        "--bootstraps", type=int, default=1000, help="draws of prompts for the intervals (default: %(default)s)"
    )


def read_config(args: argparse.Namespace) -> Any:
    """The configuration that the arguments ask for."""
    from tokencredit.studies.attribution.study import AttributeConfig

    given = {
        name: tuple(value) for name in ("methods", "entropy", "reward") if (value := getattr(args, name)) is not None
    }
    same = ("prompts", "group", "baseline", "trees", "pivotality", "bootstraps", "seed")
    return AttributeConfig(**given, **{name: getattr(args, name) for name in same})


def run_command(args: argparse.Namespace) -> int:
    """Asks, prints the tables and writes the page."""
    from tokencredit.report import attribution as pages
    from tokencredit.studies.attribution.study import run

    config = read_config(args)
    with console.status("loading") as status:
        result = run(open_from(args), config, args.out, command=args.command_line, say=status.update)
    for table in (parts_table(result), methods_table(result)):
        console.print(table)
    for finding in result["findings"]:
        console.print(f"- {finding}", soft_wrap=True)
    page = pages.write(args.out, args.out / "report.html")
    console.print(f"Report: {page}; figures: {args.out / 'result.json'}", soft_wrap=True)
    return 0


def parts_table(result: Mapping[str, Any]) -> Any:
    """Who makes the change: momentum, decay, the step's own tokens, and of these successes and failures."""
    from rich.table import Table

    about, figures = result["about"], result["figures"]
    shown = Table(
        title=(
            f"The next step of {about['method']} at step {about['step']}, in thousandths; 95 % over evaluation prompts,"
            " of successes and failures over the step’s prompts"
        ),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for name in ("made by", "entropy (nats)", "reward"):
        shown.add_column(name, justify="left" if name == "made by" else "right")
    rows = {
        part: {goal: result["parts"][goal][part] for goal in result["parts"]}
        for part in ("momentum", "decay", "tokens")
    }
    rows |= {
        f"  of {name}": {goal: found[goal]["sum"] for goal in result["parts"]}
        for name, found in result["outcomes"].items()
    }
    rows["all"] = {goal: result["parts"][goal]["total"] for goal in result["parts"]}
    for name, row in rows.items():
        shown.add_row(name, *(cell(figures[row[goal]], 1e3) for goal in ("entropy", "reward")))
    return shown


def methods_table(result: Mapping[str, Any]) -> Any:
    """Every method's fresh part at the baseline's length: entropy, reward, and entropy kept per reward given up."""
    from rich.table import Table

    from tokencredit.dynamics.exchange import THIS

    figures = result["figures"]
    shown = Table(
        title=(
            f"Other methods on the same rollouts, without momentum, at the length of {result['about']['baseline']}’s"
            " step; in thousandths"
        ),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for name in ("method", "entropy", "reward", "exchange rate", "against the baseline"):
        shown.add_column(name, justify="right" if name in ("entropy", "reward") else "left")
    for each in result["methods"]:
        step = each["steps"]["equal"][THIS]
        rate = "" if step["difference"] is None else cell(figures[step["rate"]]) if step["rate"] else "not resolved"
        shown.add_row(
            each["name"], cell(figures[step["entropy"]], 1e3), cell(figures[step["reward"]], 1e3), rate, step["verdict"]
        )
    return shown


def cell(figure: Mapping[str, Any], scale: float = 1.0) -> str:
    return f"{scale * figure['value']:.3g} ({scale * figure['low']:.3g} to {scale * figure['high']:.3g})"
