"""Does weighting the tokens of preference pairs help, at an equal number of rollouts?"""

from __future__ import annotations

from dataclasses import dataclass

from tokencredit.studies.arguments import OnPolicy
from tokencredit.studies.options import option
from tokencredit.studies.study import POLICY, Study

EXAMPLES = """\
  tokencredit study preference
  tokencredit study preference --small --out runs/preference-small
  tokencredit study preference --rollouts 16384 --seeds 3 --out runs/preference-16384
  tokencredit study preference --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --option chat=true \\
      --rates 1e-6 --out runs/qwen-p"""


@dataclass(frozen=True)
class Arm:
    """One way to spend the rollouts and to learn from what they bought: a kind of pairs (`studies.preference.lots`), a
    method of PREFERENCES, and both in words.
    """

    name: str
    pairs: str
    method: str
    what: str


ARMS = (
    Arm("dpo", "completions", "dpo", "right against wrong completions of a prompt, all tokens alike"),
    Arm("dpo_entropy", "completions", "dpo_entropy", "the same pairs, tokens weighted by the reference's entropy"),
    Arm("dpo_pivotal", "effects", "dpo_pivotal", "fewer pairs, tokens weighted by measured effects"),
    Arm("dpo_few", "effects", "dpo", "dpo_pivotal's pairs, all tokens alike: what they would do unweighted"),
    Arm("pivots", "pivots", "dpo", "pairs of one token at pivotal tokens, both sides verified"),
)
CONTRASTS = (("dpo_entropy", "dpo"), ("dpo_pivotal", "dpo"), ("pivots", "dpo"), ("dpo_pivotal", "dpo_few"))
"""(arm, the arm that it is compared with); Holm's adjustment is over these."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(OnPolicy):
    """What is asked."""

    rollouts: int = option(
        8192, "rollouts that every arm may spend on its pairs, those that measure and verify counted"
    )
    group: int = option(8, "rollouts of a prompt, of which completions are paired")
    effect_rollouts: int = option(4, "rollouts per token for its effect")
    skip_below: float = option(0.02, "no effect is measured where all alternatives together are less likely")
    fresh: int = option(32, "fresh rollouts of either side of a pivot")
    margin: float = option(0.1, "least difference of success rates at a pivot")
    steps: int = option(32, "optimizer steps, the same for all")
    pairs: int = option(32, "pairs of a step")
    rates: tuple[float, ...] = option(
        (1e-4, 3e-4), "learning rates; each arm takes its best on validation prompts, of the first seed"
    )
    seeds: int = option(4, "runs per arm: other training prompts, rollouts and order")
    prompts: int = option(256, "held-out prompts; half as many others choose the rates")
    samples: int = option(4, "completions of each")
    seed: int = option(0, "of the first run; the others follow (default: 0)")

    def __post_init__(self) -> None:
        least = {"rollouts": self.group, "group": 2, "effect_rollouts": 2, "steps": 1, "pairs": 1, "seeds": 1}
        for name, number in (least | {"prompts": 4, "samples": 1, "fresh": 2}).items():
            if getattr(self, name) < number:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {number}, got {getattr(self, name)}")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"--rates must be positive, got {' '.join(map(str, self.rates)) or 'none'}")
        if not (0 <= self.skip_below < 1 and 0 <= self.margin < 1):
            raise ValueError(
                f"--skip-below and --margin are from 0 to below 1, got {self.skip_below:g} and {self.margin:g}"
            )


STUDY = Study(
    __package__,
    "Does weighting the tokens of preference pairs help, at an equal number of rollouts?",
    "Preference pairs at equal rollouts",
    PreferenceConfig,
    EXAMPLES,
    small={"rollouts": 512, "steps": 6, "rates": (1e-3,), "seeds": 2, "prompts": 32, "samples": 2},
    shared=POLICY,
)
