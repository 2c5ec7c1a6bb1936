"""TrainConfig: what one training run is. A file, flags and `key=value` settings fill the same fields."""

from __future__ import annotations

import difflib
import inspect
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencredit.argument_types import SEEDS
from tokencredit.budget import Budget
from tokencredit.durable import read_text
from tokencredit.limits import check_rows, check_threads
from tokencredit.settings import parse, read_settings
from tokencredit.tasks.data import PARTS

if TYPE_CHECKING:
    from tokencredit.methods import Method

AT_LEAST_0 = (
    "seed",
    "eval_every",
    "record_every",
    "record_rows",
    "save_every",
    "noise_scale_every",
    "entropy_change_every",
)
LATER = ("peft", "entropy_change_every", "credit_model")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
RATES = {"reckon": 5e-4}
OTHER_RATE, ADAPTER_RATE = 1e-6, 1e-5
EVALUATED, OTHER_EVALUATED = {"reckon": (256, 8)}, (64, 4)
"""Held-out prompts and samples of each, by task, unless told: of a pretrained model an answer takes long."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults train the embedded model on the embedded task on a laptop.

    task, task_options        what `tokencredit.tasks.load` takes
    model                     a path, a hub name or a run directory; "reckon" is the shipped model
    method, method_options    a name of METHODS and the hyper-parameters to replace
    seed                      of the prompts, their order, and the sampling
    steps                     rollout batches; each is used for `updates` passes
    budget                    {rollouts: n}, {tokens: n} or {seconds: n}: the run ends where so much was sampled, or
                              trained for, `steps` at the most; it is evaluated at every tenth of it (marks: 10) in
                              place of eval_every
    prompts, group            prompts per rollout batch, and completions of each
    updates, minibatches      passes over a rollout batch, and optimizer steps per pass
    accumulate                forward and backward passes per optimizer step: more need less memory, and change nothing
                              else. None: as few as the model has room for (lm.room)
    learning_rate             None: 5e-4 for the embedded task, 1e-6 for any other (a pretrained model), and 1e-5 there
                              for adapters
    temperature               of the sampling, in training and evaluation
    max_new_tokens            None: the task's own limit, at most half of the context
    chat                      true: text prompts are asked as a user's message; false: they stay text
    dtype, device             of the weights, float32 unless told; cpu or cuda, a GPU where there is one unless told
    eval_every                rollout batches between evaluations on held-out prompts; 0 switches them off
    eval_prompts, eval_samples   None: 256 prompts × 8 completions on the embedded task, 64 × 4 on any other
    eval_batch                completions sampled at once
    eval_part                 which held-out prompts: all, or one of two parts without a common prompt, validation or
                              final
    record_every, record_rows per-token records of sampled completions, in rollout batches (0: none); and how many of a
    batch are kept
    save_every                checkpoints, in rollout batches, and besides after ten minutes without one, or later
                              where writing them would take over 2 % of the time; 0: at the end alone
    max_rounds                generation rounds of dynamic sampling, for methods that ask for it
    noise_scale_every         optimizer steps between measurements of the gradient noise scale; 0: none
    entropy_change_every      optimizer steps between measurements of the entropy's change, predicted and realised; 0:
                              none
    credit_model              for a method that reads `learned_credit`: {every: optimizer steps between fits, prompts,
                              samples and rollouts: of the labels of each}
    threads                   CPU threads; None leaves torch's choice
    peft                      fields of peft's LoraConfig, e.g. {"r": 8, "target_modules": "all-linear"}: adapters are
                              trained in place of all parameters
    trl                       further fields of TRL's GRPOConfig, e.g. {"bf16": true, "use_vllm": true}
    """

    task: str = "reckon"
    task_options: dict[str, Any] = field(default_factory=dict)
    model: str = "reckon"
    method: str = "grpo"
    method_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 40
    budget: dict[str, Any] = field(default_factory=dict)
    prompts: int = 64
    group: int = 8
    updates: int = 2
    minibatches: int = 1
    accumulate: int | None = None
    learning_rate: float | None = None
    temperature: float = 1.0
    max_new_tokens: int | None = None
    chat: bool | None = None
    dtype: str | None = None
    device: str | None = None
    max_rounds: int = 3
    eval_every: int = 10
    eval_prompts: int | None = None
    eval_samples: int | None = None
    eval_batch: int = 512
    eval_part: str = "all"
    record_every: int = 10
    record_rows: int = 64
    save_every: int = 10
    noise_scale_every: int = 0
    entropy_change_every: int = 0
    credit_model: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    peft: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, _typed(f.name, f.type, getattr(self, f.name)))
        if self.learning_rate is None:
            usual = ADAPTER_RATE if self.peft else OTHER_RATE
            object.__setattr__(self, "learning_rate", RATES.get(self.task, usual))
        for name, usual in zip(("eval_prompts", "eval_samples"), EVALUATED.get(self.task, OTHER_EVALUATED)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in AT_LEAST_0 else 1
            if f.type.startswith("int") and value is not None and value < least:
                raise ValueError(f"{f.name} must be at least {least}, got {value}")
            if f.type.startswith("float") and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{f.name} must be positive and finite, got {value}")
        if self.seed >= SEEDS:
            raise ValueError(f"seed must be below {SEEDS:,}, got {self.seed:,}")
        if self.group < 2:
            raise ValueError("group must be at least 2: a rollout is compared with the others of its prompt")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        Budget.of(self.budget)
        if self.eval_part not in PARTS:
            raise ValueError(f"eval_part must be one of {', '.join(PARTS)}, got {self.eval_part!r}")
        passes = self.accumulate or 1
        if self.prompts * self.group % (self.minibatches * passes):
            each = f"{self.minibatches} minibatches" + (f" of {passes} passes" if passes > 1 else "")
            raise ValueError(f"{self.prompts} prompts x {self.group} rollouts do not split into {each}")

    @property
    def optimizer_steps(self) -> int:
        return self.steps * self.updates * self.minibatches

    def build_method(self) -> Method:
        """The method with its options. KeyError and ValueError name what there is."""
        from tokencredit.methods import METHODS

        return METHODS[self.method].configured(self.method_options)

    def as_dict(self) -> dict[str, Any]:
        """Its fields; without those of `LATER` that are off, so that a run that was recorded before them is the same
        run.
        """
        return {name: value for name, value in asdict(self).items() if name not in LATER or value}


def check_size(config: TrainConfig) -> None:
    """ValueError for what this machine cannot hold; a config that another machine can is a config all the same."""
    if config.threads is not None:
        check_threads(config.threads)
    check_rows(config.prompts * config.group, "prompts x group")
    check_rows(config.prompts * config.steps, "prompts x steps")
    check_rows((config.eval_prompts or 1) * (config.eval_samples or 1), "eval_prompts x eval_samples")
    check_rows(config.max_new_tokens or 1, "max_new_tokens")


def read_config(path: str | Path | None, settings: Iterable[str] = (), **flags: Any) -> TrainConfig:
    """A config from a YAML or JSON file, then flags that are not None, then "key=value" settings; "trl.bf16=true"
    reaches into a field. Options of the task are added to those of the file, unless the flags name another task.

    ValueError names an unknown key, the nearest one there is, and where it came from.
    """
    values: dict[str, Any] = {}
    if path is not None:
        read = parse(read_text(path), str(path))
        if not isinstance(read, Mapping):
            raise ValueError(f"{path} must hold key: value pairs, it holds {type(read).__name__}")
        values |= {_known(key, str(path)): value for key, value in read.items()}
    given = {key: value for key, value in flags.items() if value is not None}
    same = given.get("task") in (None, values.get("task", given.get("task")))
    if same and isinstance(kept := values.get("task_options"), Mapping):
        given["task_options"] = {**kept, **given.get("task_options", {})}
    values |= given
    for setting in settings:
        [(key, value)] = read_settings([setting], "--set").items()
        head, _, inner = key.partition(".")
        _known(head, f"--set {setting}")
        if inner and not isinstance(values.get(head, {}), Mapping):
            raise ValueError(f"--set {setting}: {head} is {values[head]!r}, which has no fields")
        values[head] = {**values.get(head, {}), inner: value} if inner else value
    return TrainConfig(**values)


def field_table() -> str:
    """The fields and what they mean, for a terminal."""
    lines = inspect.cleandoc(TrainConfig.__doc__ or "").split("\n\n", 1)[1].splitlines()
    return "\n".join(
        part for line in lines for part in textwrap.wrap(line, 80, initial_indent="  ", subsequent_indent=" " * 28)
    )


def _known(key: str, where: str) -> str:
    names = [f.name for f in fields(TrainConfig)]
    if key not in names:
        near = difflib.get_close_matches(str(key), names, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"{where}: unknown key {key}{hint} Keys: {', '.join(names)}")
    return key


def _typed(key: str, kind: str, value: Any) -> Any:
    """The value in the field's kind (a whole number for a float is fine), or an error that says which kind that is."""
    if value is None and "None" in kind:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind.startswith("float"):
        if not number:
            raise ValueError(f"{key} must be a number, got {value!r}")
        return float(value)
    fits = {
        "int": number and isinstance(value, int),
        "str": isinstance(value, str),
        "boo": isinstance(value, bool),
        "dic": isinstance(value, Mapping),
    }
    words = {"int": "a whole number", "str": "text", "boo": "true or false", "dic": "key: value pairs"}
    if not fits[kind[:3]]:
        raise ValueError(f"{key} must be {words[kind[:3]]}, got {value!r}")
    return value
