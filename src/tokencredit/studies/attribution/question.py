"""Who causes the next step's change of entropy and reward, and what would other methods have done with the same
rollouts?
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokencredit.studies.arguments import PROMPTS, StepConfig, at_most, usual
from tokencredit.studies.options import check_choices, option
from tokencredit.studies.study import RUN, Study

EXAMPLES = """\
  tokencredit dynamics attribute --run runs/grpo
  tokencredit dynamics attribute --run runs/grpo --checkpoint 20 --methods dapo gtpo "clip_cov(fraction=0.02)"
  tokencredit dynamics attribute --run runs/grpo --optimizer sgd --trees 0
  tokencredit dynamics attribute --run runs/grpo --pivotality runs/pivots"""
COMPARED = (
    "grpo",
    "clip_cov",
    "kl_cov",
    "gtpo",
    "grpo_s",
    "entropy_advantage",
    "forking_tokens",
    "dapo",
    "ptw_entropy",
)
SIZES = ("PROMPTS", "ROLLOUTS")
FEWEST = 3
"""Prompts below which no interval is given."""
DEFAULT = "default: 1024, fewer for a model over 4M parameters and no more than the task has, and"


@dataclass(frozen=True, kw_only=True)
class AttributeConfig(StepConfig):
    """What is asked."""

    methods: tuple[str, ...] = option(
        COMPARED,
        "methods to compare on the same rollouts: names, name(field=value), or reprs (default: grpo, the covariance"
        " control, the entropy-shaped and the weighted ones, dapo)",
    )
    baseline: str = option("grpo", "the method that the others are compared with")
    entropy: tuple[int, int] | None = option(
        None, f"what the gradient of entropy is estimated on, prompts and rollouts of each ({DEFAULT} 4)", metavar=SIZES
    )
    reward: tuple[int, int] | None = option(
        None, f"what the gradient of reward is estimated on, prompts and rollouts of each ({DEFAULT} 8)", metavar=SIZES
    )
    trees: int = option(32, "prompts with exact pivotality, on the embedded world; 0 for none")
    pivotality: str | None = option(
        None, "a run of `tokencredit pivotality run` on this checkpoint, in place of trees", metavar="DIR"
    )
    bootstraps: int = option(1000, "draws of prompts for the intervals")

    def __post_init__(self) -> None:
        check_choices(self)
        prompts, entropy, reward = self.prompts or PROMPTS, self.entropy or (1024, 4), self.reward or (1024, 8)
        few = prompts < FEWEST or min(entropy[0], reward[0]) < FEWEST
        if few or self.group < 2 or reward[1] < 2:
            raise ValueError(
                f"intervals need at least {FEWEST} prompts of the step (--prompts) and of either evaluation (--entropy,"
                " --reward), credit (--group) and the gradient of the reward at least 2 rollouts of each; got"
                f" --prompts {prompts} --group {self.group} --entropy {entropy[0]} {entropy[1]} --reward {reward[0]}"
                f" {reward[1]}"
            )

    def fitted(self, parameters: int, there: int | None) -> AttributeConfig:
        """With the sizes that nobody named: for a model of so many parameters on a task of `there` prompts."""
        num = usual(1024, parameters, there)
        own = self.prompts or at_most(PROMPTS, there)
        return replace(self, prompts=own, entropy=self.entropy or (num, 4), reward=self.reward or (num, 8))


STUDY = Study(
    __package__,
    "Who causes the next step's change of entropy and reward, and what would other methods have done with the same"
    " rollouts?",
    "Who caused the change of entropy and reward",
    AttributeConfig,
    EXAMPLES,
    group="dynamics",
    shared=RUN,
    action="attribute",
)
