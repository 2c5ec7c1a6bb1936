"""tokencredit: which tokens deserve the credit?

    rollouts = tokencredit.Rollouts(reward=reward, group=group, mask=mask, scores={"entropy": entropy})
    method = tokencredit.METHODS["gtpo"]
    credit = method.credit(rollouts)
    loss, stats = method.loss(logprob=logprob, old_logprob=old_logprob, credit=credit, rollouts=rollouts)

These names need torch alone, and import it when they are first used; models, tasks, engines and reports have modules of
their own.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokencredit.credit import Chain, Transform
    from tokencredit.method import Method, Plan
    from tokencredit.methods import METHODS
    from tokencredit.rollouts import Rollouts

__version__ = "0.1.0"
__all__ = ["METHODS", "Chain", "Method", "Plan", "Rollouts", "Transform", "__version__"]

_HOMES = {
    "Rollouts": "rollouts",
    "Chain": "credit",
    "Transform": "credit",
    "METHODS": "methods",
    "Method": "method",
    "Plan": "method",
}


def __getattr__(name: str):
    if name in ("rollouts", "masked", "credit", "objective", "method", "methods", "testing", "stats"):
        return import_module(f"tokencredit.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'tokencredit' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"tokencredit.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
