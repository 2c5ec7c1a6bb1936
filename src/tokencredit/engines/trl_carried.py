"""What a trainer carries from one rollout batch to the next, as JSON beside the rest of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokencredit.durable import read_mapping, write_json
from tokencredit.engines.trainer import Trainer


def write_carried(trainer: Trainer, trial: Any, name: str, state: dict[str, Any]) -> None:
    """Into the checkpoint that was saved just now, by the process that saves; an empty state leaves no file."""
    if state and trainer.args.should_save:
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        write_json(folder / name, state)


def read_carried(checkpoint: str | Path | None, name: str) -> dict[str, Any]:
    """The state that a checkpoint holds; empty where it holds none. DamagedFile where it cannot be read."""
    path = None if checkpoint is None else Path(checkpoint) / name
    return read_mapping(path) if path is not None and path.exists() else {}
