"""Where an interrupted run goes on, and what is said when it cannot: the newest checkpoint that is whole and whose
records are all there.
"""

from __future__ import annotations

import errno
from pathlib import Path

import torch

from tokencredit.checkpoints import RESUMED, clear_after, damage, is_vouched, marked, newest, step_of, warn, whole
from tokencredit.durable import FULL, DamagedFile, WriteFailure
from tokencredit.runs import Run
from tokencredit.train_config import TrainConfig


def lost_its_end(run: Run, config: TrainConfig) -> bool:
    """Whether the checkpoint that a finished run ended with is there and damaged, or records before it are lost."""
    last = next(iter(marked(run.path / "checkpoints")), None)
    return last is not None and bool(damage(last) or missing_records(run, config, step_of(last)))


def place(run: Run, config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None for the start; what lies beyond it is out of the way afterwards.

    DamagedFile where the records cannot be read.
    """
    folder, found = run.path / "checkpoints", None
    for path in whole(folder, RESUMED):
        if lost := missing_records(run, config, step_of(path)):
            warn(f"{lost}, so training cannot go on from {path.name}: the checkpoint before it is used")
            continue
        found = path
        break
    clear_after(folder, step_of(found) if found else -1)
    return found


def missing_records(run: Run, config: TrainConfig, step: int) -> str | None:
    """Which records up to a step are not there; they were on the disk before the checkpoint was."""
    there = {record["step"] for record in run.metrics()}
    if absent := [each for each in range(1, step + 1) if each not in there]:
        return f"{run.path / 'metrics.jsonl'} has no record of step {absent[0]}"
    every = config.eval_every * config.updates * config.minibatches
    if every and not config.budget:
        there = {record["step"] for record in run.evaluations()}
        if absent := [each for each in range(0, step + 1, every) if each not in there]:
            return f"{run.path / 'evaluations.jsonl'} has no record of step {absent[0]}"
    return None


def explained(error: Exception, out: Path, restoring: Path | None) -> Exception | None:
    """What to tell in place of an error that training ended with; None where it speaks for itself.

    restoring   the checkpoint that was being read when it was raised; nobody but its mark can say that it is not that
    """
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if is_write_failure(error):
        kept = newest(out / "checkpoints", RESUMED)
        start = f"the checkpoint {kept.name}" if kept else "the start"
        remedy = "Make room" if is_full(error) else "Mend that"
        return WriteFailure(
            f"{out}: a file could not be written ({reason}). {remedy}, then run the same command again; it goes on from"
            f" {start}"
        )
    short_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if restoring is None or is_vouched(restoring) or short_of_memory:
        return None
    return DamagedFile(
        f"{restoring} cannot be read ({type(error).__name__}: {reason}). Remove that directory, then run the same"
        " command again; it goes on from the checkpoint before it"
    )


def is_write_failure(error: BaseException) -> bool:
    """A file that could not be written: by us, by Python, by safetensors, or by torch, which has no error of its own
    for it.
    """
    text, kind = str(error), type(error).__name__
    if isinstance(error, OSError):
        return isinstance(error, WriteFailure) or error.errno in {*FULL, errno.EROFS}
    if kind == "SafetensorError":
        return ("deserializ" not in text.lower() and "serializ" in text.lower()) or "os error" in text
    writer = "PytorchStreamWriter" in text or "inline_container" in text
    return isinstance(error, RuntimeError) and writer and "Reader" not in text


def is_full(error: BaseException) -> bool:
    """Whether room was what was missing; torch does not say, and it is the likely cause."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return "os error" not in str(error) or any(f"os error {number})" in str(error) for number in FULL)
