"""`tokencredit study ...` and `tokencredit dynamics ...`: every question is one action; `tokencredit inspect ...`."""

from __future__ import annotations

from typing import Any

from tokencredit.studies.inspect.question import STUDY as INSPECT
from tokencredit.studies.table import STUDIES
from tokencredit.theory import command as theory


def add_study(commands: Any) -> None:
    """Adds `study` and its actions."""
    actions = _add(commands, "study", "A study: one question, one result with intervals.")
    theory.add_action(actions)


def add_dynamics(commands: Any) -> None:
    """Adds `dynamics` and its actions."""
    _add(commands, "dynamics", "What an update does to entropy and reward, and which tokens did it.")


def add_inspect(commands: Any) -> None:
    """Adds `inspect`."""
    INSPECT.add_action(commands)


def _add(commands: Any, name: str, summary: str) -> Any:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=lambda args: parser.print_help())
    actions = parser.add_subparsers(title="questions", metavar="")
    for study in STUDIES.values():
        if study.group == name:
            study.add_action(actions)
    return actions
