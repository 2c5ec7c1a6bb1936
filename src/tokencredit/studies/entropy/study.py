"""Does the predicted change of entropy come true? Several updates of one checkpoint, a sweep of learning rates, three
kinds of truth.

Every update has a batch, evaluation prompts and rollouts of its own, so that the errors of different updates share
nothing; what they do share is the momentum of the checkpoint's optimizer. A killed study goes on where it was and ends
with the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokencredit.durable import write_json
from tokencredit.dynamics import precision
from tokencredit.dynamics.batch import prompts_of, roles
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.entropy import entropy_weights
from tokencredit.dynamics.measured import FEW
from tokencredit.exclusive import holds_out
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.prompts import prompt_text
from tokencredit.runs import Run
from tokencredit.studies.arguments import open_from
from tokencredit.studies.book import Book
from tokencredit.studies.entropy import figures
from tokencredit.studies.entropy.measure import BEST, Arrays, Evaluation, Sizes, draw_update, measure
from tokencredit.studies.entropy.statistics import UpdateStatistics
from tokencredit.studies.processes import Forked, last_words, run_all
from tokencredit.studies.stages import Stages

STUDY = "entropy dynamics"
ABOVE = 0.5
"""Decades of the sweep that lie above the optimizer's own rate, to the next step of it."""
SHOWN = 256
ROUNDED = 512
"""Rollouts whose tokens are written, and rollouts that rounding is measured on."""


@dataclass(frozen=True)
class SweepConfig(Sizes):
    """Which run, checkpoint, method and optimizer (as `dynamics.arguments`); how many updates; the sweep's rates and
    decades; the sizes.
    """

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    checkpoint: int | None = None
    method: str | None = None
    optimizer: str | None = None
    updates: int = 8
    rates: int = 12
    decades: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.eval_prompts, self.sweep_prompts) < FEW:
            raise ValueError(
                f"{min(self.eval_prompts, self.sweep_prompts)} evaluation prompts are too few for an interval: take"
                f" {FEW} at least; hundreds are useful"
            )
        if self.updates < 1 or self.rates < 4 or not self.decades > ABOVE or min(self.fresh, self.sweep_fresh) < 1:
            raise ValueError(
                f"a sweep needs an update, at least 4 rates over more than {ABOVE:g} decades, and fresh rollouts"
            )
        if not 2 <= self.sub_batch <= self.eval_prompts // 2:
            raise ValueError(
                f"sub-batches hold 2 rollouts or more, and the {self.eval_prompts} evaluation prompts have to make at"
                f" least two of them: {self.sub_batch} do not fit"
            )

    @property
    def factors(self) -> tuple[float, ...]:
        """Rates of the sweep as multiples of the optimizer's own, which is one of them."""
        step = self.decades / (self.rates - 1)
        above = round(ABOVE / step)
        return tuple(10 ** (step * k) for k in range(above - self.rates + 1, above + 1))


@holds_out
def run(
    config: SweepConfig, out: Path, *, workers: int | None = None, command: str = "", say: Callable[[str], None] = print
) -> dict:
    """The whole study in the directory `out`; what `result.json` holds."""
    checkpoint = open_from(config)
    identity = asdict(config) | {"checkpoint": str(checkpoint.path), "lr": checkpoint.needs_optimizer().lr}
    record = Run.create(
        out,
        name=out.name,
        method=repr(checkpoint.method),
        method_name=STUDY,
        task=checkpoint.config.task,
        model=str(checkpoint.path),
        config=identity,
        seed=config.seed,
        command=command,
    )
    stages, book = Stages(out / "stages"), Book(command, config.seed)
    arrays = _updates(config, checkpoint, stages, workers, say)
    say("how small a change the arithmetic can show")
    rounding = stages.arrays("precision", lambda: _precision(config, checkpoint))
    say("tokens of one evaluation")
    record.write_tokens(checkpoint.step, stages.value("tokens", lambda: _tokens(config, checkpoint)))
    say("figures")
    updates = [UpdateStatistics(each, config.factors) for each in arrays]
    result = figures.figures(updates, rounding, config.sub_batch, book)
    figures.write_rollouts(out / "rollouts.parquet", arrays)
    about = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "method": checkpoint.method.name,
        "task": checkpoint.config.task,
        "temperature": checkpoint.temperature,
        "lr": updates[0].arrays["lr"].item(),
    }
    result = {
        "study": STUDY,
        "command": command,
        "seed": config.seed,
        "about": about,
        "figures": book.figures,
        **result,
        "config": identity,
        "seconds": stages.seconds,
    }
    write_json(out / "result.json", result)
    record.finish()
    return result


def _updates(
    config: SweepConfig, checkpoint: Checkpoint, stages: Stages, workers: int | None, say: Callable[[str], None]
) -> list[Arrays]:
    """Every update's sums; several side by side in processes of their own where there are cores for it and no GPU to
    share.
    """
    names = [f"update_{k}" for k in range(config.updates)]
    waiting = [k for k, name in enumerate(names) if not (stages.folder / f"{name}.npz").exists()]
    alone = checkpoint.model.device.type != "cpu"
    workers = workers or (1 if alone else min(os.cpu_count() or 1, 4))
    if workers > 1 and len(waiting) > 1:
        log = stages.folder / "workers.log"
        jobs = {
            names[k]: partial(Forked, _measure_alone, (config, k, stages.folder), log, (__name__,)) for k in waiting
        }
        say(f"{len(waiting)} updates, {workers} side by side")
        if failed := run_all(
            jobs, workers, lambda name, code: None if code is None else say(f"{name.replace('_', ' ')} has ended")
        ):
            raise RuntimeError(f"{', '.join(failed)}: {last_words(log)}")
    found = []
    for k, name in enumerate(names):
        say(f"update {k + 1} of {len(names)}")
        found.append(stages.arrays(name, partial(_measure, config, checkpoint, k)))
    return found


def _measure(config: SweepConfig, checkpoint: Checkpoint, k: int) -> Arrays:
    seed = seed_of("update", config.seed, k)
    return measure(
        checkpoint, draw_update(checkpoint, config, seed), config, config.factors, seed_of("evaluation", config.seed, k)
    )


def _measure_alone(config: SweepConfig, k: int, folder: Path) -> None:
    """What a process of its own does."""
    torch.set_num_threads(1)
    Stages(folder).arrays(f"update_{k}", lambda: _measure(config, open_from(config), k))


def _precision(config: SweepConfig, checkpoint: Checkpoint) -> Arrays:
    """Rounding along the first update, on rollouts of the first evaluation's prompts."""
    direction = draw_update(checkpoint, config, seed_of("update", config.seed, 0)).vector
    rows = prompts_of(checkpoint, min(config.sweep_prompts, ROUNDED), seed_of("precision", config.seed))
    evaluation = Evaluation.of(checkpoint, rows, seed_of("precision", config.seed))
    opened = {name: open_from(config, dtype=dtype) for name, dtype in precision.DTYPES.items()}
    terms = precision.expansion(opened["float64"], evaluation.batch, evaluation.baseline(), direction)
    found: Arrays = {"factors": precision.FACTORS}
    for name, each in opened.items():
        rounding = precision.rounding(each, evaluation.batch, evaluation.baseline(), direction, terms)
        found |= {f"{name}_changes": rounding.changes, f"{name}_noise": rounding.noise, "expansion": rounding.expansion}
    return found


def _tokens(config: SweepConfig, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Completions with what the first update is predicted to do to each of their tokens, and what each adds to the
    predicted change.
    """
    update = draw_update(checkpoint, config, seed_of("update", config.seed, 0))
    seed = seed_of("evaluation", config.seed, 0)
    rows = prompts_of(checkpoint, config.eval_prompts, seed_of(seed, "prompts"))[:SHOWN]
    evaluation = Evaluation.of(checkpoint, rows, seed_of(seed, "rollouts"))
    batch, (logprob, entropy) = evaluation.batch, evaluation.passes.forward(update.vector)
    weights = entropy_weights(batch, BEST)
    columns = {
        "logprob": batch.rollouts.score("logprob"),
        "entropy": batch.rollouts.score("entropy"),
        "logprob_change": logprob,
        "entropy_change": entropy,
        "share": weights.logprob * logprob + weights.entropy * entropy,
    }
    role = roles(checkpoint, batch)
    return [
        {
            "group": int(batch.rollouts.group[i]),
            "prompt": prompt_text(batch.rows[i]["prompt"]),
            "reward": float(batch.rollouts.reward[i]),
            "completion": checkpoint.tokenizer.decode(list(ids), skip_special_tokens=True),
            "success": bool(batch.rollouts.success[i]),
            "reason": batch.reasons[i],
            "token_ids": list(ids),
            "tokens": checkpoint.policy.tokens(ids),
            "role": role[i] if role else None,
            **{name: x[i, : len(ids)].tolist() for name, x in columns.items()},
        }
        for i, ids in enumerate(batch.completions)
    ]
