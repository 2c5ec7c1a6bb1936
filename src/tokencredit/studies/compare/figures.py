"""The figures of a comparison; blocks refer to them by name.

Intervals of what is measured on prompts are over seeds and prompts (`stats.OverSeedsAndPrompts`), those of times over
seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.methods import METHODS
from tokencredit.runs import Run
from tokencredit.stats import Estimate, OverSeedsAndPrompts, mean_of_units
from tokencredit.studies.book import Book
from tokencredit.studies.compare.curves import PHASES, Curves, Prompts, area, budget_to
from tokencredit.studies.compare.verdicts import findings, verdicts
from tokencredit.studies.jobs import Job


@dataclass(frozen=True)
class Marks:
    """How the runs are read. `reach`: the share of the baseline's final pass@1 whose cost is compared; `collapse`: the
    share of the initial policy's entropy under which a run counts as collapsed; `draws` of prompts with replacement."""

    reach: float = 0.8
    collapse: float = 0.25
    draws: int = 400


@dataclass(frozen=True)
class Measures:
    """Enters figures of measures into a book; `units` of measures by name, `amount` of the budget."""

    book: Book
    units: Mapping[str, str]
    amount: float

    def enter(self, name: str, measure: str, estimate: Estimate, seeds: Sequence[int], **more: float) -> str:
        """Enters a figure and answers its name. Intervals of shares stay inside [0, 1], those of a budget inside what
        there is of it.
        """
        most = (
            1.0 if measure.startswith(("pass@", "area")) else self.amount if measure.startswith("budget_to") else np.inf
        )
        least = 0.0 if np.isfinite(most) else -np.inf
        if not name.startswith("difference/"):
            estimate = replace(estimate, low=max(estimate.low, least), high=min(estimate.high, most))
        return self.book.enter(name, estimate, self.units[measure], seed=list(seeds), **more)


@dataclass(frozen=True)
class Draws:
    """A measure of one method: [1 + R, S] by draw of prompts and seed."""

    values: np.ndarray
    num_prompts: int

    def of(self, columns: Sequence[int]) -> OverSeedsAndPrompts:
        return OverSeedsAndPrompts(self.values[:, list(columns)], self.num_prompts)


def figures(
    config: Any,
    out: Path,
    done: Sequence[Job],
    baseline: str,
    chosen: Mapping[str, Mapping],
    settings: Marks,
    book: Book,
) -> dict[str, Any]:
    """Everything that the runs say: {"methods", "curves", "verdicts", "rates", "findings", ...}; figures go into the
    book.
    """
    runs: dict[str, dict[int, Run]] = {}
    for job in done:
        runs.setdefault(job.config.method, {})[job.config.seed] = Run.open(out / job.name)
    curves = {method: Curves.read(by_seed, config.budget) for method, by_seed in runs.items()}
    first = curves[baseline]
    prompts = {
        "marks": Prompts(first.marks["pass@1"].shape[-1], settings.draws, 0),
        "final": Prompts(first.final["pass@1"].shape[-1], settings.draws, 1),
    }
    lines = {
        method: {name: prompts["marks"].means(x) for name, x in each.marks.items()} for method, each in curves.items()
    }
    target = settings.reach * float(first.final["pass@1"].mean())
    started = float(first.marks["pass@1"][:, 0].mean())
    measured = {
        method: _measures(
            each, lines[method], prompts, target if target > started else None, config.budget.amount, settings
        )
        for method, each in curves.items()
    }
    measures = Measures(book, _units(config), config.budget.amount)
    found = {
        "methods": [
            _about(measures, m, curves, baseline, measured[m], chosen[m], config)
            | _counts(lines[m]["entropy"][0], measured[m], config, settings)
            for m in curves
        ],
        "curves": {
            name: {m: _band(lines[m][name], curves[m].seeds, prompts["marks"].num_prompts) for m in curves}
            for name in first.marks
        },
        "verdicts": verdicts(measures, measured, {m: each.seeds for m, each in curves.items()}, baseline),
        "rates": _rates(measures, chosen, config, settings),
        "target": {"value": target, "share": settings.reach, "start": started, "reached_at_start": target <= started},
        "prompts": {name: each.num_prompts for name, each in prompts.items()},
        "grid": np.linspace(0, config.budget.amount, config.budget.marks + 1).tolist(),
        "settings": {"reach": settings.reach, "collapse": settings.collapse, "draws": settings.draws},
    }
    return found | {"findings": findings({**found, "figures": book.figures}, config, baseline)}


def _units(config: Any) -> dict[str, str]:
    cost = {"rollouts": "sampled rollouts", "tokens": "sampled tokens", "seconds": "training seconds"}[
        config.budget.unit
    ]
    shares = {
        "area": "mean pass@1 over the budget",
        "pass@1": "share of samples",
        f"pass@{config.final_samples}": "share of prompts",
    }
    times = dict.fromkeys(["seconds", *(f"seconds_{phase}" for phase in PHASES)], "training seconds")
    sampled = {unit: f"sampled {unit}" for unit in ("rollouts", "tokens")}
    others = {"entropy": "nats per token", "length": "tokens", "budget_to": cost, "budget_to_own": cost}
    return shares | times | sampled | others | {"overhead": "training seconds per sampled rollout, over the baseline's"}


def _measures(
    curves: Curves,
    lines: Mapping[str, np.ndarray],
    prompts: Mapping[str, Prompts],
    target: float | None,
    amount: float,
    settings: Marks,
) -> dict[str, Draws]:
    """Every measure of a method that prompts enter into."""
    final, marks = prompts["final"].num_prompts, prompts["marks"].num_prompts
    own = settings.reach * float(curves.final["pass@1"].mean())
    found = {name: Draws(prompts["final"].means(x), final) for name, x in curves.final.items()}
    found["area"] = Draws(area(lines["pass@1"]), marks)
    if target is not None:
        found["budget_to"] = Draws(budget_to(lines["pass@1"], target) * amount, marks)
    found["budget_to_own"] = Draws(budget_to(lines["pass@1"], own) * amount, marks)
    return found


def _about(
    measures: Measures,
    method: str,
    curves: Mapping[str, Curves],
    baseline: str,
    measured: Mapping[str, Draws],
    chosen: Mapping[str, Any],
    config: Any,
) -> dict[str, Any]:
    """A method: what it changes, its learning rate and its figures by name."""
    own, described = curves[method], METHODS[method]
    names = {
        name: measures.enter(f"{method}/{name}", name, draws.of(range(len(own.seeds))).estimate(), own.seeds)
        for name, draws in measured.items()
    }
    times = {"seconds": own.seconds} | {f"seconds_{phase}": x for phase, x in own.phases.items()}
    spent = {unit: own.spent[unit] for unit in ("rollouts", "tokens")}
    names |= {
        name: measures.enter(f"{method}/{name}", name, mean_of_units(x), own.seeds)
        for name, x in (times | spent).items()
    }
    if shared := sorted(set(own.seeds) & set(curves[baseline].seeds)) if method != baseline else []:
        cost = [each.seconds / each.spent["rollouts"] for each in (own.at(shared), curves[baseline].at(shared))]
        mean = mean_of_units(np.log(cost[0] / cost[1]))
        ratio = replace(mean, **{key: float(np.exp(getattr(mean, key))) for key in ("value", "low", "high")})
        names["overhead"] = measures.enter(f"{method}/overhead", "overhead", ratio, shared)
    return {
        "name": method,
        "changes": described.summary,
        "source": described.source,
        "seeds": own.seeds,
        "figures": names,
        "rate": chosen["factor"],
        "learning_rate": config.base.learning_rate * chosen["factor"],
        "edge": chosen["edge"],
    }


def _counts(entropy: np.ndarray, measured: Mapping[str, Draws], config: Any, settings: Marks) -> dict[str, int | None]:
    """How many seeds collapsed, by their entropy [S, G], and how many never reached the target (None where there is
    none).
    """
    collapsed = int((entropy.min(1) < settings.collapse * entropy[:, 0]).sum())
    if "budget_to" not in measured:
        return {"collapsed": collapsed, "never": None}
    return {"collapsed": collapsed, "never": int((measured["budget_to"].values[0] >= config.budget.amount).sum())}


def _band(lines: np.ndarray, seeds: Sequence[int], num_prompts: int) -> dict[str, Any]:
    """The curve [1 + R, S, G] of one method: value and interval at every share of the budget, and one line per seed."""
    at = [OverSeedsAndPrompts(lines[:, :, g], num_prompts).estimate() for g in range(lines.shape[2])]
    return {
        "value": [e.value for e in at],
        "low": [e.low for e in at],
        "high": [e.high for e in at],
        "seeds": {str(seed): lines[0, s].tolist() for s, seed in enumerate(seeds)},
    }


def _rates(
    measures: Measures, chosen: Mapping[str, Mapping], config: Any, settings: Marks
) -> dict[str, list[dict[str, Any]]]:
    """{method: its rates with their validation figures}; nothing where a single rate was taken without a check."""
    found: dict[str, list] = {}
    for method, choice in chosen.items():
        for factor, scores in sorted(choice["scores"].items()):
            values = np.array(scores)
            estimate = OverSeedsAndPrompts(
                Prompts(values.shape[1], settings.draws, 2).means(values), values.shape[1]
            ).estimate()
            name = measures.enter(f"{method}/validation/x{factor:g}", "pass@1", estimate, choice["seeds"])
            found.setdefault(method, []).append(
                {
                    "factor": factor,
                    "learning_rate": config.base.learning_rate * factor,
                    "figure": name,
                    "chosen": factor == choice["factor"],
                }
            )
    return found
