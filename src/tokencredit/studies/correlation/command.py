"""`tokencredit study correlation`: the command line of the correlation study."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.table import Table

from tokencredit.console import console
from tokencredit.lm.arguments import add_policy, policy_config

SMALL = {"prompts": 12, "rollouts": 8, "bootstraps": 200, "condition_prompts": 12, "temperatures": (1.0,)}
SUMMARY = "Is entropy, or another proxy, a good guess of a token's effect on correctness?"
EXAMPLES = """examples:
  tokencredit study correlation
  tokencredit study correlation --runs runs/demo/grpo-0 --out runs/correlation-grpo
  tokencredit study correlation --small --policy no-wording=my_base
  tokencredit study correlation --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --prompts 32 --out runs/qwen"""


def add_action(actions: Any) -> None:
    """Adds `correlation` to the actions of `study`."""
    p = actions.add_parser(
        "correlation",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run_command)
    p.add_argument("--out", type=Path, default=Path("runs/correlation"), help="run directory (default: %(default)s)")
    p.add_argument(
        "--small", action="store_true", help="a quarter of the prompts, half the rollouts, three temperatures"
    )
    add_policy(p)
    p.add_argument("--prompts", type=int, help="held-out prompts (default: 96)")
    p.add_argument("--completions", type=int, help="completions of every prompt (default: 2)")
    p.add_argument("--rollouts", type=int, help="rollouts of alternatives at every token (default: 32)")
    p.add_argument(
        "--proxies", nargs="+", help="kinds of `tokencredit.lm.importance` (default: all that need no reference model)"
    )
    p.add_argument(
        "--exact", choices=("auto", "yes", "no"), help="exact effects from prefix trees (default: auto, on reckon)"
    )
    p.add_argument("--threshold", type=float, help="|effect| from which a token is pivotal (default: 0.2)")
    p.add_argument(
        "--temperatures", type=float, nargs="*", help="conditions of the model (default: 0.5 0.75 1 1.25 1.5)"
    )
    p.add_argument(
        "--policy", action="append", default=[], metavar="LABEL=PATH", help="a further policy to compare; repeatable"
    )
    p.add_argument("--runs", nargs="*", help="training runs whose checkpoints are compared")
    p.add_argument("--condition-prompts", type=int, help="prompts of every condition (default: 64)")
    p.add_argument("--bootstraps", type=int, help="draws of prompts for the intervals (default: 1000)")
    p.add_argument("--seed", type=int, help="(default: 0)")


def read_config(args: argparse.Namespace) -> Any:
    """The configuration that the arguments ask for."""
    from tokencredit.studies.correlation.study import CorrelationConfig

    names = {each.name for each in fields(CorrelationConfig)}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in names and value is not None
    }
    if wrong := [text for text in args.policy if "=" not in text]:
        raise ValueError(f"--policy takes LABEL=PATH, not {wrong[0]!r}")
    given["policy"] = policy_config(args)
    given["policies"] = dict(text.split("=", 1) for text in args.policy)
    return CorrelationConfig(**((SMALL if args.small else {}) | given))


def run_command(args: argparse.Namespace) -> int:
    """Runs the study, prints its table and writes its page."""
    from tokencredit.report import correlation as pages
    from tokencredit.studies.correlation.study import run

    config = read_config(args)
    with console.status("loading") as status:
        result = run(config, args.out, command=args.command_line, say=status.update)
    console.print(table(result))
    for finding in result.study["findings"]:
        console.print(f"- {finding}")
    page = pages.write(args.out, args.out / "report.html")
    console.print(f"Report: {page}; figures: {args.out / 'result.json'}")
    return 0


def table(result: Any) -> Table:
    """Share of the squared effects in the top tokens of every proxy, by estimand: exact where it is known, else from
    rollouts.
    """
    source = "exact" if result.study["exact"] else "sampled"
    blocks = {name: block["measures"]["captured"] for name, block in result.study[source].items()}
    shown = Table(
        title="Share of the squared effects in the tokens that a proxy ranks highest, 95 % intervals over prompts",
        title_justify="left",
        title_style="bold",
    )
    shown.add_column("proxy", no_wrap=True)
    for name in blocks:
        shown.add_column(name, justify="right", no_wrap=True)
    for proxy in dict.fromkeys(proxy for block in blocks.values() for proxy in block):
        shown.add_row(proxy, *(_cell(result.figures, block.get(proxy)) for block in blocks.values()))
    return shown


def _cell(figures: dict, name: str | None) -> str:
    figure = figures[name] if name else None
    return f"{figure['value']:.2f} ({figure['low']:.2f}-{figure['high']:.2f})" if figure else "-"
