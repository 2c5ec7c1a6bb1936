"""The figures of a study, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokencredit.figure import Figure

if TYPE_CHECKING:
    from tokencredit.agreement.controls import Null
    from tokencredit.stats import Estimate


@dataclass
class Book:
    """Collects the figures of one study, which share its command and, unless told, its seed."""

    command: str
    seed: int
    figures: dict[str, Figure] = field(default_factory=dict)

    def enter(
        self,
        name: str,
        estimate: Estimate,
        unit: str,
        *,
        seed: int | Sequence[int] | None = None,
        label: str = "",
        **more: Any,
    ) -> str:
        """Enters a figure and answers its name."""
        seed = self.seed if seed is None else seed
        self.figures[name] = Figure.of(estimate, unit, seed=seed, command=self.command, label=label, more=more)
        return name

    def number(self, name: str, value: float, unit: str, num: int = 0) -> str:
        """Enters a number without an interval and answers its name."""
        self.figures[name] = Figure(value, unit=unit, num=num, seed=self.seed, command=self.command)
        return name

    def null(self, name: str, null: Null, unit: str = "correlation") -> str:
        """Enters the mean and central 95 % of a null distribution."""
        self.figures[name] = Figure(null.mean, null.low, null.high, unit, seed=self.seed, command=self.command)
        return name
