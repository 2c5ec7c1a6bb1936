"""What scorers and the parts of the TRL engine ask of the trainer that they serve."""

from __future__ import annotations

from typing import Any, Protocol

from tokencredit.lm.models import CausalModel
from tokencredit.lm.room import beside_training


class Trainer(Protocol):
    """A `CreditTrainer`, or any GRPOTrainer of TRL's: the parts that are used by name, and the rest as TRL has it."""

    model: CausalModel
    args: Any
    state: Any
    accelerator: Any
    temperature: float
    record: Any
    record_every: int

    def __getattr__(self, name: str) -> Any: ...


def memory_beside(trainer: Trainer, model: CausalModel) -> int | None:
    """The memory, as `lm.room.Room.of` takes it, of what is measured while the trainer trains this model; None where
    nobody limits it.
    """
    memory = getattr(trainer, "memory", None)
    return None if memory is None else beside_training(model, memory)
