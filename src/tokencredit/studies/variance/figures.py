"""Moments of the variance study -> named figures, and the blocks of names that the report draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokencredit.method import Method
from tokencredit.stats import Estimate, holm
from tokencredit.studies.book import Book
from tokencredit.studies.variance.estimators import (
    GradientMoments,
    exact_figures_of,
    figures_of,
    interval,
    p_values_of,
    resolved,
)
from tokencredit.studies.variance.exact import World, measurable

UNITS = {
    "relative_variance": "prompts",
    "between_prompts": "share of variance",
    "tokens_apart": "ratio",
    "cosine": "cosine",
    "truth_cosine": "cosine",
    "angle": "degrees",
    "truth_angle": "degrees",
    "length": "ratio",
    "mse_raw": "share of |true gradient|²",
    "mse": "share of |true gradient|²",
    "ess_variance": "unweighted rollouts per rollout",
    "ess": "unweighted rollouts per rollout",
    "efficiency": "share of second moment per credited token",
    "efficiency_ratio": "ratio",
    "signal": "squared gradient",
}

TESTED = ("ess_variance", "ess", "efficiency_ratio", "truth_angle")
LONG = 64
"""Length limit that nothing of the enumerated world comes near: no completion is punished for its length."""


@dataclass
class Figures:
    """Enters figures into a book; mean squared errors are those of `batch` prompts."""

    book: Book
    batch: int

    def methods(self, label: str, moments: Mapping[str, GradientMoments], baseline: str) -> dict[str, dict[str, Any]]:
        """{method: {"figures": {figure: name}, "resolved", "tokens": credited per group}}; a method without any
        gradient has no figures.

        What is tested has `p`, and `holm` over the methods.
        """
        there = {name: own for name, own in moments.items() if own.second[0] > 0}
        base = moments[baseline]
        tests = {name: p_values_of(own, base, self.batch) for name, own in there.items() if name != baseline}
        adjusted = (
            {figure: dict(zip(tests, holm([each[figure] for each in tests.values()]))) for figure in TESTED}
            if tests
            else {}
        )
        found: dict[str, dict[str, Any]] = {name: {"figures": {}, "resolved": False, "tokens": 0.0} for name in moments}
        for name, own in there.items():
            figures = figures_of(own, base, self.batch) | {"signal": interval(own.signal)}
            more = {
                figure: {"p": tests[name][figure], "holm": float(adjusted[figure][name])}
                for figure in TESTED
                if name in tests
            }
            names = {
                figure: self._enter(f"{label}/{name}/{figure}", estimate, UNITS[figure], **more.get(figure, {}))
                for figure, estimate in figures.items()
            }
            found[name] = {"figures": names, "resolved": bool(resolved(own)), "tokens": float(own.credited[0])}
        return found

    def _enter(self, name: str, estimate: Estimate, unit: str, **more: float) -> str:
        return self.book.enter(
            name, estimate, unit, **more, **({"note": "not resolved"} if math.isnan(estimate.value) else {})
        )

    def sampling(
        self,
        label: str,
        curves: Mapping[str, Sequence[Mapping[str, Estimate]]],
        fractions: Sequence[float],
        drawn: Mapping[str, Mapping[str, float]],
    ) -> dict[str, Any]:
        """{"fractions", "curves": {scheme: {measure: [name]}}, "drawn": {scheme: name}}."""
        names: dict[str, dict[str, list[str]]] = {}
        units = {"added": "share of variance", "cost": "tokens for equal variance, against all"}
        for scheme, points in curves.items():
            names[scheme] = {
                measure: [
                    self._enter(f"{label}/sampling/{scheme}/{measure} at {fraction:g}", point[measure], unit)
                    for fraction, point in zip(fractions, points)
                ]
                for measure, unit in units.items()
            }
        checks = {
            scheme: self.book.enter(f"{label}/sampling/{scheme}/drawn over formula", Estimate(**each), "ratio")
            for scheme, each in drawn.items()
        }
        return {"fractions": list(fractions), "curves": names, "drawn": checks}

    def exact_world(self, methods: Sequence[Method], baseline: Method) -> dict[str, Any]:
        """The methods in the enumerated world; their figures have no interval."""
        world = World()
        base = world.estimator(baseline.within(LONG))
        reference = base.moments(base, world)
        found = {}
        for method in measurable(methods):
            moments = world.estimator(method.within(LONG)).moments(base, world)
            names = {
                figure: self.book.enter(f"exact world/{method.name}/{figure}", Estimate(x, x, x, 0), UNITS[figure])
                for figure, x in exact_figures_of(moments, reference, self.batch).items()
            }
            found[method.name] = {"figures": names, "resolved": True, "tokens": float(moments.credited[0])}
        return {"methods": found, "group": world.group, "groups": base.rows.shape[0]}
