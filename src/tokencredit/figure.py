"""A figure: one reported number with its interval, what it rests on, and how a reader sees it.

`stats.Estimate` is what an estimator answers; a figure is an estimate with a unit, and with the seed and the command
that make it again. This is its one form in a file, and its one form in text; `report.figures` has that of a page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokencredit.stats import Estimate

ENDS = ("value", "low", "high")


def number(value: float | None, form: str = "") -> str:
    """A number for a reader: a true minus sign, ∞, a dash for what is not defined.

    form   a format specification, like ".3g"; without one, three decimals below 10, one below 100, none above
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    form = form or (".3f" if size < 10 else ",.1f" if size < 100 else ",.0f")
    return format(value, form).replace("-", "−")


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval in a unit.

    low, high   NaN where no interval was taken, infinite where the data give no end
    num         independent units that it rests on (prompts, seeds); 0 with low = high = value: known exactly
    seed        of everything drawn for it; several, where it is over several
    command     that makes it again
    label       what it is, where its name does not say so
    more        what else is known of it: p, holm, over, note
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    num: int = 0
    seed: int | Sequence[int] | None = None
    command: str = ""
    label: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, estimate: Estimate, unit: str, **rest: Any) -> Figure:
        return cls(estimate.value, estimate.low, estimate.high, unit, estimate.num, **rest)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Figure:
        """A figure as it was written, by this version or an earlier one, which wrote an infinite number as null."""
        known = dict(stored)
        infinite = known.pop("infinite", {})
        ends: dict[str, Any] = {name: _number(infinite.get(name, known.pop(name, None))) for name in ENDS}
        own = {name: known.pop(name) for name in ("unit", "num", "seed", "command", "label") if name in known}
        return cls(**ends, **own, more=known)

    def as_json(self) -> dict[str, Any]:
        """value, low, high, unit, num, seed, command, label and `more`; what is empty is left out. JSON has no infinite
        number: value, low and high are null then, and `infinite` says which and of which sign.
        """
        ends = {name: getattr(self, name) for name in ENDS}
        infinite = {name: "+" if end > 0 else "-" for name, end in ends.items() if math.isinf(end)}
        own = {name: getattr(self, name) for name in ("unit", "seed", "command", "label")}
        own = {name: value for name, value in own.items() if value not in (None, "")}
        return {
            **{name: end if math.isfinite(end) else None for name, end in ends.items()},
            "num": self.num,
            **own,
            **self.more,
            **({"infinite": infinite} if infinite else {}),
        }

    @property
    def bounded(self) -> bool:
        """Is there an interval, with an end on one side at least? What is known exactly has none."""
        known = not self.num and self.low == self.high == self.value
        return (math.isfinite(self.low) or math.isfinite(self.high)) and not known

    @property
    def sign(self) -> int:
        """+1 or −1 where the interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def numbers(self, form: str = "", scale: float = 1.0, sign: bool = False) -> tuple[str, str]:
        """(value, interval) as text; no interval where there is none, or the value is not defined."""
        value, low, high = (number(scale * getattr(self, name), form) for name in ENDS)
        plus = "+" if sign and self.value > 0 else ""
        return plus + value, f"[{low}, {high}]" if self.bounded and not math.isnan(self.value) else ""

    def text(self, form: str = "", scale: float = 1.0, sign: bool = False) -> str:
        """value [low, high], each times `scale`, with a plus before a value above 0 where `sign` is asked for; see
        `number` for `form`.
        """
        return " ".join(filter(None, self.numbers(form, scale, sign)))

    def __str__(self) -> str:
        return self.text()


def _number(value: Any) -> float:
    return {None: math.nan, "+": math.inf, "-": -math.inf}.get(value, value)
