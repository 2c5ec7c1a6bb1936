"""A piece of work that nobody could do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lost:
    """In the place of what a piece of work would have given: why it gave nothing."""

    error: Exception
