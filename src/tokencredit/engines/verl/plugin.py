"""The entry point `verl.plugins`: verl imports this module in every process, its Ray workers included.

Nothing of verl is imported here: losses and trainers are registered when verl itself imports the modules that hold the
registries, so that a worker pays for neither. verl logs a plugin's errors at DEBUG and goes on; here they are printed.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from types import ModuleType

from tokencredit import __version__
from tokencredit.engines.after_import import after_import

VERSIONS = ((0, 9), (0, 10))
"""verl from the first on, and below the second."""


def check_version(version: str) -> None:
    """ImportError outside of the versions that the plugin was written for."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    low, high = (".".join(map(str, bound)) for bound in VERSIONS)
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        raise ImportError(
            f"tokencredit {__version__} works with verl from {low} to below {high}, here is verl {version}: pip install"
            " 'verl>=0.9,<0.10'"
        )


def register() -> None:
    """Asks for losses and trainers to be registered as soon as verl has the registries."""
    after_import("verl.trainer.ppo.core_algos", told(_losses))
    after_import("verl.trainer.ppo.v1", told(_trainers))


def told(call: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """The call, whose error is printed before whoever swallows it can."""

    def loud(module: ModuleType) -> None:
        try:
            call(module)
        except Exception:
            print(f"tokencredit {__version__}: its plugin for verl failed", file=sys.stderr)
            traceback.print_exc()
            raise

    return loud


def _losses(core_algos: ModuleType) -> None:
    import verl

    from tokencredit.engines.verl.losses import register_losses

    check_version(verl.__version__)
    register_losses(core_algos)


def _trainers(module: ModuleType) -> None:
    import tokencredit.engines.verl.trainers  # noqa: F401


register()
