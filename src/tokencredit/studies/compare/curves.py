"""The runs of one method as arrays on one axis: the share of the budget that was spent.

Evaluations fall where a rollout batch ends, which differs between methods; between them every prompt's curve is read
off straight lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tokencredit.agreement.resampling import Bootstrap
from tokencredit.budget import Budget
from tokencredit.runs import Run
from tokencredit.stats import pass_at_k
from tokencredit.studies.jobs import FINAL

PHASES = ("generation", "scoring", "update")


@dataclass(frozen=True)
class Curves:
    """One method. S seeds in ascending order, G shares of the budget from 0 to 1, P prompts of the curves and F of the
    final evaluation.

    marks, final   {measure: [S, G, P]} and {measure: [S, F]}
    seconds        [S], of training; `phases` {phase: [S]} its parts; `spent` {unit: [S]}
    """

    seeds: list[int]
    marks: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    seconds: np.ndarray
    phases: dict[str, np.ndarray]
    spent: dict[str, np.ndarray]

    @classmethod
    def read(cls, runs: Mapping[int, Run], budget: Budget) -> Curves:
        """From the finished runs of a method, by seed."""
        seeds, grid = sorted(runs), np.linspace(0, 1, budget.marks + 1)
        marks, final = [], []
        for seed in seeds:
            records = runs[seed].evaluations()
            along = [record for record in records if record["split"] != FINAL]
            share = np.array([record[budget.unit] / budget.amount for record in along])
            measured = [by_prompt(record) for record in along]
            marks.append(
                {name: on_grid(grid, share, np.stack([each[name] for each in measured])) for name in measured[0]}
            )
            final.append(by_prompt(next(record for record in records if record["split"] == FINAL)))
        metrics = [runs[seed].metrics() for seed in seeds]
        last = [records[-1] for records in metrics]
        return cls(
            seeds,
            _stacked(marks),
            _stacked(final),
            np.array([each["seconds"] for each in last], float),
            {
                phase: np.array([sum(record.get(f"seconds_{phase}", 0.0) for record in records) for records in metrics])
                for phase in PHASES
            },
            {unit: np.array([each[unit] for each in last], float) for unit in ("rollouts", "tokens", "seconds")},
        )

    def at(self, seeds: list[int]) -> Curves:
        """These seeds alone."""
        keep = [self.seeds.index(seed) for seed in seeds]
        marks, final, phases, spent = (
            {name: x[keep] for name, x in arrays.items()}
            for arrays in (self.marks, self.final, self.phases, self.spent)
        )
        return Curves(list(seeds), marks, final, self.seconds[keep], phases, spent)


def by_prompt(record: Mapping) -> dict[str, np.ndarray]:
    """{measure: [P]} of one evaluation. A prompt whose samples were all empty has no entropy; it takes the mean of the
    others.
    """
    found, num = record["by_prompt"], record["num_samples"]
    entropy = np.array(found["entropy"], float)
    entropy = np.where(np.isnan(entropy), np.nanmean(entropy) if np.isfinite(entropy).any() else 0.0, entropy)
    shares = {f"pass@{k}": pass_at_k(found["correct"], num, k) for k in sorted({1, num})}
    return shares | {"entropy": entropy, "length": np.array(found["length"], float)}


def on_grid(grid: np.ndarray, share: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[G, P]: values [M, P] at shares [M] of the budget, read at the grid [G] off straight lines; the last one holds to
    the end.
    """
    return np.stack([np.interp(grid, share, column) for column in values.T], axis=1)


def _stacked(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Prompts:
    """Draws of prompts with replacement: row 0 of what comes out is the sample as it is. The same draws for every
    method.
    """

    num_prompts: int
    num: int
    seed: int

    @cached_property
    def weights(self) -> np.ndarray:
        """[1 + R, P], each row adding up to 1."""
        return Bootstrap(np.arange(self.num_prompts), self.num, self.seed).cluster_weights / self.num_prompts

    def means(self, values: np.ndarray) -> np.ndarray:
        """[1 + R, ...]: means over the prompts of values [..., P]."""
        return np.moveaxis(values @ self.weights.T, -1, 0)


def area(curves: np.ndarray) -> np.ndarray:
    """[...]: mean height over the budget of curves [..., G] on an even grid, by trapezoids."""
    return (curves[..., 1:] + curves[..., :-1]).mean(-1) / 2


def budget_to(curves: np.ndarray, target: float) -> np.ndarray:
    """[...]: the share of the budget at which curves [..., G] first reach the target; 1 where they do not (the whole
    was not enough).
    """
    steps = curves.shape[-1] - 1
    above = curves >= target
    first = np.where(above.any(-1), above.argmax(-1), steps + 1)
    at = np.clip(first, 1, steps)[..., None]
    before, after = np.take_along_axis(curves, at - 1, -1)[..., 0], np.take_along_axis(curves, at, -1)[..., 0]
    rise = np.divide(target - before, after - before, out=np.ones_like(before), where=after > before)
    share = (at[..., 0] - 1 + rise) / steps
    return np.where(first == 0, 0.0, np.where(first > steps, 1.0, share))
