"""Does the predicted change of entropy come true? Several updates of one checkpoint, a sweep of learning rates, three
kinds of truth.

Every update has a batch, evaluation prompts and rollouts of its own, so that the errors of different updates share
nothing; what they do share is the momentum of the checkpoint's optimizer. A killed study goes on where it was and ends
with the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokencredit.dynamics import precision
from tokencredit.dynamics.batch import prompts_of, roles
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.entropy import entropy_weights
from tokencredit.dynamics.update import Update
from tokencredit.dynamics.vectors import large, trained
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.load import run_of
from tokencredit.lm.prompts import prompt_text
from tokencredit.stages import Stages
from tokencredit.studies import forecast
from tokencredit.studies.arguments import check_prompts, of_checkpoint, open_from, parameters_of, prompts_there
from tokencredit.studies.entropy import figures
from tokencredit.studies.entropy.measure import BEST, Arrays, Evaluation, Measurement, together
from tokencredit.studies.entropy.question import FEWEST, SweepConfig
from tokencredit.studies.entropy.statistics import UpdateStatistics
from tokencredit.studies.forecast import ALONG, BACKWARD
from tokencredit.studies.options import identity
from tokencredit.studies.processes import Forked, last_words, run_all
from tokencredit.studies.study import Say, Work, silent

SHOWN = 256
ROUNDED = 512
"""Rollouts whose tokens are written, and rollouts that rounding is measured on."""


def run(config: SweepConfig, work: Work) -> dict[str, Any]:
    """The whole study: its blocks; rollouts.parquet and tokens of the first evaluation."""
    check_prompts(config.policy, {"--prompts": config.prompts})
    evaluated = {"--eval-prompts": config.eval_prompts, "--sweep-prompts": config.sweep_prompts}
    check_prompts(config.policy, evaluated, least=FEWEST)
    checkpoint = _open(config)
    lr = checkpoint.needs_optimizer().lr
    config = config.fitted(parameters_of(checkpoint), prompts_there(checkpoint))
    about = {"checkpoint": str(checkpoint.path), "lr": lr}
    work.begin(**of_checkpoint(checkpoint), config=identity(config), **about)
    if run_of(config.policy.model) == Path(config.policy.model):  # the run may go on meanwhile
        config = replace(config, checkpoint=checkpoint.step)
    checkpoint = checkpoint.filed(work.record.path)
    _foretell(config, checkpoint, work)
    arrays = _updates(config, checkpoint, work)
    first = _measurement(config, checkpoint, 0)
    work.say("how small a change the arithmetic can show")
    rounding = work.stages.arrays("precision", lambda: _precision(config, checkpoint, first.update))
    work.say("tokens of one evaluation")
    work.record.write_tokens(checkpoint.step, work.stages.value("tokens", lambda: _tokens(checkpoint, first)))
    work.say("figures")
    updates = [UpdateStatistics(each, config.factors) for each in arrays]
    figures.write_rollouts(work.path / "rollouts.parquet", arrays)
    about = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "method": checkpoint.method.name,
        "task": checkpoint.config.task,
        "temperature": checkpoint.temperature,
        "lr": updates[0].arrays["lr"].item(),
    }
    return {"about": about, **figures.figures(updates, rounding, config.sub_batch, work.book)}


def _open(config: SweepConfig, **options: Any) -> Checkpoint:
    """The checkpoint, with the softmax that is asked for."""
    softmax = torch.float64 if config.softmax == "float64" else None
    return replace(open_from(config, **options), softmax=softmax)


def _foretell(config: SweepConfig, checkpoint: Checkpoint, work: Work) -> None:
    """The forecast, for all updates."""
    rates, many = 2 * len(config.factors), config.updates
    evaluated = 3 + 4 * ALONG
    rounded = min(config.sweep_prompts or ROUNDED, ROUNDED)
    widths = 1 if large(trained(checkpoint.model)) else 3  # float64 counts as two
    rounding = widths * (1 + len(precision.FACTORS)) + min(widths, 2) * 3 * ALONG
    parts = (
        forecast.Drawn(many * config.prompts, config.group, 1 + BACKWARD),
        forecast.Drawn(many * config.eval_prompts, 1, evaluated),
        forecast.Drawn(many * config.eval_prompts, 5 * config.fresh, 0),
        forecast.Drawn(many * config.sweep_prompts, 1, 2 * (1 + rates)),
        forecast.Drawn(many * config.sweep_prompts, config.sweep_fresh * (rates + 1), 0),
        forecast.Drawn(rounded, 1, 1 + rounding),
    )
    first = checkpoint.policy.encode_rows(prompts_of(checkpoint, 1, config.seed))[0]
    vectors, filed = (2, 3 + checkpoint.needs_optimizer().decays) if checkpoint.scratch else (4, 0)
    work.tell(forecast.forecast(checkpoint, parts, vectors, first, filed))


def _updates(config: SweepConfig, checkpoint: Checkpoint, work: Work) -> list[Arrays]:
    """Every update's sums; several side by side in processes of their own where there are cores for it and no GPU to
    share.
    """
    stages, names = work.stages, [f"update_{k}" for k in range(config.updates)]
    waiting = [k for k, name in enumerate(names) if not all(map(stages.has, _stored(config, checkpoint, k)))]
    alone = checkpoint.model.device.type != "cpu" or large(trained(checkpoint.model))
    workers = config.workers or (1 if alone else min(os.cpu_count() or 1, 4))
    if workers > 1 and len(waiting) > 1:
        log = stages.folder / "workers.log"
        jobs = {
            names[k]: partial(Forked, _measure_alone, (config, k, stages.folder), log, (__name__,)) for k in waiting
        }
        work.say(f"{len(waiting)} updates, {workers} side by side")

        def ended(name: str, code: int | None) -> None:
            if code is not None:
                work.say(f"{name.replace('_', ' ')} has ended")

        if failed := run_all(jobs, workers, ended):
            raise RuntimeError(f"{', '.join(failed)}: {last_words(log)}")
    return [_measure(config, checkpoint, k, stages, work.say) for k in range(config.updates)]


def _measurement(config: SweepConfig, checkpoint: Checkpoint, k: int) -> Measurement:
    seeds = seed_of("update", config.seed, k), seed_of("evaluation", config.seed, k)
    return Measurement(checkpoint, config, config.factors, *seeds)


def _stored(config: SweepConfig, checkpoint: Checkpoint, k: int) -> dict[str, tuple[str, Callable[[], Arrays]]]:
    """{name of the stage: (what is measured, in words; how)} of an update."""
    parts = _measurement(config, checkpoint, k).parts()
    return {f"update_{k}_{number}": part for number, part in enumerate(parts.items())}


def _measure(config: SweepConfig, checkpoint: Checkpoint, k: int, stages: Stages, say: Say) -> Arrays:
    found = []
    for name, (what, make) in _stored(config, checkpoint, k).items():
        say(f"update {k + 1} of {config.updates}: {what}")
        found.append(stages.arrays(name, make))
    return together(found, config.rates)


def _measure_alone(config: SweepConfig, k: int, folder: Path) -> None:
    """What a process of its own does; `folder` is that of the stages, in the study's."""
    torch.set_num_threads(1)
    _measure(config, _open(config).filed(folder.parent), k, Stages(folder), silent)


def _precision(config: SweepConfig, checkpoint: Checkpoint, update: Update) -> Arrays:
    """Rounding along an update, on rollouts of prompts of its own; of a large model in float32 alone."""
    direction = update.vector
    rows = prompts_of(checkpoint, min(config.sweep_prompts or ROUNDED, ROUNDED), seed_of("precision", config.seed))
    evaluation = Evaluation.of(checkpoint, rows, seed_of("precision", config.seed))
    own = next(checkpoint.model.parameters()).dtype
    opened = {
        name: checkpoint if dtype == own else _open(config, dtype=dtype)
        for name, dtype in precision.DTYPES.items()
        if dtype != torch.float64 or not large(trained(checkpoint.model))
    }
    terms = precision.expansion(list(opened.values())[-1], evaluation.batch, evaluation.baseline(), direction)
    found: Arrays = {"factors": precision.FACTORS}
    for name, each in opened.items():
        rounding = precision.rounding(each, evaluation.batch, evaluation.baseline(), direction, terms)
        found |= {f"{name}_changes": rounding.changes, f"{name}_noise": rounding.noise, "expansion": rounding.expansion}
    return found


def _tokens(checkpoint: Checkpoint, first: Measurement) -> list[dict[str, Any]]:
    """Completions with what the update is predicted to do to each of their tokens, and what each adds to the
    predicted change.
    """
    evaluation = Evaluation.of(checkpoint, first.rows[:SHOWN], seed_of(first.seed, "rollouts"))
    batch, (logprob, entropy) = evaluation.batch, evaluation.passes.forward(first.update.vector)
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
