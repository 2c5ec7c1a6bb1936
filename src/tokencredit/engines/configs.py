"""A training run as TrainConfig says it, and as TRL's GRPOConfig and a trainer say it: each from the other."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from tokencredit.engines.lora import FIELDS
from tokencredit.engines.processes import num_processes
from tokencredit.engines.trainer import Trainer
from tokencredit.lm.load import find_device
from tokencredit.lm.models import CausalModel
from tokencredit.lm.room import Room
from tokencredit.method import Method
from tokencredit.methods import METHODS
from tokencredit.train_config import TrainConfig

DECIDED = {
    "output_dir": "the run directory",
    "num_generations": "group",
    "num_iterations": "updates",
    "max_steps": "steps",
    "seed": "seed",
    "per_device_train_batch_size": "prompts, group, minibatches and accumulate",
    "steps_per_generation": "minibatches and accumulate",
    "gradient_accumulation_steps": "accumulate",
    "max_completion_length": "max_new_tokens",
    "temperature": "temperature",
    "learning_rate": "learning_rate",
    "save_steps": "save_every",
    "logging_steps": "every step",
    "num_train_epochs": "steps",
    "shuffle_dataset": "seed",
}
KEPT = 2
"""Checkpoints of a run: the last one, and the one to fall back on."""
ELSEWHERE = (
    *("logging_dir", "logging_strategy", "report_to", "run_name", "disable_tqdm", "log_level", "project", "use_cpu"),
    *("generation_batch_size", "save_strategy", "save_total_limit"),
)
"""Fields of GRPOConfig that say where a run is watched or done, and nothing of what it does."""


def make_args(config: TrainConfig, max_new_tokens: int, folder: Path) -> GRPOConfig:
    """TRL's config. ValueError for an option of `trl` that another field decides, or that TRL does not have."""
    further = {k: v for k, v in config.trl.items() if k not in ("model_init_kwargs", "save_total_limit")}
    for key in further:
        if key in DECIDED:
            raise ValueError(f"trl.{key} is decided by {DECIDED[key]}: set that instead")
        if key not in GRPOConfig.__dataclass_fields__:
            near = difflib.get_close_matches(key, GRPOConfig.__dataclass_fields__, n=1)
            raise ValueError(f"TRL's GRPOConfig has no option {key}{f'; did you mean {near[0]}?' if near else ''}")
    place = find_device(config.device)
    if place.index is not None:
        raise ValueError(f"device: training uses the GPUs that it sees; for {place} alone set CUDA_VISIBLE_DEVICES")
    accumulate, cuda, processes = config.accumulate or 1, place.type == "cuda", num_processes()
    pieces = config.minibatches * accumulate
    if config.prompts * config.group % (pieces * processes):
        raise ValueError(
            f"{config.prompts} prompts x {config.group} rollouts do not split into {pieces} passes of {processes}"
            " processes"
        )
    save = {
        "save_strategy": "steps",
        "save_steps": (config.save_every or config.steps) * config.updates * config.minibatches,
    }
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.prompts * config.group // (pieces * processes),
        "num_generations": config.group,
        "steps_per_generation": pieces,
        "num_iterations": config.updates,
        "gradient_accumulation_steps": accumulate,
        "max_steps": config.optimizer_steps,
        "max_completion_length": max_new_tokens,
        "temperature": config.temperature,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.99,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "bf16": cuda,
        "gradient_checkpointing": cuda,
        "logging_steps": 1,
        "save_total_limit": config.trl.get("save_total_limit", KEPT),
        "report_to": "none",
        "seed": config.seed,
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "log_level": "error",
        "dataloader_pin_memory": cuda,
        "use_cpu": place.type == "cpu",
        "ddp_find_unused_parameters": False,
    }
    return GRPOConfig(**settings | save | further)


def fewest_passes(config: TrainConfig, room: Room, prompt: int, written: int) -> int:
    """Forward and backward passes per optimizer step, as few as there is room for in rows of at most `prompt` tokens
    and `written` more.
    """
    fit = room.rows_trained(prompt + written, written)
    rows = config.prompts * config.group // (config.minibatches * num_processes())
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= fit)


def read_trainer(trainer: Trainer, **told: Any) -> TrainConfig:
    """What a trainer does, as far as a TrainConfig can say it; `told` are the fields that the trainer does not know.

    An optimizer step over several rollout batches is one of all their prompts. A method that is none of METHODS with
    other hyper-parameters stands there by its name alone.
    """
    args, processes = trainer.args, trainer.accelerator.num_processes
    passes, accumulate = args.steps_per_generation, args.gradient_accumulation_steps
    passes = max(passes, accumulate)
    every = passes // accumulate * trainer.num_iterations
    name, options = read_method(trainer._start, trainer.max_completion_length)
    config = {
        "model": getattr(trainer.accelerator.unwrap_model(trainer.model), "name_or_path", "") or "",
        "method": name,
        "method_options": options,
        "seed": args.seed,
        "steps": max(-(-trainer.state.max_steps // every), 1),
        "prompts": args.per_device_train_batch_size * processes * passes // trainer.num_generations,
        "group": trainer.num_generations,
        "updates": trainer.num_iterations,
        "minibatches": passes // accumulate,
        "accumulate": accumulate,
        "learning_rate": args.learning_rate,
        "temperature": trainer.temperature,
        "max_new_tokens": trainer.max_completion_length,
        "max_rounds": trainer.max_rounds,
        "noise_scale_every": trainer._noise.every,
        "entropy_change_every": trainer._entropy.every,
        "save_every": int(args.save_steps) // every if args.save_strategy == "steps" else 0,
        "peft": _adapters(trainer.model),
        "trl": _changed(args),
    }
    return TrainConfig(**config | told)


def read_method(method: Method, max_length: int) -> tuple[str, dict[str, Any]]:
    """(name, options) that make a method of METHODS; of any other its name, which no entry of METHODS has, and no
    options.
    """
    known = METHODS.get(method.name)
    if known is None:
        return method.name, {}
    usual, own = known.within(max_length).hyperparameters(), method.hyperparameters()
    options = {key: value for key, value in own.items() if key in usual and usual[key] != value}
    if known.replace(**options).within(max_length) == method and all(map(_plain, options.values())):
        return method.name, options
    return f"{method.name} (changed)", {}


def _adapters(model: CausalModel) -> dict[str, Any]:
    """The `peft` settings of a model with LoRA; {} of any other."""
    own = getattr(model, "peft_config", {}).get("default")
    if own is None:
        return {}
    usual = type(own)()
    found = {name: getattr(own, name) for name in FIELDS if getattr(own, name, None) != getattr(usual, name, None)}
    found = {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}
    return {"r": getattr(own, "r", None)} | {name: value for name, value in found.items() if _plain(value)}


def _changed(args: GRPOConfig) -> dict[str, Any]:
    """What was said to TRL besides what a TrainConfig has fields for."""
    found = {}
    for f in fields(args):
        value = getattr(args, f.name)
        value = value.value if isinstance(value, Enum) else value
        usual = f.default if f.default_factory is MISSING else f.default_factory()
        if f.init and f.name not in (*DECIDED, *ELSEWHERE) and value != usual and _plain(value):
            found[f.name] = value
    return found


def _plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    return value is None or type(value) in (str, int, float, bool)
