"""`tokencredit study ...`: every study is one action, in a module that adds its own arguments."""

from __future__ import annotations

from typing import Any

from tokencredit.studies import compare_command, correlation_command, variance_command
from tokencredit.studies.theory import command as theory_command

ACTIONS = (correlation_command, compare_command, theory_command, variance_command)
"""Modules with `add_action(actions)`."""


def add_parser(commands: Any) -> None:
    """Adds `study` and its actions."""
    summary = "A study: one question, one result with intervals."
    study = commands.add_parser("study", help=summary, description=summary)
    study.set_defaults(run=lambda args: study.print_help())
    actions = study.add_subparsers(title="studies", metavar="")
    for module in ACTIONS:
        module.add_action(actions)
