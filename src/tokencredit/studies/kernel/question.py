"""Who moves whom in the next step of a run, and do real steps agree?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tokencredit.studies.arguments import StepConfig, usual
from tokencredit.studies.options import check_choices, option
from tokencredit.studies.study import RUN, Study

EXAMPLES = """\
  tokencredit dynamics kernel --run runs/demo/grpo-0
  tokencredit dynamics kernel --run runs/demo/grpo-0 --checkpoint 18 --sequences
  tokencredit dynamics kernel --run runs/demo/grpo-0 --preconditioner identity
  tokencredit dynamics kernel --run runs/qwen --sequences --prompts 8 --group 4"""
FILES = 16 << 30
"""Bytes up to which the gradients of all tokens, at the default sizes, are asked for, and else those of completions."""
FEWER = "fewer for a model over 4M parameters and no more than the task has"


@dataclass(frozen=True, kw_only=True)
class KernelConfig(StepConfig):
    """What is asked. `factors` are learning rates in units of the run's own."""

    preconditioner: Literal["adamw", "identity"] = option(
        "adamw", "of the step: AdamW's, or none, which is plain gradient descent"
    )
    level: Literal["tokens", "sequences"] | None = option(
        None,
        "what the kernel is between (default: tokens, of a model too large for the gradients of all of them sequences)",
        consts={"--tokens": "tokens", "--sequences": "sequences"},
    )
    prompts: int | None = option(None, f"prompts of the batch (default: 64, {FEWER})")
    directions: int = option(
        0,
        "sketch with K random directions, where exact gradients find no disk; 256 or more (default: exact)",
        metavar="K",
    )
    held_out: int | None = option(None, f"prompts on which real steps are compared (default: 32, {FEWER})")
    samples: int = option(2, "completions of each of these")
    factors: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.factors or min(self.factors) <= 0:
            raise ValueError(f"learning rates are positive multiples of the run's own, got {self.factors}")
        for name, least in {"prompts": 1, "group": 1, "held_out": 2, "samples": 1, "directions": 0}.items():
            if (number := getattr(self, name)) is not None and number < least:
                raise ValueError(f"--{name.replace('_', '-')} has to be at least {least}, got {number}")

    def fitted(
        self, parameters: int, there: tuple[int | None, int | None], written: int, gradient: int
    ) -> KernelConfig:
        """With the sizes and the level that nobody named: for a model of so many parameters on a task with prompts
        `there` to learn from and held out, completions of at most `written` tokens, gradients of so many bytes.
        """
        prompts, held_out = usual(64, parameters, there[0], least=8), usual(32, parameters, there[1], least=8)
        few = (prompts * KernelConfig.group + held_out * KernelConfig.samples) * written * gradient <= FILES
        return replace(
            self,
            prompts=self.prompts or prompts,
            held_out=self.held_out or held_out,
            level=self.level or ("tokens" if few or self.directions else "sequences"),
        )


STUDY = Study(
    __package__,
    "Who moves whom: the Fisher kernel of the rollouts a step learns from, and its influence against real steps.",
    "Who moves whom",
    KernelConfig,
    EXAMPLES,
    group="dynamics",
    shared=RUN,
)
