"""An equal budget for unequal methods: a run ends when it has sampled, or trained for, so much, whatever a step of it
costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNITS = ("rollouts", "tokens", "seconds")


@dataclass(frozen=True)
class Budget:
    """`amount` of a unit, in `marks` equal parts: sampled rollouts or sampled tokens, those that dynamic sampling drops
    included, or seconds of generation, scoring and updates."""

    unit: str
    amount: float
    marks: int = 10

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Budget | None:
        """From {"rollouts": 5120} or {"tokens": 1e5, "marks": 20}; None where nothing is said. ValueError says what is
        meant.
        """
        given = [unit for unit in UNITS if unit in options]
        if not options:
            return None
        if len(given) != 1 or set(options) - {given[0], "marks"}:
            raise ValueError(
                f"budget takes one of {', '.join(UNITS)}, and marks, like {{rollouts: 5120}}; got {dict(options)}"
            )
        amount, marks = options[given[0]], options.get("marks", cls.marks)
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf:
            raise ValueError(f"budget.{given[0]} must be a positive number, got {amount!r}")
        if not isinstance(marks, int) or marks < 1:
            raise ValueError(f"budget.marks must be a whole number of at least 1, got {marks!r}")
        return cls(given[0], amount, marks)

    def mark(self, spent: Mapping[str, float]) -> int:
        """How many of the equal parts are spent."""
        return min(math.floor(spent[self.unit] / self.amount * self.marks + 1e-9), self.marks)
