"""What is in the log: figures of its groups, over all of it and over its steps. No model is asked.

The unit of every interval is the group: the rollouts of one prompt in one step share their difficulty. A trend is the
last quarter of the steps less the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokencredit.stats import Estimate, difference_of_units, jackknife, mean_of_units, share_of_units
from tokencredit.studies.book import Book
from tokencredit.studies.inspect.survey import Survey

MOST_STEPS = 150
"""Points of a curve; of a longer log, steps are taken together."""
FEW = 3
"""Groups below which nothing has an interval."""

Values = tuple[np.ndarray, np.ndarray]
"""(value of every group, which groups have one)."""


@dataclass(frozen=True)
class Measure:
    """One number of a group. `of` answers it [G] and where it is known [G]; a rate is between 0 and 1, others are at
    least `least`."""

    name: str
    unit: str
    of: Callable[[Mapping[str, np.ndarray]], Values]
    rate: bool = False
    least: float = -np.inf

    def estimate(self, values: np.ndarray) -> Estimate:
        return share_of_units(values) if self.rate else mean_of_units(values).within(self.least)


def _over(top: str, bottom: str) -> Callable[[Mapping[str, np.ndarray]], Values]:
    def of(counts: Mapping[str, np.ndarray]) -> Values:
        known = counts[bottom] > 0
        return np.divide(counts[top], counts[bottom], out=np.zeros(len(known)), where=known), known

    return of


def _no_signal(counts: Mapping[str, np.ndarray]) -> Values:
    return (counts["low"] == counts["high"]).astype(float), counts["rewarded"] > 1


def _repeated(counts: Mapping[str, np.ndarray]) -> Values:
    return 1 - counts["distinct"] / counts["rollouts"], counts["rollouts"] > 1


def measures(unit: str) -> tuple[Measure, ...]:
    """Everything that is told of a group; `unit` is that of lengths."""
    return (
        Measure("pass rate", "share of rollouts", _over("success", "rewarded"), True),
        Measure("reward", "reward", _over("reward", "rewarded")),
        Measure("groups without signal", "share of groups", _no_signal, True),
        Measure("length", unit, _over("length", "rollouts"), least=0),
        Measure("truncated", "share of rollouts", _over("cut", "known_cut"), True),
        Measure("repeated completions", "share of rollouts", _repeated, True),
        Measure("entropy", "nats per token", _over("entropy", "entropy_tokens"), least=0),
    )


def overview(survey: Survey, book: Book) -> dict[str, Any]:
    """The block: totals, trends and curves by measure, reward columns and how they agree."""
    found: dict[str, Any] = {"totals": {}, "trends": {}, "curves": {}}
    bins = _bins(survey)
    for measure in measures(survey.unit):
        values, known = measure.of(survey.counts)
        if known.sum() < FEW:
            continue
        name = f"log/{measure.name}"
        found["totals"][measure.name] = book.enter(name, measure.estimate(values[known]), measure.unit, over="groups")
        found["curves"][measure.name] = {"unit": measure.unit, **_curve(measure, values, known, bins)}
        early, late = (values[known & quarter] for quarter in _quarters(survey))
        if min(len(early), len(late)) >= FEW:
            change = difference_of_units(late, early)
            found["trends"][measure.name] = book.enter(f"{name}/trend", change, measure.unit, over="groups")
    found["columns"] = {
        name: book.enter(f"log/column/{name}", mean_of_units(_column_means(x)), "reward", over="groups")
        for name, x in survey.rewards.items()
        if (x[:, 0] > 0).sum() >= FEW
    }
    found["agreement"] = [
        {"columns": pair, "figure": book.enter(f"log/agreement/{' and '.join(pair)}", each, "correlation")}
        for pair, x in survey.products.items()
        if (each := correlation(x)) is not None
    ]
    steps = survey.steps
    return {
        "rollouts": survey.about["rollouts"],
        "groups": len(survey.counts["step"]),
        "group_sizes": np.unique(survey.counts["rollouts"]).astype(int).tolist()[:12],
        "prompts": len(np.unique(survey.counts["prompt"])),
        "steps": len(steps),
        "first": int(steps[0]),
        "last": int(steps[-1]),
        "quarters": quarters(survey),
        "has": survey.about["has"],
        "others": survey.about["others"],
        **found,
    }


def quarters(survey: Survey) -> list[list[int] | None]:
    """First and last step of the log's first and last quarter; None where there is a single step."""
    return [_span(survey.counts["step"][inside]) for inside in _quarters(survey)]


def _span(steps: np.ndarray) -> list[int] | None:
    return [int(steps.min()), int(steps.max())] if len(steps) else None


def _column_means(x: np.ndarray) -> np.ndarray:
    some = x[x[:, 0] > 0]
    return some[:, 1] / some[:, 0]


def correlation(products: np.ndarray) -> Estimate | None:
    """Pearson's, of two columns over rollouts, with the jackknife's interval over groups; None where one is constant,
    or with fewer groups than `FEW`. products [G, 6]: n, Σx, Σy, Σx², Σy², Σxy of every group.
    """
    rows = products[products[:, 0] > 0]
    if len(rows) < FEW:
        return None
    total = rows.sum(0)
    value, left_out = _pearson(total), _pearson(total - rows)
    return None if not np.isfinite(value) or not np.isfinite(left_out).all() else jackknife(float(value), left_out)


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = (xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (xy / n - x * y / n**2) / np.sqrt(np.where(spread > 1e-18, spread, np.nan))


def _quarters(survey: Survey) -> tuple[np.ndarray, np.ndarray]:
    """[G] bool: the groups of the first and of the last quarter of the steps; none where there is a single step."""
    steps, at = survey.steps, survey.counts["step"]
    num = max(1, len(steps) // 4)
    several = len(steps) > 1
    return several & (at <= steps[num - 1]), several & (at >= steps[-num])


def _bins(survey: Survey) -> list[tuple[int, np.ndarray]]:
    """(step that stands for it, its groups [G]) of at most MOST_STEPS runs of steps."""
    steps, at = survey.steps, survey.counts["step"]
    parts = np.array_split(steps, min(MOST_STEPS, len(steps)))
    return [(int(part[-1]), (at >= part[0]) & (at <= part[-1])) for part in parts]


def _curve(measure: Measure, values: np.ndarray, known: np.ndarray, bins: list) -> dict[str, list]:
    curve: dict[str, list] = {"step": [], "value": [], "low": [], "high": []}
    for step, inside in bins:
        here = values[known & inside]
        if not len(here):
            continue
        estimate = measure.estimate(here)
        curve["step"].append(step)
        for end in ("value", "low", "high"):
            number = getattr(estimate, end)
            curve[end].append(float(number) if np.isfinite(number) else None)
    return curve
