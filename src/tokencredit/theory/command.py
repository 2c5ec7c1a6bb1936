"""`tokencredit study theory`: the command line of the theory checks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tokencredit.console import add_command, errors
from tokencredit.console import console as terminal
from tokencredit.durable import plain, write_json

SUMMARY = "Claims about token gradients, weights, GTPO and GRPO: what is true of them, checked in seconds."
EXAMPLES = """examples:
  tokencredit study theory
  tokencredit study theory --only L1 T
  tokencredit study theory --json > theory.json"""


def add_action(actions: Any) -> None:
    """Adds `theory` to the actions of `study`."""
    p = add_command(actions, "theory", run_command, SUMMARY, EXAMPLES)
    p.add_argument("--only", nargs="+", metavar="NAME", help="statements to check, like L1 T (default: all)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.add_argument("--out", type=Path, help="also write the JSON to this file")


def run_command(args: argparse.Namespace) -> int:
    """Checks the statements; 1 where a check fails."""
    from tokencredit.theory.checks import run

    console = errors if args.json else terminal
    with console.status("checking") as status:
        found = run(args.only, say=status.update)
    result = {"command": args.command_line, **found}
    if args.json:
        print(json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        console.print(table(found, in_full=bool(args.only)))
        console.print("What is true instead: --only NAME. Figures: --json. Proofs and counter-examples: docs/theory.md")
    if args.out:
        write_json(args.out, result)
        console.print(f"Figures: {args.out}", soft_wrap=True)
    return 0 if found["passed"] else 1


def table(found: dict[str, Any], in_full: bool = False) -> Table:
    """Statement, verdict and whether the check passed; in full, with the true form and the figures."""
    shown = Table("", "statement", "verdict", "check", box=None, pad_edge=False)
    shown.columns[0].no_wrap = True
    for key, each in found["statements"].items():
        failed = [name for name, holds in each["conditions"].items() if not holds]
        told = Text(f"fails: {'; '.join(failed)}", style="bold red") if failed else Text("passes", style="green")
        lines = [each["sharp"], *(f"{name}: {value:.4g}" for name, value in each["figures"].items())] if in_full else []
        text = Text.assemble(each["text"], *((f"\n{line}", "dim") for line in lines))
        shown.add_row(Text(key, style="bold"), text, Text(each["verdict"]), told)
    return shown
