"""Does a way of weighting tokens make the gradient less noisy, and at what bias?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tokencredit.studies.arguments import FULL, OnPolicy, usual
from tokencredit.studies.options import check_choices, option
from tokencredit.studies.study import POLICY, Study

LEAST = 8
EXAMPLES = """\
  tokencredit study variance
  tokencredit study variance --runs runs/demo/grpo-0 --out runs/variance-grpo
  tokencredit study variance --methods gtpo ptw_entropy --prompts 128
  tokencredit study variance --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --option chat=true \\
      --prompts 64 --out runs/qwen-v"""


@dataclass(frozen=True, kw_only=True)
class VarianceConfig(OnPolicy):
    """What is measured. `draws`: subsets of tokens that are really drawn. GRPO is no baseline: under it a token weighs
    1 / |o|."""

    runs: tuple[str, ...] = option((), "training runs whose checkpoints are looked at as well", nargs="*")
    steps: tuple[int, ...] = option((), "which of their checkpoints (default: all)", nargs="*")
    methods: tuple[str, ...] = option((), "methods to compare (default: all weightings that the task can give)")
    baseline: str = option("dapo", "the unweighted method: every token of the batch counts the same")
    truth: Literal["auto", "exact", "rloo"] = option(
        "auto",
        "true policy gradient: from Q − V or from leave-one-out REINFORCE (default: auto, exact where there are prefix"
        " trees)",
    )
    prompts: int | None = option(
        None,
        "prompts, two groups of rollouts each (default: 384, fewer for a model over 4M parameters and no more than the"
        " task has)",
    )
    group: int | None = option(None, "rollouts of a group (default: 8, for a model over 4M parameters 4)")
    batch: int = option(64, "prompts of a step, for mean squared errors")
    directions: int | None = option(
        None, "random directions in place of gradients; 0 is exact (default: exact where it fits on the disk)"
    )
    draws: int | None = None
    seed: int = option(0, "(default: 0)")

    def __post_init__(self) -> None:
        from tokencredit.methods import METHODS

        check_choices(self)
        for name in (self.baseline, *self.methods):
            METHODS[name]
        if (self.prompts or LEAST) < LEAST or (self.group or 2) < 2:
            raise ValueError(
                f"an interval needs at least {LEAST} prompts (--prompts), and groups of 2 (--group); got"
                f" {self.prompts} and {self.group}"
            )
        if self.batch < 1 or (self.draws or 2) < 2 or (self.directions or 2) < 2:
            raise ValueError(
                f"the study needs a batch of 1, 2 draws and 0 or 2 directions at least; got {self.batch}, {self.draws}"
                f" and {self.directions}"
            )

    def fitted(self, parameters: int, there: int | None) -> VarianceConfig:
        """With the sizes that nobody named: for a model of so many parameters on a task of `there` prompts."""
        small = parameters <= FULL
        return replace(
            self,
            prompts=self.prompts or usual(384, parameters, there, least=12),
            group=self.group or (8 if small else 4),
            draws=self.draws or (16 if small else 4),
        )


STUDY = Study(
    __package__,
    "Does weighting the tokens make the gradient less noisy, and at what bias?",
    "Bias and variance of weighted gradients",
    VarianceConfig,
    EXAMPLES,
    shared=POLICY,
)
