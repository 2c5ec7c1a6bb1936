"""The figures of a study, by name: {value, low, high, unit, num, seed, command}."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokencredit.agreement.controls import Null
from tokencredit.stats import Estimate


@dataclass
class Book:
    """Collects the figures of one study."""

    command: str
    seed: int
    figures: dict[str, dict] = field(default_factory=dict)

    def enter(self, name: str, estimate: Estimate, unit: str, **more: Any) -> str:
        """Enters a figure and answers its name."""
        self.figures[name] = {
            "value": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "unit": unit,
            "num": estimate.num,
            "seed": self.seed,
            "command": self.command,
            **more,
        }
        return name

    def null(self, name: str, null: Null, unit: str = "correlation") -> str:
        """Enters the mean and central 95 % of a null distribution."""
        return self.enter(name, Estimate(null.mean, null.low, null.high, 0), unit)
