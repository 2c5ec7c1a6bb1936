"""How noisy is a checkpoint's gradient, where does the noise come from, and what batch is best for the cost?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokencredit.studies.arguments import PROMPTS, CheckpointConfig, at_most
from tokencredit.studies.options import option
from tokencredit.studies.study import RUN, Study

EXAMPLES = """\
  tokencredit dynamics noise-scale --run runs/demo/grpo-0
  tokencredit dynamics noise-scale --run runs/demo/grpo-0 --checkpoint 18 --prompts 256 --cost-prompt 4
  tokencredit dynamics noise-scale --run Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --option chat=true --prompts 32"""

FEWEST = 3
"""Prompts below which no interval is given."""
RUNS = "the run's own batch"
"""What other batches are compared with, where there is a run."""


@dataclass(frozen=True, kw_only=True)
class NoiseScaleConfig(CheckpointConfig):
    """What is asked; costs are in any unit, the same for all."""

    cost_prompt: float = option(0.0, "cost of a prompt, its rollouts apart")
    cost_rollout: float = option(1.0, "cost of one rollout")
    budget: float | None = option(
        None, "cost of a batch (default: that of the run's own batch, or where there is no run of the one drawn here)"
    )

    def __post_init__(self) -> None:
        if self.prompts is not None and self.prompts < FEWEST:
            raise ValueError(
                f"--prompts must be at least {FEWEST} for an interval, got {self.prompts}; {PROMPTS} or more are useful"
            )
        if self.group < 2:
            raise ValueError(
                f"--group must be at least 2, got {self.group}: a rollout is compared with the others of its prompt."
                " From 4 on the noise is also split between prompts and rollouts"
            )
        if self.cost_prompt < 0 or self.cost_rollout <= 0:
            raise ValueError(
                f"--cost-rollout must be above 0 and --cost-prompt not below it, got {self.cost_rollout:g},"
                f" {self.cost_prompt:g}"
            )

    def fitted(self, there: int | None) -> NoiseScaleConfig:
        """With the number of prompts that nobody named, on a task of `there` prompts."""
        return replace(self, prompts=self.prompts or at_most(PROMPTS, there))


STUDY = Study(
    __package__,
    "How noisy is a checkpoint's gradient, and how should prompts and rollouts share the budget?",
    "Gradient noise scale",
    NoiseScaleConfig,
    EXAMPLES,
    group="dynamics",
    shared=RUN,
)
