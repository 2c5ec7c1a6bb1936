"""What was learned, by method: curves over training and the last step's figures, with intervals over seeds.

Question: how do the runs of several methods compare in pass@1, pass@k, entropy and length? Each method's seeds are its units; with one
seed the interval is the evaluation's own, over prompts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokencredit.methods import METHODS
from tokencredit.runs import Run
from tokencredit.stats import Estimate, mean_of_units, paired_difference

CLAIMS = (
    ("entropy", "{a} keeps more entropy than {b} (the papers' entropy rebound)"),
    ("length", "{a} writes longer completions than {b}"),
    ("pass@k", "{a} has the higher ceiling: more prompts solved within {k} samples than {b}"),
    ("pass@1", "{a} ends with the higher pass@1 than {b}"),
)


def compare(run_dirs: Sequence[str | Path], *, treatment: str = "gtpo", baselines: Sequence[str] = ("dapo", "grpo")) -> dict[str, Any]:
    """What the report draws: {"methods", "curves", "findings", "interval"}. Figures are those of the evaluations on held-out prompts."""
    runs = [Run.open(path) for path in run_dirs]
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_method[run.info["method_name"]].append(run)
    measures = _measures(runs)
    curves = {m: {name: _curve(group, m) for name, group in by_method.items()} for m in measures}
    return {
        "methods": [_describe(name, group, measures) for name, group in by_method.items()],
        "curves": {m: {n: c for n, c in lines.items() if c["step"]} for m, lines in curves.items()},
        "findings": _findings(by_method, treatment, baselines, measures),
        "interval": "95 % over seeds (Student's t); with one seed, over prompts",
    }


def _measures(runs: Sequence[Run]) -> list[str]:
    """Names of the evaluated figures with intervals, in the order in which they were written."""
    names: dict[str, None] = {}
    for run in runs:
        for record in run.evaluations():
            names |= {name: None for name, figure in record.items() if isinstance(figure, dict) and "low" in figure}
    return list(names)


def _at_steps(run: Run, measure: str) -> dict[int, dict[str, float]]:
    return {record["step"]: record[measure] for record in run.evaluations() if measure in record}


def _curve(runs: Sequence[Run], measure: str) -> dict[str, Any]:
    """Mean over seeds at the steps that every seed has reached, its interval, and one line per seed."""
    lines = {run.info["seed"]: _at_steps(run, measure) for run in runs}
    shared = sorted(set.intersection(*(set(line) for line in lines.values())))
    estimates = [_over_seeds([line[step] for line in lines.values()]) for step in shared]
    return {
        "step": shared,
        "value": [e.value for e in estimates],
        "low": [e.low for e in estimates],
        "high": [e.high for e in estimates],
        "seeds": {str(seed): {"step": sorted(line), "value": [line[s]["value"] for s in sorted(line)]} for seed, line in lines.items()},
    }


def _over_seeds(figures: Sequence[dict[str, float]]) -> Estimate:
    if len(figures) == 1:
        return Estimate(figures[0]["value"], figures[0]["low"], figures[0]["high"], figures[0]["num"])
    return mean_of_units([f["value"] for f in figures])


def _describe(name: str, runs: Sequence[Run], measures: Sequence[str]) -> dict[str, Any]:
    method = METHODS.get(name)
    last = {m: _over_seeds(figures).as_dict() for m in measures if (figures := _last(runs, m))}
    about = {"label": method.summary, "source": method.source, "fidelity": method.fidelity, "needs": sorted(method.needs)} if method else {}
    return {"name": name, "seeds": sorted(run.info["seed"] for run in runs), "summary": last, **about}


def _last(runs: Sequence[Run], measure: str) -> list[dict[str, float]]:
    lines = [line for run in runs if (line := _at_steps(run, measure))]
    return [line[max(line)] for line in lines]


def _findings(by_method: dict[str, list[Run]], treatment: str, baselines: Sequence[str], measures: Sequence[str]) -> list[dict[str, str]]:
    """The claims made for entropy-shaped credit, each against each baseline, paired by seed at the last step."""
    largest = max((int(m[5:]) for m in measures if m.startswith("pass@")), default=1)
    found = []
    for baseline in baselines:
        if treatment not in by_method or baseline not in by_method:
            continue
        for measure, claim in CLAIMS:
            measure = measure.replace("pass@k", f"pass@{largest}")
            pairs = _pairs(by_method[treatment], by_method[baseline], measure)
            if pairs:
                found.append({"claim": claim.format(a=treatment, b=baseline, k=largest), **_verdict(measure, pairs)})
    return found


def _pairs(treated: Sequence[Run], untreated: Sequence[Run], measure: str) -> list[tuple[float, float]]:
    last = [{run.info["seed"]: figures[0]["value"] for run in runs if (figures := _last([run], measure))} for runs in (treated, untreated)]
    return [(last[0][seed], last[1][seed]) for seed in sorted(last[0].keys() & last[1].keys())]


def _verdict(measure: str, pairs: Sequence[tuple[float, float]]) -> dict[str, str]:
    difference = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
    if not math.isfinite(difference.low) or difference.low <= 0 <= difference.high:
        verdict = "not resolved"
    else:
        verdict = "shows here" if difference.low > 0 else "does not show here"
    interval = f"[{difference.low:+.3f}, {difference.high:+.3f}]" if math.isfinite(difference.low) else "no interval from one seed"
    detail = f"{measure} at the last step, paired by seed: {difference.value:+.3f} {interval}, {len(pairs)} seeds"
    return {"verdict": verdict, "detail": detail}
