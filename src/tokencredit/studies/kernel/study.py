"""Who moves whom in the next step of a run, from rollouts to the tables of senders, receivers and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokencredit import limits
from tokencredit.durable import write_parquet
from tokencredit.dynamics.batch import prompts_of
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.gradient_matrix import file_bytes, gradient_bytes
from tokencredit.dynamics.passes import room_of
from tokencredit.dynamics.vectors import large, trained
from tokencredit.studies import forecast
from tokencredit.studies.arguments import check_prompts, of_checkpoint, open_from, parameters_of, prompts_there
from tokencredit.studies.forecast import ALONG, BACKWARD
from tokencredit.studies.kernel.figures import study_of
from tokencredit.studies.kernel.measurement import check_step, measure
from tokencredit.studies.kernel.question import KernelConfig
from tokencredit.studies.options import identity
from tokencredit.studies.study import Work


def run(config: KernelConfig, work: Work) -> dict[str, Any]:
    """The whole study of a checkpoint: its blocks; pairs.parquet, senders.parquet, held_out.parquet."""
    check_prompts(config.policy, {"--prompts": config.prompts})
    check_prompts(config.policy, {"--held-out": config.held_out}, "test", least=2)
    c = open_from(config)
    there = tuple(prompts_there(c, split) for split in ("train", "test"))
    config = config.fitted(parameters_of(c), there, c.max_new_tokens, gradient_bytes(trained(c.model)))
    check_step(c, config.preconditioner)
    _check_disk(c, config, work.path)
    work.begin(**of_checkpoint(c), config=identity(config))
    c = c.filed(work.record.path)
    _foretell(c, config, work)
    measured = measure(c, config, work.stages, work.say)
    work.say("figures")
    study, tables = study_of(c, config, measured, work.book)
    for name, rows in tables.items():
        write_parquet(work.path / f"{name}.parquet", rows)
    return study | {
        "checkpoint": str(c.path),
        "step": c.step,
        "task": c.config.task,
        "method": c.method.name,
    }


def _most(c: Checkpoint, config: KernelConfig) -> int:
    """Bytes of gradients in files, at most: of completions twice where a method weighs their tokens differently."""
    if config.directions:
        return 0
    rollouts, held = config.prompts * config.group, config.held_out * config.samples
    each = (
        (rollouts * c.max_new_tokens, held * c.max_new_tokens)
        if config.level == "tokens"
        else (rollouts,) * 2 + (held,)
    )
    return sum(file_bytes(trained(c.model), num, room_of(c.model, c.policy.memory)) for num in each)


def _check_disk(c: Checkpoint, config: KernelConfig, folder: Path) -> None:
    """ValueError where the gradients of a large model may not fit on the disk; of a small one there are far fewer than
    the longest completions would have.
    """
    needed, free = _most(c, config), limits.free(folder)
    if large(trained(c.model)) and needed > free:
        raise ValueError(
            f"--prompts {config.prompts} --group {config.group} --held-out {config.held_out} --samples"
            f" {config.samples}: the gradients of {config.level} may take {needed / 2**30:,.0f} GiB of files in"
            f" {folder}, where {free / 2**30:,.0f} GiB are free. Ask for fewer, for whole completions (--sequences), or"
            " for a sketch (--directions 512), or name a directory with more room (--out)"
        )


def _foretell(c: Checkpoint, config: KernelConfig, work: Work) -> None:
    """The forecast: the step's gradient, forward passes along it and real steps, and a gradient, or a direction's pass,
    for what the kernel is between.
    """
    more, (sends, receives) = config.directions * ALONG, (2 * BACKWARD, BACKWARD)
    if config.directions:
        sends = receives = 0
    elif config.level == "tokens":
        sends = receives = 1 + c.max_new_tokens * (BACKWARD - 1)
    parts = (
        forecast.Drawn(config.prompts, config.group, 2 + BACKWARD + more, sends),
        forecast.Drawn(config.held_out, config.samples, 2 + 2 * ALONG + len(config.factors) + more, receives),
    )
    first = c.policy.encode_rows(prompts_of(c, 1, config.seed))[0]
    vectors, filed = (2, 3 + c.optimizer.decays) if c.scratch else (6, 0)
    work.tell(forecast.forecast(c, parts, vectors, first, filed, _most(c, config)))
