"""Who moves whom in the next step of a run, and do real steps agree?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokencredit.studies.arguments import StepConfig
from tokencredit.studies.options import check_choices, option
from tokencredit.studies.study import RUN, Study

EXAMPLES = """\
  tokencredit dynamics kernel --run runs/demo/grpo-0
  tokencredit dynamics kernel --run runs/demo/grpo-0 --checkpoint 18 --sequences
  tokencredit dynamics kernel --run runs/demo/grpo-0 --preconditioner identity
  tokencredit dynamics kernel --run runs/qwen --sequences --directions 512 --prompts 16"""


@dataclass(frozen=True, kw_only=True)
class KernelConfig(StepConfig):
    """What is asked. `factors` are learning rates in units of the run's own."""

    preconditioner: Literal["adamw", "identity"] = option(
        "adamw", "of the step: AdamW's, or none, which is plain gradient descent"
    )
    level: Literal["tokens", "sequences"] = option(
        "tokens",
        "what the kernel is between (default: tokens)",
        consts={"--tokens": "tokens", "--sequences": "sequences"},
    )
    directions: int = option(
        0,
        "sketch with K random directions, where exact gradients are too large; 256 or more (default: exact)",
        metavar="K",
    )
    held_out: int = option(32, "prompts on which real steps are compared")
    samples: int = option(2, "completions of each of these")
    factors: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.directions < 0 or min(self.held_out, self.samples) < 1 or not self.factors or min(self.factors) <= 0:
            raise ValueError(
                "a kernel needs held-out prompts, a sample of each, and positive learning rates; directions are 0 or"
                " more"
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
