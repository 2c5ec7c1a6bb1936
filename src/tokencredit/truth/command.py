"""`tokencredit world truth | judge`: what is known of every token, and how far an estimator is from it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencredit.console import add_command, console
from tokencredit.lm.arguments import add_policy, policy_config

if TYPE_CHECKING:
    from tokencredit.truth.judge import Judgement

TRUTH_EXAMPLES = """examples:
  tokencredit world truth --out truth
  tokencredit score --data truth/traces.parquet --scores entropy surprisal --out scores.parquet
  tokencredit pivotality run --traces truth --rollouts 8 --out runs/eight
  tokencredit world judge truth scores.parquet runs/eight"""
JUDGE_EXAMPLES = """examples:
  tokencredit world judge truth estimates.parquet
  tokencredit world judge truth runs/eight scores.parquet --spent 0 --out judged.json"""


def add_parsers(actions: Any) -> None:
    """Adds both to the actions of `tokencredit world`."""
    summary = "Completions of the embedded world with what is exactly known of every token."
    p = add_command(actions, "truth", _truth, summary, TRUTH_EXAMPLES)
    p.add_argument("--out", type=Path, required=True, help="directory of traces.parquet, truth.parquet and truth.json")
    p.add_argument("--prompts", type=int, default=32, help="different prompts (default: %(default)s)")
    p.add_argument("--samples", type=int, default=2, help="completions of each (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of prompts and completions (default: %(default)s)")
    p.add_argument(
        "--eps",
        type=float,
        default=1e-6,
        help="prefixes that are reached more rarely are not followed (default: %(default)s)",
    )
    p.add_argument(
        "--no-gradients",
        action="store_true",
        help="leave out gradient norms, Fisher traces and changes by a step, which take most of the time",
    )
    add_policy(p)
    summary = "How far estimates of tokens are from the truth, at the tokens they spent."
    p = add_command(actions, "judge", _judge, summary, JUDGE_EXAMPLES)
    p.add_argument("truth", type=Path, help="directory that `tokencredit world truth` wrote")
    p.add_argument(
        "estimates",
        type=Path,
        nargs="+",
        help="Parquet or JSONL: trace, position and columns called as the truth's, with NAME_low and NAME_high where"
        " there are intervals; any other column is a score, which puts tokens in an order; or a directory that"
        " `tokencredit pivotality run` wrote",
    )
    p.add_argument("--columns", nargs="+", metavar="NAME", help="which columns to judge (default: all)")
    p.add_argument("--spent", type=int, help="tokens that were sampled for the estimates (default: as a run says)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap over prompts (default: %(default)s)")
    p.add_argument("--out", type=Path, help="also write the judgements to this JSON file")


def _truth(args: argparse.Namespace) -> int:
    from tokencredit.truth.table import write_truth

    policy = policy_config(args).settled().open()
    command = getattr(args, "command_line", "tokencredit world truth")
    about = write_truth(
        policy,
        args.out,
        prompts=args.prompts,
        samples=args.samples,
        seed=args.seed,
        eps=args.eps,
        command=command,
        gradients=not args.no_gradients,
    )
    console.print(
        f"{about['tokens']} tokens of {about['completions']} completions of {about['prompts']} prompts; V is known to"
        f" {about['width']['mean']:.2g} on average, {about['width']['largest']:.2g} at most: {args.out}",
        soft_wrap=True,
    )
    return 0


def _judge(args: argparse.Namespace) -> int:
    from tokencredit.durable import write_json
    from tokencredit.truth.estimates import read_estimates
    from tokencredit.truth.judge import KnownTruth, judge

    truth = KnownTruth.read(args.truth)
    estimates = [read_estimates(path, truth.places, args.spent) for path in args.estimates]
    found = [each for some in estimates for each in judge(truth, some, seed=args.seed)]
    if args.columns:
        there = sorted({each.column for each in found})
        if missing := [name for name in args.columns if name not in there]:
            raise ValueError(f"--columns {missing[0]}: the estimates have {', '.join(there)}")
        found = [each for each in found if each.column in args.columns]
    console.print(_table(found))
    if args.out:
        about = {"command": getattr(args, "command_line", "tokencredit world judge"), "seed": args.seed}
        write_json(args.out, about | {"judgements": [each.as_json() for each in found]})
    return 0


def _table(found: list[Judgement]) -> Any:
    from tokencredit.progress import plain_table
    from tokencredit.truth.judge import MEASURES

    table = plain_table(
        "against the truth; 95 % intervals by prompt", "=estimator", "=column", ">tokens", ">spent", *MEASURES
    )
    for each in found:
        spent = "–" if each.spent is None else f"{each.spent:,}"
        figures = [each.figures[name].text() if name in each.figures else "–" for name in MEASURES]
        table.add_row(each.estimator, each.column, f"{each.tokens:,}", spent, *figures)
    return table
