"""What several processes that train together must agree on, and what they cannot do: asked of their launcher before a
model is loaded, and of the trainer when it is made.

A launcher (torchrun, `accelerate launch`) starts the processes and numbers them in the environment; accelerate joins
them. Where it does not, each would train alone and none would say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tokencredit.engines.trainer import Trainer
from tokencredit.method import Method

LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "NCCL", "Socket closed", "gloo")
"""What torch says where a process that it waits for is gone."""


def num_processes() -> int:
    """How many processes train together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that speaks and records, as their launcher says."""
    return os.environ.get("RANK", "0") == "0"


def refuse_strangers(trainer: Trainer) -> None:
    """ValueError where a launcher started several processes and the trainer knows of one, or where they were asked to
    share the model's parameters and each holds them all.
    """
    launched, joined = num_processes(), trainer.accelerator.num_processes
    if launched > 1 and joined == 1:
        raise ValueError(
            f"the launcher started {launched} processes (WORLD_SIZE={launched}), but each would train alone: accelerate"
            f" joins none on the device {trainer.accelerator.device}. On CPUs set GRPOConfig(use_cpu=True), or --device"
            " cpu of `tokencredit train`; with GPUs start no more processes than there are, on a torch that sees them"
        )
    asked = {
        "FSDP": _asked("ACCELERATE_USE_FSDP", getattr(trainer.args, "fsdp", None)),
        "DeepSpeed": _asked("ACCELERATE_USE_DEEPSPEED", getattr(trainer.args, "deepspeed", None)),
    }
    given = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    for name in asked:
        if joined > 1 and asked[name] and not given[name]:
            raise ValueError(
                f"{name} was asked for, but accelerate leaves it out on the device {trainer.accelerator.device} and"
                " would hold the whole model in every process: train on GPUs, or take a configuration without it"
                " (examples/distributed/ddp.yaml)"
            )


def _asked(variable: str, option: Any) -> bool:
    return bool(option) or os.environ.get(variable, "false").lower() == "true"


def shards(trainer: Trainer) -> str | None:
    """What keeps a part of the model's parameters in each process; None where each holds them all."""
    if trainer.is_fsdp_enabled:
        return "FSDP"
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None) if trainer.is_deepspeed_enabled else None
    return "DeepSpeed ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else None


def refuse_parts(trainer: Trainer, method: Method, scorers: Mapping[str, Any]) -> None:
    """ValueError where a method needs a score whose scorer reads whole parameters (its attribute `whole`), and each
    process holds a part of them.
    """
    found = sorted(name for name in method.needs & scorers.keys() if getattr(scorers[name], "whole", False))
    if found and (kind := shards(trainer)):
        raise ValueError(
            f'method "{method.name}" needs {", ".join(found)}, which every process measures on its own rows with the'
            f" whole model, and {kind} keeps a part of it in each: take DDP or ZeRO-2 (examples/distributed/), adapters"
            " (peft) for a model that is too large for that, or a method that needs entropy and log-probs alone"
        )


def part_of(number: int, index: int, processes: int) -> slice:
    """Which of `number` things in a row are those of a process: parts of the same size, but for one."""
    return slice(number * index // processes, number * (index + 1) // processes)


@contextmanager
def with_a_word(trainer: Trainer) -> Iterator[None]:
    """RuntimeError that says what happened, where a process that this one waits for has ended."""
    try:
        yield
    except Exception as error:
        if trainer.accelerator.num_processes > 1 and is_lost(error):
            raise RuntimeError(
                f"process {trainer.accelerator.process_index} waits for another one of"
                f" {trainer.accelerator.num_processes} that has ended: what that one said, or who killed it, stands in"
                " the launcher's output. The same command goes on from the last checkpoint"
            ) from error
        raise


def is_lost(error: BaseException) -> bool:
    """Whether torch says that a process of the group is gone."""
    kind = type(error).__name__
    return isinstance(error, RuntimeError) and (kind.startswith("Dist") or any(word in str(error) for word in LOST))
