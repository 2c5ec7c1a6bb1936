"""Who moves whom in the next step of a run, from rollouts to the tables of senders, receivers and pairs."""

from __future__ import annotations

from typing import Any

from tokencredit.durable import write_parquet
from tokencredit.studies.arguments import open_from
from tokencredit.studies.kernel.figures import study_of
from tokencredit.studies.kernel.measurement import measure
from tokencredit.studies.kernel.question import KernelConfig
from tokencredit.studies.study import Work


def run(config: KernelConfig, work: Work) -> dict[str, Any]:
    """The whole study of a checkpoint: its blocks; pairs.parquet, senders.parquet, held_out.parquet."""
    checkpoint = open_from(config)
    work.begin(task=checkpoint.config.task, model=str(checkpoint.path), judge=checkpoint.task)
    measured = measure(checkpoint, config, work.stages, work.say)
    work.say("figures")
    study, tables = study_of(checkpoint, config, measured, work.book)
    for name, rows in tables.items():
        write_parquet(work.path / f"{name}.parquet", rows)
    return study | {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "task": checkpoint.config.task,
        "method": checkpoint.method.name,
    }
