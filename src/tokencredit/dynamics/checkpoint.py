"""A policy in the middle of its training: model, task, method, and what its optimizer remembers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tokencredit.durable import read_json
from tokencredit.dynamics.optimizer import OptimizerState, Rule, read_optimizer
from tokencredit.engines.config import TrainConfig
from tokencredit.lm.load import COMPLETE, load_tokenizer, resolve_model
from tokencredit.method import Method
from tokencredit.tasks import load


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a question about the next update needs.

    config         of the run; for a plain model the defaults, with its task and model
    optimizer      None where the folder has no optimizer state
    max_grad_norm  gradients longer than this are shortened to it before a step; None for no clipping
    """

    path: Path
    step: int
    model: Any
    tokenizer: Any
    task: Any
    config: TrainConfig
    optimizer: OptimizerState | None
    max_grad_norm: float | None

    @cached_property
    def method(self) -> Method:
        return self.config.build_method().within(self.max_new_tokens)

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or getattr(self.task, "max_new_tokens", 256)

    @property
    def temperature(self) -> float:
        return self.config.temperature

    def needs_optimizer(self) -> OptimizerState:
        """The optimizer's state. ValueError where there is none, with what can be done."""
        if self.optimizer is None:
            raise ValueError(
                f"{self.path} has no optimizer state: the step that training would make next is not known. Choose"
                " another checkpoint, or ask for a fresh optimizer's first step: --optimizer adamw or --optimizer sgd"
            )
        return self.optimizer

    def fresh(self, kind: str) -> Checkpoint:
        """The same policy with an optimizer that has not made a step: "adamw" with the run's β and λ as TRL's, or
        "sgd".
        """
        if kind not in ("adamw", "sgd"):
            raise ValueError(f"a fresh optimizer is adamw or sgd, not {kind!r}")
        rule = Rule(kind, lr=self.config.learning_rate, **({"betas": (0.9, 0.99)} if kind == "adamw" else {}))
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return replace(self, optimizer=OptimizerState.fresh(names, rule))


def open_checkpoint(
    run: str | Path, step: int | None = None, *, dtype: torch.dtype = torch.float32, **settings: Any
) -> Checkpoint:
    """Opens a training run's checkpoint, the last one or that of an optimizer step; or a plain model, which has no
    optimizer state.

    run       a run directory, a checkpoint or model folder, a hub name, or "reckon"
    settings  fields of TrainConfig in place of the run's own: task, method, temperature, ...

    ValueError names the checkpoints there are.
    """
    if unknown := sorted(settings.keys() - {f.name for f in fields(TrainConfig)}):
        raise ValueError(f"TrainConfig has no field {', '.join(unknown)}")
    given = {name: value for name, value in settings.items() if value is not None}
    own = read_json(Path(run) / "run.json")["config"] if (Path(run) / "run.json").exists() else {"model": str(run)}
    config = TrainConfig(**{**own, **given})
    path = _find(Path(run), step) if (Path(run) / "run.json").exists() else Path(resolve_model(run))
    if step is not None and not (Path(run) / "run.json").exists():
        raise ValueError(f"{run} is not a run directory, so it has no checkpoint of step {step}")
    model = _load(path, dtype)
    try:
        optimizer = read_optimizer(path, model)
    except FileNotFoundError:
        optimizer = None
    task = load(config.task, **config.task_options)
    bound = config.trl.get("max_grad_norm", 1.0)
    return Checkpoint(path, _step_of(path), model, load_tokenizer(str(path)), task, config, optimizer, bound or None)


def _find(run: Path, step: int | None) -> Path:
    found = {_step_of(path): path for path in (run / "checkpoints").glob("checkpoint-*") if (path / COMPLETE).exists()}
    if not found:
        raise ValueError(f"{run} has no finished checkpoint; train it with save_every set")
    if step is not None and step not in found:
        raise ValueError(
            f"{run} has no checkpoint of step {step}; it has those of {', '.join(map(str, sorted(found)))}"
        )
    return found[max(found) if step is None else step]


def _step_of(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if path.name.startswith("checkpoint-") and number.isdigit() else 0


def _load(path: Path, dtype: torch.dtype) -> Any:
    """The model in evaluation mode; of a LoRA checkpoint the adapter's parameters alone can be trained, as in its
    training.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (path / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(str(path), is_trainable=True, dtype=dtype).to(device).eval()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype).to(device).eval()
