"""TrainConfig: what one training run is. A file, flags and `key=value` settings fill the same fields."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tokencredit.methods import METHODS, Method


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults train the embedded model on the embedded task on a laptop.

    task, task_options        what `tokencredit.tasks.load` takes
    model                     a path or hub name; "reckon" is the shipped model
    method, method_options    a name of METHODS and the hyper-parameters to replace
    steps                     rollout batches; each is used for `updates` optimizer steps
    prompts, group            prompts per rollout batch, and completions of each
    updates, minibatches      passes over a rollout batch, and optimizer steps per pass
    max_new_tokens            None: the task's own limit, or 256
    eval_every ... eval_temperature   evaluation on held-out prompts, in rollout batches; 0 switches it off
    record_every, record_rows per-token records of sampled completions, in rollout batches; and how many of a batch are kept
    save_every                checkpoints, in rollout batches
    max_rounds                generation rounds of dynamic sampling, for methods that ask for it
    threads                   CPU threads; None leaves torch's choice
    trl                       further fields of TRL's GRPOConfig, e.g. {"bf16": true, "use_vllm": true}
    """

    task: str = "reckon"
    task_options: dict[str, Any] = field(default_factory=dict)
    model: str = "reckon"
    method: str = "grpo"
    method_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 40
    prompts: int = 64
    group: int = 8
    updates: int = 2
    minibatches: int = 1
    learning_rate: float = 5e-4
    temperature: float = 1.0
    max_new_tokens: int | None = None
    max_rounds: int = 3
    eval_every: int = 10
    eval_prompts: int = 256
    eval_samples: int = 8
    record_every: int = 10
    record_rows: int = 64
    save_every: int = 10
    threads: int | None = None
    trl: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("steps", "prompts", "group", "updates", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.group < 2:
            raise ValueError("group must be at least 2: a rollout is compared with the others of its prompt")
        if self.prompts * self.group % self.minibatches:
            raise ValueError(f"{self.prompts} prompts x {self.group} rollouts do not split into {self.minibatches} minibatches")

    @property
    def optimizer_steps(self) -> int:
        return self.steps * self.updates * self.minibatches

    def build_method(self) -> Method:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in self.method_options.items()}
        return METHODS[self.method].replace(**options) if options else METHODS[self.method]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_config(path: str | Path | None, settings: Iterable[str] = (), **flags: Any) -> TrainConfig:
    """A config from a YAML or JSON file, then flags that are not None, then "key=value" settings; "trl.bf16=true" reaches into a field.

    ValueError names an unknown key, the nearest one there is, and where it came from.
    """
    values: dict[str, Any] = {}
    if path is not None:
        text = Path(path).read_text()
        read = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
        if not isinstance(read, Mapping):
            raise ValueError(f"{path} must hold key: value pairs, it holds {type(read).__name__}")
        values |= {_known(key, str(path)): value for key, value in read.items()}
    values |= {key: value for key, value in flags.items() if value is not None}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {setting!r}")
        head, *rest = key.split(".", 1)
        _known(head, f"--set {setting}")
        if rest:
            values[head] = {**values.get(head, {}), rest[0]: yaml.safe_load(value)}
        else:
            values[head] = yaml.safe_load(value)
    return replace(TrainConfig(), **{key: _typed(key, value) for key, value in values.items()})


def _known(key: str, where: str) -> str:
    names = [f.name for f in fields(TrainConfig)]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{where}: unknown key {key}{hint} Keys: {', '.join(names)}")
    return key


def _typed(key: str, value: Any) -> Any:
    """Numbers as YAML 1.1 misses them ("5e-4" is a string there), and a clear error for the wrong kind."""
    default = getattr(TrainConfig(), key)
    if isinstance(default, float) and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{key} must be a number, got {value!r}") from None
    if isinstance(default, int) and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{key} must be a whole number, got {value!r}")
    if isinstance(default, dict) and not isinstance(value, dict):
        raise ValueError(f"{key} must hold key: value pairs, got {value!r}")
    return value
