"""How much of a work is one piece: done, sent and stored together, so that a kill costs seconds of work. It follows
from the model and where it is, so that a piece is the same whenever it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokencredit.lm.models import CausalModel

WORK, FASTER = 1 << 40, 1 << 10
"""Parameters x tokens that go together: half a minute of one core; an accelerator does so many times as much."""


def tokens_together(parameters: int, device: str) -> int:
    """Tokens that a model of so many parameters reads or writes before what came of them is stored."""
    return max(WORK * (1 if device == "cpu" else FASTER) // parameters, 1)


def together_of(model: CausalModel) -> int:
    """`tokens_together` of a model that is here."""
    return tokens_together(sum(p.numel() for p in model.parameters()), model.device.type)
