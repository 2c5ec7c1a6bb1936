"""Does the change of entropy that is predicted of the next step come true, and over which learning rates?"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from tokencredit.studies.arguments import PROMPTS, StepConfig, at_most, usual
from tokencredit.studies.options import check_choices, option
from tokencredit.studies.study import RUN, Study

ABOVE = 0.5
"""Decades of the sweep that lie above the optimizer's own rate, to the next step of it."""
FEWEST = 8
"""Evaluation prompts below which no interval is given (`measured.FEW`)."""
SMALL = {"updates": 4, "share": 0.25}
EXAMPLES = """\
  tokencredit dynamics entropy --run runs/demo/grpo-0
  tokencredit dynamics entropy --run runs/grpo --checkpoint 40 --updates 16 --workers 4
  tokencredit dynamics entropy --run runs/grpo --small
  tokencredit dynamics entropy --run runs/sft --optimizer sgd"""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of prompts and rollouts: of an update's batch; of a prediction; of the truth at the optimizer's own rate
    and at every other one.
    """

    prompts: int | None = option(None, f"prompts of an update's batch (default: {PROMPTS}, or all that the task has)")
    group: int = option(8, "rollouts of each of them")
    eval_prompts: int | None = option(
        None,
        "prompts, with one rollout each, that a prediction is made on (default: 8192; fewer for a model over 4M"
        " parameters, and no more than the task has)",
    )
    fresh: int = option(2, "fresh rollouts of each of them, on either side of the policy")
    sweep_prompts: int | None = option(
        None, "prompts at the other learning rates (default: 1024; an eighth of the others at most)"
    )
    sweep_fresh: int = option(1, "fresh rollouts of each of these")
    sub_batch: int | None = option(
        None, "rollouts of the small predictions whose spread is shown (default: 256, at most an eighth of the others)"
    )


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Sizes, StepConfig):
    """Which checkpoint and optimizer; how many updates; the sweep's rates and decades; the sizes."""

    updates: int = option(8, "steps that are looked at, each on a batch of its own")
    rates: int = option(12, "learning rates of the sweep")
    decades: float = option(2.0, "that they span, half of one above the optimizer's own")
    softmax: Literal["float64"] | None = option(
        None, "precision of the softmax and of what is made of it (default: the model's)", later=True
    )
    share: float = field(default=1.0, metadata={"identity": False})
    workers: int | None = option(
        None, "updates side by side (default: one per core, at most 4; 1 on a GPU and of a large model)", identity=False
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for flag, number in {"--eval-prompts": self.eval_prompts, "--sweep-prompts": self.sweep_prompts}.items():
            if number is not None and number < FEWEST:
                raise ValueError(
                    f"{flag} {number} are too few for an interval: take {FEWEST} at least; hundreds are useful"
                )
        if self.updates < 1 or self.rates < 4 or not self.decades > ABOVE or min(self.fresh, self.sweep_fresh) < 1:
            raise ValueError(
                f"a sweep needs --updates, --fresh and --sweep-fresh of 1 or more, --rates of 4 or more and"
                f" --decades over {ABOVE:g}; got {self.updates}, {self.fresh}, {self.sweep_fresh}, {self.rates},"
                f" {self.decades:g}"
            )
        if None not in (self.sub_batch, self.eval_prompts) and not 2 <= self.sub_batch <= self.eval_prompts // 2:
            raise ValueError(
                f"--sub-batch {self.sub_batch}: a small prediction has 2 rollouts or more, and --eval-prompts"
                f" {self.eval_prompts} have to make at least two of them"
            )

    def fitted(self, parameters: int, there: int | None) -> SweepConfig:
        """With the sizes that nobody named: for a model of so many parameters on a task of `there` prompts."""
        whole = self.eval_prompts or usual(8192 * self.share, parameters, there, least=64)
        sweep = self.sweep_prompts or min(max(whole // 8, FEWEST), max(round(1024 * self.share), FEWEST))
        sub = self.sub_batch or max(min(256, whole // 8), 2)
        own = self.prompts or at_most(PROMPTS, there)
        return replace(self, prompts=own, eval_prompts=whole, sweep_prompts=sweep, sub_batch=sub)

    @property
    def factors(self) -> tuple[float, ...]:
        """Rates of the sweep as multiples of the optimizer's own, which is one of them."""
        step = self.decades / (self.rates - 1)
        above = round(ABOVE / step)
        return tuple(10 ** (step * k) for k in range(above - self.rates + 1, above + 1))


STUDY = Study(
    __package__,
    "How does the next step change entropy, as predicted and in truth, over two decades of learning rates?",
    "Predicted and true change of entropy",
    SweepConfig,
    EXAMPLES,
    group="dynamics",
    shared=RUN,
    small=SMALL,
)
