"""`tokencredit dynamics ...`: every question about an update is one action, in a module that adds its own arguments."""

from __future__ import annotations

from typing import Any

from tokencredit.dynamics import attribute_command, entropy_command, kernel_command, noise_scale_command

ACTIONS = (entropy_command, attribute_command, noise_scale_command, kernel_command)
"""Modules with `add_action(actions)`."""


def add_parser(commands: Any) -> None:
    """Adds `dynamics` and its actions."""
    summary = "What an update does to entropy and reward, and which tokens did it."
    dynamics = commands.add_parser("dynamics", help=summary, description=summary)
    dynamics.set_defaults(run=lambda args: dynamics.print_help())
    actions = dynamics.add_subparsers(title="questions", metavar="")
    for module in ACTIONS:
        module.add_action(actions)
