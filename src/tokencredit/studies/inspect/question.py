"""Which tokens of a trainer's rollout log were credited, whether rightly, and what the update did with them?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tokencredit.lm.arguments import add_policy, policy_arguments, policy_config
from tokencredit.studies.options import check_choices, option
from tokencredit.studies.study import Shared, Study

if TYPE_CHECKING:
    from tokencredit.lm.policy import PolicyConfig

PARTS = ("log", "credit", "audit", "autopsy", "mismatch", "pair")
EXAMPLES = """\
  tokencredit inspect outputs/completions
  tokencredit inspect outputs/completions --model outputs/checkpoint-100 --step 100
  tokencredit inspect rollouts.jsonl --parts log credit --methods grpo gtpo "clip_cov(fraction=0.02)"
  tokencredit inspect rollouts.jsonl --column reward=score --model Qwen/Qwen2.5-0.5B-Instruct --chat
  tokencredit inspect before.parquet after.parquet"""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What is asked. logs: one log in any number of files, or two logs; policy: None where no model is named."""

    logs: tuple[str, ...]
    policy: PolicyConfig | None = None
    format: str | None = option(None, "of the log, where its files do not tell it (`docs/inspect.md`)", metavar="NAME")
    column: tuple[str, ...] = option(
        (), "what a column is, like reward=score; repeatable", action="append", metavar="NAME=COLUMN"
    )
    parts: tuple[str, ...] = option(
        PARTS, f"which parts of the answer: {', '.join(PARTS)} (default: all that can be given)", identity=False
    )
    step: int | None = option(
        None, "the step whose credit is audited and whose update is taken apart (default: the last)", metavar="N"
    )
    prompts: int = option(64, "prompts of that step, and as many others to evaluate its update on, at the most")
    methods: tuple[str, ...] = option(
        ("grpo", "dapo", "gtpo", "forking_tokens", "ptw_entropy"),
        "methods whose credit on the same rollouts is shown beside the logged one",
    )
    loss: str = option("grpo", "the method whose loss the logged credit goes into; also the one compared with")
    tokens: int = option(100_000, "tokens that the audit may generate")
    minutes: float | None = option(None, "minutes that the audit may take, in place of --tokens")
    rollouts: int = option(8, "re-sampled for every audited token")
    optimizer: Literal["adamw", "sgd"] | None = option(
        None, "a fresh optimizer (default: the checkpoint's, or adamw where it has none)"
    )
    learning_rate: float | None = option(None, "of a fresh optimizer (default: 1e-6; 5e-4 on the embedded world)")
    parameters: str = option("all", "of the model that the update moves: all, or a name pattern like '*.29.mlp.*'")
    success_above: float = option(0.0, "a rollout is a success when its reward is above this")
    bootstraps: int = option(1000, "draws of prompts for the intervals")
    seed: int = option(0, "of what is sampled of the log, of rollouts and resampling (default: 0)")

    def __post_init__(self) -> None:
        check_choices(self)
        if unknown := [name for name in self.parts if name not in PARTS]:
            raise ValueError(f"there is no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
        if wrong := [each for each in self.column if "=" not in each]:
            raise ValueError(f"--column says what a column is as NAME=COLUMN, like reward=score, not {wrong[0]!r}")
        if self.rollouts < 4:
            raise ValueError("--rollouts: an effect with an interval takes at least 4 rollouts of a token")

    @property
    def columns(self) -> dict[str, str]:
        """{what it is: column of the log}."""
        return dict(each.split("=", 1) for each in self.column)

    @property
    def split(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(files of the log, files of the log it is compared with): two paths are two logs, more are one."""
        return (self.logs[:1], self.logs[1:]) if len(self.logs) == 2 else (self.logs, ())


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "logs",
        nargs="+",
        metavar="LOG",
        help="files or a directory of a trainer's rollouts, or of ours; two are two logs, which are compared",
    )
    add_policy(parser, default="none, and the parts that need one are left out")


def _read(args: argparse.Namespace) -> Mapping[str, Any]:
    named = "model" in policy_arguments(args)
    return {"logs": tuple(args.logs), "policy": policy_config(args) if named else None}


STUDY = Study(
    __package__,
    "From a trainer's rollout log to the tokens that did it: credit, audit against measured Q - V, autopsy of a step.",
    "What the log says of its tokens",
    InspectConfig,
    EXAMPLES,
    group="",
    shared=Shared(_add, _read),
)
