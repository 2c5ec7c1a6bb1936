"""Is entropy, or any other proxy, a good guess of a token's effect on correctness?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tokencredit.studies.arguments import OnWorkers
from tokencredit.studies.options import check_choices, option
from tokencredit.studies.study import ON_WORKERS, Study

if TYPE_CHECKING:
    from tokencredit.tasks.task import Task

PROXIES = (
    "entropy",
    "surprisal",
    "varentropy",
    "margin",
    "head_norm",
    "last_block_norm",
    "gradient_norm",
    "fisher_trace",
    "perturbation_variance",
    "attention",
)
"""All kinds of `tokencredit.lm.importance` that need no reference model."""
SMALL = {"prompts": 12, "rollouts": 8, "bootstraps": 200, "condition_prompts": 12, "temperatures": (1.0,)}
EXAMPLES = """\
  tokencredit study correlation
  tokencredit study correlation --runs runs/demo/grpo-0 --out runs/correlation-grpo
  tokencredit study correlation --small --policy no-wording=my_base
  tokencredit study correlation --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --option chat=true \\
      --prompts 32 --out runs/qwen"""


@dataclass(frozen=True, kw_only=True)
class CorrelationConfig(OnWorkers):
    """What is measured. `top`, `few`: shares of tokens that a proxy may pick; `condition_samples`: completions of every
    prompt of a condition."""

    prompts: int = option(96, "held-out prompts")
    completions: int = option(2, "completions of every prompt")
    rollouts: int = option(32, "rollouts of alternatives at every token")
    exact: Literal["auto", "yes", "no"] = option(
        "auto", "exact effects from prefix trees (default: auto, on the embedded world)"
    )
    threshold: float = option(0.2, "|effect| from which a token is pivotal")
    top: float = 0.2
    few: float = 0.05
    bootstraps: int = option(1000, "draws of prompts for the intervals")
    proxies: tuple[str, ...] = option(
        PROXIES, "kinds of `tokencredit.lm.importance` (default: all that need no reference model)"
    )
    temperatures: tuple[float, ...] = option((0.5, 0.75, 1.0, 1.25, 1.5), "conditions of the model", nargs="*")
    policies: dict[str, str] = option(dict, "a further policy to compare; repeatable", flag="--policy")
    runs: tuple[str, ...] = option((), "training runs whose checkpoints are compared", nargs="*")
    condition_prompts: int = option(64, "prompts of every condition (default: 64; no more than --prompts)")
    condition_samples: int = 16
    seed: int = option(0, "(default: 0)")

    def __post_init__(self) -> None:
        check_choices(self)
        if not all(0 < t < math.inf for t in self.temperatures):
            raise ValueError(
                "at temperature 0 every other token has probability 0: there is nothing to compare with. Use"
                f" temperatures above 0, not {', '.join(f'{t:g}' for t in self.temperatures)}"
            )
        if self.prompts < 4 or self.completions < 1 or self.rollouts < 8 or self.condition_samples < 2:
            raise ValueError(
                "the study needs at least 4 prompts, 1 completion, 8 rollouts per token and 2 samples per condition"
            )

    def with_trees(self, task: Task) -> bool:
        """Whether exact effects are taken from prefix trees; ValueError where they are asked for and cannot be had."""
        from tokencredit.tasks.task import Walkable

        if self.exact == "yes" and not isinstance(task, Walkable):
            raise ValueError(f"exact effects need a world that prefix trees can walk, and {task.name} is none")
        return self.exact != "no" and isinstance(task, Walkable)


STUDY = Study(
    __package__,
    "Is entropy, or another proxy, a good guess of a token's effect on correctness?",
    "Which tokens matter",
    CorrelationConfig,
    EXAMPLES,
    small=SMALL,
    shared=ON_WORKERS,
)
