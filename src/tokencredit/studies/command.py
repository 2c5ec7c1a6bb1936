"""`tokencredit study ...` and `tokencredit dynamics ...`: every question is one action, in a module that adds its own
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tokencredit.studies.attribution import command as attribute
from tokencredit.studies.compare import command as compare
from tokencredit.studies.correlation import command as correlation
from tokencredit.studies.entropy import command as entropy
from tokencredit.studies.kernel import command as kernel
from tokencredit.studies.noise_scale import command as noise_scale
from tokencredit.studies.theory import command as theory
from tokencredit.studies.variance import command as variance


def add_study(commands: Any) -> None:
    """Adds `study` and its actions."""
    _add(
        commands, "study", "A study: one question, one result with intervals.", (correlation, compare, theory, variance)
    )


def add_dynamics(commands: Any) -> None:
    """Adds `dynamics` and its actions."""
    _add(
        commands,
        "dynamics",
        "What an update does to entropy and reward, and which tokens did it.",
        (entropy, attribute, noise_scale, kernel),
    )


def _add(commands: Any, name: str, summary: str, modules: Sequence[ModuleType]) -> None:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=lambda args: parser.print_help())
    actions = parser.add_subparsers(title="questions", metavar="")
    for module in modules:
        module.add_action(actions)
