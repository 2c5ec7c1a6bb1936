"""A policy in the middle of its training: model, task, method, and what its optimizer remembers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tokencredit import checkpoints
from tokencredit.durable import read_mapping
from tokencredit.dynamics.optimizer import OptimizerState, Rule, read_optimizer
from tokencredit.dynamics.vectors import large, trained
from tokencredit.lm.load import load_model, load_tokenizer, resolve_model, run_of
from tokencredit.lm.models import CausalModel, Tokenizer
from tokencredit.lm.policy import Policy, PolicyConfig
from tokencredit.method import Method
from tokencredit.methods import METHODS
from tokencredit.tasks.task import Task
from tokencredit.train_config import TrainConfig


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a question about the next update needs.

    policy         model, tokenizer and task, at the temperature that samples
    config         of the run; for a plain model the defaults, with its task and model
    optimizer      None where the folder has no optimizer state
    max_grad_norm  gradients longer than this are shortened to it before a step; None for no clipping
    softmax        of passes over its rollouts, as `Passes` takes it
    scratch        folder of vectors as large as the model, as `Passes` takes it
    """

    path: Path
    step: int
    policy: Policy
    config: TrainConfig
    optimizer: OptimizerState | None
    max_grad_norm: float | None
    softmax: torch.dtype | None = None
    scratch: Path | None = None

    @cached_property
    def method(self) -> Method:
        """The run's; ValueError where it is one that no table holds."""
        if self.config.method not in METHODS and run_of(self.path):
            raise ValueError(
                f"the run was trained with a method of its own, {self.config.method}: name one of METHODS with --method"
                " (from Python, method=...)"
            )
        return self.config.build_method().within(self.max_new_tokens)

    @property
    def model(self) -> CausalModel:
        return self.policy.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.policy.tokenizer

    @property
    def task(self) -> Task:
        return self.policy.task

    @property
    def max_new_tokens(self) -> int:
        return self.policy.max_new_tokens

    @property
    def temperature(self) -> float:
        return self.policy.temperature

    def needs_optimizer(self) -> OptimizerState:
        """The optimizer's state. ValueError where there is none, with what can be done."""
        if self.optimizer is None:
            raise ValueError(
                f"{self.path} has no optimizer state: the step that training would make next is not known. Choose"
                " another checkpoint, or ask for a fresh optimizer's first step: --optimizer adamw or --optimizer sgd."
                " `tokencredit train --out runs/grpo` makes a run on the embedded world, in half a minute, whose"
                " checkpoints hold the optimizer's state: name it with --run"
            )
        return self.optimizer

    def filed(self, scratch: Path) -> Checkpoint:
        """The same with vectors as large as the model in files of a folder, the optimizer's among them, where the model
        is large and on a CPU.
        """
        if not large(trained(self.model)) or self.model.device.type != "cpu":
            return self
        return replace(self, scratch=scratch, optimizer=self.optimizer and self.optimizer.filed(scratch))

    def fresh(self, kind: str) -> Checkpoint:
        """The same policy with an optimizer that has not made a step: "adamw" with the run's β and λ as TRL's, or
        "sgd".
        """
        if kind not in ("adamw", "sgd"):
            raise ValueError(f"a fresh optimizer is adamw or sgd, not {kind!r}")
        rule = Rule(kind, lr=self.config.learning_rate, **({"betas": (0.9, 0.99)} if kind == "adamw" else {}))
        return replace(self, optimizer=OptimizerState.fresh(list(trained(self.model)), rule))


def open_checkpoint(
    run: str | Path | PolicyConfig, step: int | None = None, *, dtype: torch.dtype | None = None, **settings: Any
) -> Checkpoint:
    """Opens a training run's checkpoint, the last one or that of an optimizer step; or a plain model, which has no
    optimizer state.

    run       a run directory, a checkpoint or model folder, a hub name, or "reckon"; or a PolicyConfig with one as its
              model, which also says the task and how it is sampled
    dtype     of the weights: the policy's own, or float32
    settings  fields of TrainConfig in place of the run's own: method, group, ...

    ValueError names the checkpoints there are.
    """
    asked = run if isinstance(run, PolicyConfig) else PolicyConfig(str(run))
    if unknown := sorted(settings.keys() - {f.name for f in fields(TrainConfig)}):
        raise ValueError(f"TrainConfig has no field {', '.join(unknown)}")
    of_policy = {name: settings.pop(name, None) for name in ("task", "temperature", "max_new_tokens")}
    asked = replace(asked, **{name: value for name, value in of_policy.items() if value is not None})
    asked = replace(asked, options={**settings.pop("task_options", {}), **asked.options})
    path, settled = _find(Path(asked.model), step), asked.settled()
    own = (
        dict(read_mapping(found / "run.json", "config")["config"])
        if (found := run_of(asked.model))
        else {"model": asked.model}
    )
    config = TrainConfig(
        **own
        | {name: value for name, value in settings.items() if value is not None}
        | {"task": settled.task, "task_options": dict(settled.options), "temperature": settled.temperature}
        | ({"max_new_tokens": asked.max_new_tokens} if asked.max_new_tokens else {})
        | ({"chat": settled.chat} if settled.chat is not None else {})
    )
    task, tokenizer = settled.load_task(), load_tokenizer(str(path))
    model = load_model(path, dtype=dtype or asked.dtype or torch.float32, device=asked.device)
    policy = Policy(
        model,
        tokenizer,
        task,
        config.temperature,
        settled.max_new_tokens or 0,
        settled.chat,
        str(asked.model),
        memory=asked.memory,
    )
    try:
        optimizer = read_optimizer(path, model)
    except FileNotFoundError:
        optimizer = None
    bound = config.trl.get("max_grad_norm", 1.0)
    return Checkpoint(path, checkpoints.step_of(path) or 0, policy, config, optimizer, bound or None)


def _find(run: Path, step: int | None) -> Path:
    """The checkpoint of a step, or the newest whole one; a model's folder where it is no run."""
    if not (run / "run.json").exists():
        if step is not None:
            raise ValueError(f"{run} is not a run directory, so it has no checkpoint of step {step}")
        return Path(resolve_model(run))
    found = checkpoints.listed(run / "checkpoints")
    if not found:
        raise ValueError(f"{run} has no finished checkpoint; train it with save_every set")
    if step is not None and step not in found:
        raise ValueError(
            f"{run} has no checkpoint of step {step}; it has those of {', '.join(map(str, sorted(found)))}"
        )
    return Path(resolve_model(run if step is None else found[step]))
