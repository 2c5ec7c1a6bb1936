"""A statement of the theory with its numeric check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """What a check found: figures by name, and the conditions that must all hold."""

    figures: dict[str, float]
    conditions: dict[str, bool]

    def __post_init__(self) -> None:
        if not self.conditions:
            raise ValueError("a check without conditions cannot fail: name at least one")

    @property
    def passed(self) -> bool:
        return all(self.conditions.values())

    @property
    def failed(self) -> list[str]:
        """Names of the conditions that do not hold."""
        return [name for name, holds in self.conditions.items() if not holds]


@dataclass(frozen=True)
class Statement:
    """A claim as its source makes it, what is true of it, and how that is checked.

    verdict   on the claim as stated: "true", "false", ...        sharp   the true form
    check     recomputes the counter-example and the true form; deterministic
    """

    key: str
    text: str
    verdict: str
    source: str
    sharp: str
    check: Callable[[], Check]

    def report(self) -> dict[str, Any]:
        """The statement with the outcome of its check, as JSON types."""
        found = self.check()
        told = {name: getattr(self, name) for name in ("text", "verdict", "source", "sharp")}
        return {
            **told,
            "figures": {k: float(v) for k, v in found.figures.items()},
            "conditions": {k: bool(v) for k, v in found.conditions.items()},
            "passed": found.passed,
        }
