"""The learning rate that the checks of a comparison choose for every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.runs import Run
from tokencredit.stats import pass_at_k
from tokencredit.studies.jobs import FINAL, Job, finished


def choose(config: Any, out: Path, methods: Sequence[str], checks: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """{method: {"factor", "edge", "scores", "seeds"}}: the multiple with the highest validation pass@1 over the second
    half of the budget.

    `scores` {multiple: [per seed, per prompt]}; `edge` is "lowest" or "highest" where the choice is at an end of the
    rates that were checked. A single rate, or one that no check finished for, is the multiple nearest to 1.
    """
    found = {}
    for method in methods:
        jobs = [job for job in checks if job.config.method == method and finished(out, job)]
        scores: dict[float, list] = {}
        for job in jobs:
            scores.setdefault(job.factor, []).append(second_half(Run.open(out / job.name), config))
        best = (
            max(scores, key=lambda factor: np.mean(scores[factor]))
            if scores
            else min(config.rates, key=lambda rate: abs(np.log(rate)))
        )
        ends = {min(config.rates): "lowest", max(config.rates): "highest"} if len(scores) > 1 else {}
        seeds = sorted({job.config.seed for job in jobs})
        found[method] = {"factor": best, "edge": ends.get(best), "scores": scores, "seeds": seeds}
    return found


def second_half(run: Run, config: Any) -> list[float]:
    """Prompt by prompt: mean pass@1 of the evaluations from half of the budget on."""
    unit, half = config.budget.unit, config.budget.amount / 2
    late = [record for record in run.evaluations() if record["split"] != FINAL and record[unit] >= half]
    return np.mean(
        [pass_at_k(record["by_prompt"]["correct"], record["num_samples"], 1) for record in late], axis=0
    ).tolist()
