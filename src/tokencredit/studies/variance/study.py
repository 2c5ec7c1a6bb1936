"""Does a way of weighting tokens make the gradient less noisy, and at what bias?

Prompts are answered by a checkpoint, twice a group of each; every method weighs the tokens of the same rollouts; the
gradient of every group is taken, and its products with those of other prompts give variance and bias
(`variance_estimators`). Beside it: what keeping only some tokens at random would cost, and a world where everything is
known exactly.

A killed study goes on where it was and ends with the same numbers.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tokencredit.durable import write_parquet
from tokencredit.dynamics.batch import prompts_of
from tokencredit.dynamics.checkpoint import Checkpoint, open_checkpoint
from tokencredit.dynamics.gradient_matrix import file_bytes
from tokencredit.dynamics.passes import room_of
from tokencredit.dynamics.vectors import trained
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.fingerprint import model_hash
from tokencredit.lm.prompts import prompt_text
from tokencredit.methods import METHODS
from tokencredit.stages import Stages
from tokencredit.studies import forecast
from tokencredit.studies.arguments import check_prompts, parameters_of, prompts_there
from tokencredit.studies.forecast import ALONG, BACKWARD
from tokencredit.studies.options import identity
from tokencredit.studies.study import Counting, Say, Work
from tokencredit.studies.variance.estimators import GradientMoments
from tokencredit.studies.variance.figures import Figures
from tokencredit.studies.variance.findings import findings
from tokencredit.studies.variance.gradients import num_parameters, token_counts, weights_of
from tokencredit.studies.variance.plan import TRUTHS, checkpoints, names_of
from tokencredit.studies.variance.question import LEAST, VarianceConfig
from tokencredit.studies.variance.sampling import FRACTIONS, SCHEMES, curves, drawn_check, num_checked
from tokencredit.studies.variance.setting import Setting, directions_of, prepare

TRUE = "(true)"
"""What the estimator of the true policy gradient is called among the methods."""
SCORES = 12
"""Forward passes that the scores take, which share no prompt: along 8 directions, and the head's."""


def run(config: VarianceConfig, work: Work) -> dict[str, Any]:
    """The whole study: its blocks; prompts.parquet."""
    config = replace(config, policy=config.policy.settled())
    check_prompts(config.policy, {"--prompts": config.prompts}, least=LEAST)
    found = checkpoints(config)
    first = open_checkpoint(config.policy)
    config = config.fitted(parameters_of(first), prompts_there(first))
    about = {"task": config.policy.task, "model": config.policy.model, "judge": first.task}
    work.begin(**about, config=identity(config), policy=config.policy.as_dict())
    _foretell(first, config, len(found), work)
    del first
    figures = Figures(work.book, config.batch)
    blocks, rows = [], []
    for label, opened in found.items():
        stages, checkpoint = Stages(work.stages.folder / f"{seed_of(label):016x}"), opened()
        work.record.rest_on({f"the weights of {label}": model_hash(checkpoint.model)})
        setting = prepare(config, label, checkpoint, stages, work.say)
        tables = _tables(config, setting, stages, work.say)
        blocks.append(
            _block(config, setting, tables, stages, figures, work.say) | {"seconds": sum(stages.seconds.values())}
        )
        rows += _rows(setting, tables)
    work.say("the exact world")
    exact = figures.exact_world([METHODS[name] for name in names_of(config, None)], METHODS[config.baseline])
    write_parquet(work.path / "prompts.parquet", rows)
    study = {"checkpoints": blocks, "exact": exact}
    return study | {"findings": findings(study, work.book.figures, config.baseline)}


def _foretell(c: Checkpoint, config: VarianceConfig, checkpoints: int, work: Work) -> None:
    """The forecast: scores, gradients of every method or derivatives along directions, and subsets that are drawn."""
    methods, directions = len(names_of(config, c.task)), directions_of(config, c, work.path)
    groups = 2 * config.prompts
    gradients = directions * ALONG if directions else (1 + methods) * BACKWARD
    drawn = len(SCHEMES) * config.draws * BACKWARD * min(num_checked(c) / groups, 1)
    parts = [forecast.Drawn(checkpoints * groups, config.group, 1 + gradients + drawn, SCORES)]
    first = c.policy.encode_rows(prompts_of(c, 1, config.seed))[0]
    disk = 0 if directions else 3 * file_bytes(trained(c.model), groups, room_of(c.model, c.policy.memory))
    work.tell(forecast.forecast(c, parts, 2, first, disk=disk))


def _tables(config: VarianceConfig, setting: Setting, stages: Stages, say: Say) -> dict[str, dict[str, np.ndarray]]:
    """{method: its table of products}."""
    tables, known = {}, {TRUE: "truth", config.baseline: "base"}
    for name, method in {TRUE: TRUTHS[setting.truth], **setting.methods}.items():
        say(f"{setting.label}: gradients of {name}")

        def make(name=name, method=method) -> dict[str, np.ndarray]:
            weight = weights_of(method, setting.batch.rollouts)
            reference = setting.reference
            gradients = getattr(reference, known[name]) if name in known else setting.gradients(weight)
            return reference.products(gradients) | token_counts(weight, setting.batch.rollouts)

        tables[name] = stages.arrays(f"method_{name}", make)
    return tables


def _block(
    config: VarianceConfig, setting: Setting, tables: dict, stages: Stages, figures: Figures, say: Say
) -> dict[str, Any]:
    """Everything that the report shows of one checkpoint."""
    rollouts, label = setting.batch.rollouts, setting.label
    moments = {name: GradientMoments.of(table, tables[TRUE]) for name, table in tables.items() if name != TRUE}
    weight = weights_of(setting.methods[config.baseline], rollouts)

    def draw() -> dict[str, dict]:
        seed, num = seed_of(config.seed, "drawn"), config.draws
        heard = Counting(say, f"{label}: drawing subsets of tokens", "subsets", len(SCHEMES) * num)
        found = drawn_check(setting.checkpoint, setting.batch, weight, num, seed, heard)
        return {name: asdict(each) for name, each in found.items()}

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
