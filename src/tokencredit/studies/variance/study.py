"""Does a way of weighting tokens make the gradient less noisy, and at what bias?

Prompts are answered by a checkpoint, twice a group of each; every method weighs the tokens of the same rollouts; the
gradient of every group is taken, and its products with those of other prompts give variance and bias
(`variance_estimators`). Beside it: what keeping only some tokens at random would cost, and a world where everything is
known exactly.

A killed study goes on where it was and ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tokencredit.durable import write_parquet
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.prompts import prompt_text
from tokencredit.methods import METHODS
from tokencredit.studies.stages import Stages
from tokencredit.studies.study import Work
from tokencredit.studies.variance.estimators import GradientMoments
from tokencredit.studies.variance.figures import Figures
from tokencredit.studies.variance.findings import findings
from tokencredit.studies.variance.gradients import num_parameters, token_counts, weights_of
from tokencredit.studies.variance.plan import TRUTHS, checkpoints, names_of
from tokencredit.studies.variance.question import VarianceConfig
from tokencredit.studies.variance.sampling import FRACTIONS, curves, drawn_check
from tokencredit.studies.variance.setting import Setting, prepare

TRUE = "(true)"
"""What the estimator of the true policy gradient is called among the methods."""


def run(config: VarianceConfig, work: Work) -> dict[str, Any]:
    """The whole study: its blocks; prompts.parquet."""
    config = replace(config, policy=config.policy.settled())
    found = checkpoints(config)
    about = {"task": config.policy.task, "model": config.policy.model, "judge": config.policy.load_task()}
    work.begin(**about, policy=config.policy.as_dict())
    figures = Figures(work.book, config.batch)
    blocks, rows = [], []
    for label, opened in found.items():
        stages = Stages(work.stages.folder / f"{seed_of(label):016x}")
        setting = prepare(config, label, opened(), stages, work.say)
        tables = _tables(setting, stages, work.say)
        blocks.append(_block(config, setting, tables, stages, figures) | {"seconds": sum(stages.seconds.values())})
        rows += _rows(setting, tables)
    work.say("the exact world")
    exact = figures.exact_world([METHODS[name] for name in names_of(config, None)], METHODS[config.baseline])
    write_parquet(work.path / "prompts.parquet", rows)
    study = {"checkpoints": blocks, "exact": exact}
    return study | {"findings": findings(study, work.book.figures, config.baseline)}


def _tables(setting: Setting, stages: Stages, say: Callable[[str], None]) -> dict[str, dict[str, np.ndarray]]:
    """{method: its table of products}."""
    tables = {}
    for name, method in {TRUE: TRUTHS[setting.truth], **setting.methods}.items():
        say(f"{setting.label}: gradients of {name}")

        def make(method=method) -> dict[str, np.ndarray]:
            weight = weights_of(method, setting.batch.rollouts)
            return setting.reference.products(setting.gradients(weight)) | token_counts(weight, setting.batch.rollouts)

        tables[name] = stages.arrays(f"method_{name}", make)
    return tables


def _block(config: VarianceConfig, setting: Setting, tables: dict, stages: Stages, figures: Figures) -> dict[str, Any]:
    """Everything that the report shows of one checkpoint."""
    rollouts, label = setting.batch.rollouts, setting.label
    moments = {name: GradientMoments.of(table, tables[TRUE]) for name, table in tables.items() if name != TRUE}
    weight = weights_of(setting.methods[config.baseline], rollouts)

    def draw() -> dict[str, dict]:
        seed = seed_of(config.seed, "drawn")
        return {
            name: asdict(each)
            for name, each in drawn_check(setting.checkpoint, setting.batch, weight, config.draws, seed).items()
        }

    num = {
        "prompts": config.prompts,
        "rollouts": len(rollouts),
        "tokens": int(rollouts.mask.sum()),
        "parameters": num_parameters(setting.checkpoint),
        "success": float(rollouts.reward.mean()),
        "mixed": float(rollouts.mixed.double().mean()),
    }
    costs = curves(weight, rollouts, moments[config.baseline])
    return {
        "label": label,
        "truth": setting.truth,
        "directions": setting.directions,
        "num": num,
        "methods": figures.methods(label, moments, config.baseline),
        "sampling": figures.sampling(label, costs, FRACTIONS, stages.value("drawn", draw)),
    }


def _rows(setting: Setting, tables: dict[str, dict]) -> list[dict[str, Any]]:
    """One row per checkpoint, method and prompt."""
    every = len(setting.batch) // setting.batch.num_prompts
    prompts = [prompt_text(row["prompt"]) for row in setting.batch.rows[::every]]
    return [
        {
            "checkpoint": setting.label,
            "method": name,
            "prompt": i,
            "text": prompts[i],
            **{key: float(values[i]) for key, values in table.items()},
        }
        for name, table in tables.items()
        for i in range(len(table["square"]))
    ]
