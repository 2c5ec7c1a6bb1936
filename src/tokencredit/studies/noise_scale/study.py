"""The noise of a checkpoint's gradient, from rollouts to the best batch for a cost. The products of gradients, which
take the time, are stored.
"""

from __future__ import annotations

from typing import Any

from tokencredit.durable import write_parquet
from tokencredit.dynamics.batch import prompts_of
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.lm.load import run_of
from tokencredit.studies import forecast
from tokencredit.studies.arguments import check_prompts, of_checkpoint, open_from, prompts_there
from tokencredit.studies.drawn import drawn
from tokencredit.studies.forecast import BACKWARD
from tokencredit.studies.noise_scale.figures import blocks
from tokencredit.studies.noise_scale.measurement import PAIRS, Products, measured, products_of
from tokencredit.studies.noise_scale.question import FEWEST, RUNS, NoiseScaleConfig
from tokencredit.studies.options import identity
from tokencredit.studies.study import Work


def run(config: NoiseScaleConfig, work: Work) -> dict[str, Any]:
    """The whole study: its blocks; grid.parquet."""
    check_prompts(config.policy, {"--prompts": config.prompts}, least=FEWEST)
    c = open_from(config)
    config = config.fitted(prompts_there(c))
    first = c.policy.encode_rows(prompts_of(c, 1, config.seed))[0]
    parts = [forecast.Drawn(config.prompts, config.group, 1 + (1 + (config.group >= PAIRS)) * BACKWARD)]
    needs = sorted(c.method.needs)
    work.begin(**of_checkpoint(c), config=identity(config), checkpoint=str(c.path))
    work.tell(forecast.forecast(c, parts, 2, first))
    options = {"needs": needs, "progress": work.counting("sampling", "rollouts")}
    batch = drawn(work.stages, "step", c, config.prompts, config.group, config.seed, **options)
    heard = work.counting("products of gradients", "gradients")
    stored = work.stages.arrays(
        "products", lambda: products_of(c, c.method, batch, seed=config.seed, progress=heard).arrays()
    )
    work.say("figures")
    found = measured(Products.of(stored), batch.rollouts, seed=config.seed)
    result = {
        "checkpoint": str(c.path),
        "step": c.step,
        "task": c.config.task,
        "temperature": c.temperature,
        "method": c.method.name,
        "prompts": config.prompts,
        "group": config.group,
        "prompts_counted": found.prompts,
        **_reference(c, config),
        "success": float(batch.rollouts.success.double().mean()),
        "p_noise": found.own.p_noise,
        "resolved": found.own.resolved,
        "sketched": found.sketched,
    }
    result |= blocks(found, config, result["own_batch"], result["reference"], work.book)
    if result["grid"]:
        write_parquet(work.path / "grid.parquet", result["grid"])
    return result


def _reference(c: Checkpoint, config: NoiseScaleConfig) -> dict[str, Any]:
    """The batch that others are compared with, and what it is called: that of the run, or the one that is drawn."""
    if run_of(c.path):
        return {"own_batch": {"prompts": c.config.prompts, "group": c.config.group}, "reference": RUNS}
    return {"own_batch": {"prompts": config.prompts, "group": config.group}, "reference": "the batch drawn here"}
