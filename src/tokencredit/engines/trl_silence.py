"""What the TRL engine says once, where a batch trains less than it seems to: rewards without credit, and groups that
dynamic sampling could not replace.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from tokencredit.engines.trl_groups import GatheredBatch
from tokencredit.masked import zero_off
from tokencredit.method import Method, Plan
from tokencredit.rollouts import Rollouts
from tokencredit.silence import why_no_credit


def without_filler(plan: Plan, rollouts: Rollouts) -> Plan:
    """The plan without the tokens of groups that hold no two outcomes; the weights of the others stay what they are."""
    if plan.coefficient is None:
        return plan
    return Plan(plan.weight, zero_off(plan.coefficient, rollouts.mixed[:, None].expand_as(plan.coefficient)))


class Silence:
    """Warns once of each kind, on the main process."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._said: set[str] = set()

    def look(self, method: Method, batch: GatheredBatch, given: Tensor, credit: Tensor) -> None:
        """`given` [N, T] is the method's credit, `credit` what is left without filler."""
        if not self._speaks or {"credit", "filler"} <= self._said:
            return
        if why := why_no_credit(method, batch.rollouts, credit):
            self._say("credit", why)
        elif bool(((given != 0) & (credit == 0)).any()):
            left = batch.rollouts.group_index[~batch.rollouts.mixed].unique().numel()
            self._say(
                "filler",
                f"dynamic sampling used up its {max(len(batch.drawn), 1)} rounds: {left} groups of this batch hold only"
                f" successes or only failures. Rewards or lengths differ in them, and {method.name} would train on"
                " that; they are left without credit. Raise max_rounds, take prompts of moderate difficulty, or set"
                f" success_above (it is {batch.success_above:g}) between the rewards of a wrong and of a right answer",
            )

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, stacklevel=2)
