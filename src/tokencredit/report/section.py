"""What a section of the report is, and what its builder is given."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokencredit.runs import Run

NUM_COLOURS = 8


@dataclass(frozen=True)
class Section:
    """A heading, a body and, where a script draws it, data; `group` is what several sections of a page are about.

    `body` is HTML and its builder escapes every text in it with `text`. `data` is JSON for `script`, the name of a .js
    file of this package that calls `draw(script name, (element, data) => ...)` and names in its first line the files
    that it uses, `// uses: plot.js axes.js`. A script makes text with textContent alone, so that data can never become
    markup.
    """

    title: str
    body: str
    data: Any = None
    script: str | None = None
    group: str = ""

    @property
    def heading(self) -> str:
        return f"{self.group}: {self.title}" if self.group else self.title

    @property
    def anchor(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.heading.lower())


@dataclass(frozen=True)
class Material:
    """Everything a builder may read: the runs, and the figures that the studies computed."""

    runs: list[Run]
    curves: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: list[Run], curves: Mapping[str, Any]) -> Material:
        """The runs ordered as the methods are, then by seed."""
        order = list(cls(runs, curves).methods)
        return cls(sorted(runs, key=lambda run: (order.index(run.info["method_name"]), run.info["seed"])), curves)

    @property
    def methods(self) -> dict[str, Mapping[str, Any]]:
        """Method name -> what is known of it; the studies' order first, then the runs'."""
        described = {method["name"]: method for method in self.curves.get("methods", [])}
        return described | {
            run.info["method_name"]: {} for run in self.runs if run.info["method_name"] not in described
        }

    def label(self, method: str) -> str:
        return str(self.methods.get(method, {}).get("label") or method)

    def colour(self, method: str) -> int:
        """The index of the method's colour, the same in every section."""
        return [*self.methods, method].index(method) % NUM_COLOURS


def text(value: Any) -> str:
    """Any value as escaped text."""
    return html.escape(str(value), quote=True)


def scrolling(label: str, table: str) -> str:
    """A table that scrolls sideways within the page, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">{table}</div>'


def duration(seconds: float) -> str:
    """Seconds as a reader says them: 42 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def compact(value: Any, digits: int = 4) -> Any:
    """The value with floats at a few significant digits and None where they are not finite: what a page needs and no
    more.
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: compact(item, digits) for key, item in value.items()}
    return [compact(item, digits) for item in value] if isinstance(value, list | tuple) else value
