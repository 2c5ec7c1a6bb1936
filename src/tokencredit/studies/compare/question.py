"""Which method learns faster, and which ends higher, at an equal budget of rollouts, tokens or seconds?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencredit.distribute.workers import add_ray
from tokencredit.durable import replace_file
from tokencredit.lm.arguments import add_policy, training_arguments
from tokencredit.studies.options import option
from tokencredit.studies.study import Say, Shared, Study

if TYPE_CHECKING:
    from rich.console import Console

STEPS, QUICK_STEPS, MOST_STEPS = 24, 16, 500
EXAMPLES = """\
  tokencredit study compare
  tokencredit study compare --quick
  tokencredit study compare --methods grpo gtpo my_method --seeds 8 --rates 1 --out runs/mine
  tokencredit study compare --methods grpo exact_value --budget seconds=20 --out runs/seconds
  tokencredit study compare --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --option chat=true --methods grpo gtpo \\
      --seeds 3 --steps 100 --set prompts=64 --set trl.bf16=true --out runs/qwen
  tokencredit study compare --table --out runs/compare"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is asked, as it is typed; `study.plan` makes the runs of it. `training`: fields of TrainConfig that the
    flags of a policy say. `ray`, `gpus_per_worker` say where the runs are and `memory` what each may take, in bytes,
    which changes nothing about them.
    """

    methods: tuple[str, ...] | None = option(
        None, "methods to compare (default: sixteen, those the task can give)", metavar="NAME"
    )
    baseline: str = option("grpo", "what the others are compared with")
    seeds: int | None = option(None, "runs per method, on the same prompts for all methods (default: 5)")
    budget: str = option(
        "rollouts",
        "what is equal: rollouts, tokens or seconds, and how much of it every run may spend (default: the rollouts of"
        " --steps)",
        metavar="UNIT[=N]",
    )
    steps: int | None = option(
        None,
        f"rollout batches (default: {STEPS}); with tokens or seconds, the most there may be (default: {MOST_STEPS})",
    )
    rates: tuple[float, ...] | None = option(
        None,
        "multiples of the learning rate that every method is checked at on validation prompts; one is taken without a"
        " check (default: 1 2 4)",
        metavar="X",
    )
    check_seeds: int = option(1, "runs per method and rate of that check")
    marks: int = option(10, "evaluations along the budget, at equal parts of it; a large model can do with fewer")
    final_prompts: int | None = option(
        None, "held-out prompts of the last evaluation (default: 512 on the embedded task, 128 on any other)"
    )
    final_samples: int | None = option(None, "completions of each of them (default: 8, and 4)")
    collapse: float = option(
        0.25,
        "a run collapses when its entropy falls under this share of the initial policy's",
        metavar="SHARE",
    )
    settings: tuple[str, ...] = option(
        (),
        "any other field of `tokencredit train`, for all runs: prompts, group, updates, learning_rate, trl.bf16 ...;"
        " repeatable",
        flag="--set",
        metavar="KEY=VALUE",
        action="append",
    )
    workers: int | None = option(
        None, "runs side by side (default: one per core, or as many as the memory holds; one with a GPU)"
    )
    quick: bool = option(False, "five methods, three seeds, two thirds of the budget, no check of learning rates")
    ray: str | None = None
    gpus_per_worker: float | None = None
    memory: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class CompareStudy(Study):
    """The comparison, which shows a bar for every run, and can print the Markdown table of a finished study."""

    def add_action(self, actions: argparse._SubParsersAction) -> None:
        super().add_action(actions)
        actions.choices["compare"].add_argument(
            "--table", action="store_true", help="print the Markdown table of the study in --out, and do nothing else"
        )

    def display(self, console: Console) -> AbstractContextManager[Say]:
        from tokencredit.studies.bars import bars

        return bars(console)

    def write_page(self, directory: str | Path) -> Path:
        """The page, and beside it the study's Markdown table."""
        from tokencredit.studies.compare.tables import markdown
        from tokencredit.studies.result import read_result

        table = markdown(read_result(directory)) + "\n"
        replace_file(Path(directory) / "table.md", lambda file: file.write(table.encode()))
        return super().write_page(directory)

    def command(self, args: argparse.Namespace) -> int:
        if not args.table:
            return super().command(args)
        from tokencredit.console import visible
        from tokencredit.studies.compare.tables import markdown
        from tokencredit.studies.result import read_result

        print(visible(markdown(read_result(args.out))))
        return 0


def _add(parser: argparse.ArgumentParser) -> None:
    add_policy(parser, process="every run")
    add_ray(parser, number=False)


def _read(args: argparse.Namespace) -> dict[str, Any]:
    where = {name: getattr(args, name) for name in ("ray", "gpus_per_worker", "memory")}
    return {"training": training_arguments(args), **where}


STUDY = CompareStudy(
    __package__,
    "Which method learns faster, and which ends higher, at an equal budget of rollouts, tokens or seconds?",
    "Methods at an equal budget",
    Comparison,
    EXAMPLES,
    shared=Shared(_add, _read),
)
