"""How far an estimator is from the truth, at the tokens it spent.

    bias        mean of estimate − truth
    error       √ mean (estimate − truth)²
    coverage    share of intervals that hold the truth
    precision   average precision at finding the pivotal tokens, |Q − V| ≥ 0.2, by |estimate|
    captured    share of Σ (Q − V)² in the fifth of all tokens with the largest |estimate|

The first three are of the estimand that a column is named after, over the tokens that it estimates; the last two are of
Q − V for every column, over all tokens: one without a number comes last. Intervals are by prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokencredit.agreement.ranks import average_precision, share_of_top
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.durable import read_mapping, read_rows
from tokencredit.figure import Figure
from tokencredit.truth.estimates import Estimates, is_truth, read_estimates
from tokencredit.truth.table import FORMAT, TRUTHS

PIVOTAL, TOP = 0.2, 0.2
MEASURES = ("bias", "error", "coverage", "precision", "captured")
DESCRIBES = ("token_id", "rollouts", "defined", "skipped", "chosen", "inclusion", "max_alternative_token_id")
"""Columns of a pivotality run that say how it was made, and estimate nothing."""


@dataclass(frozen=True)
class KnownTruth:
    """What is known: [N] tokens, their `places` (trace, position), prompt by number, and {name of TRUTHS: [N]}, those
    of gradients where they were asked for.
    """

    places: Sequence[tuple[int, int]]
    prompt: np.ndarray
    known: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> KnownTruth:
        """ValueError where the directory holds no truth, or one of another format."""
        folder = Path(folder)
        if not (folder / "truth.json").exists():
            raise ValueError(f"{folder} holds no truth: write one with `tokencredit world truth --out {folder}`")
        if (form := read_mapping(folder / "truth.json", "format")["format"]) != FORMAT:
            raise ValueError(f"{folder}/truth.json has format {form}, this version reads {FORMAT}: write it again")
        names = [json.dumps(row["prompt_ids"]) for row in read_rows(folder / "traces.parquet")]
        rows = read_rows(folder / "truth.parquet")
        number = {name: k for k, name in enumerate(dict.fromkeys(names))}
        prompt = np.array([number[names[row["trace"]]] for row in rows])
        known = {name: np.array([row[name] for row in rows], dtype=float) for name in TRUTHS if name in rows[0]}
        return cls([(row["trace"], row["position"]) for row in rows], prompt, known)


@dataclass(frozen=True)
class Judgement:
    """One column of one estimator: {name of MEASURES: Figure}, the tokens it estimates, and the tokens it spent."""

    estimator: str
    column: str
    figures: Mapping[str, Figure]
    tokens: int
    spent: int | None

    def as_json(self) -> dict[str, object]:
        figures = {name: figure.as_json() for name, figure in self.figures.items()}
        return {
            "estimator": self.estimator,
            "column": self.column,
            "tokens": self.tokens,
            "spent": self.spent,
            "figures": figures,
        }


def judge(truth: KnownTruth, estimates: Estimates, *, bootstraps: int = 1000, seed: int = 0) -> list[Judgement]:
    """A judgement of every column of the estimates. ValueError where there is no column to judge."""
    bootstrap = Bootstrap(truth.prompt, bootstraps, seed)
    found = [
        _judge(truth, estimates, name, values, bootstrap)
        for name, values in estimates.values.items()
        if name not in DESCRIBES
    ]
    if not found:
        raise ValueError(f"{estimates.name} has no column that estimates anything")
    return found


def judge_file(folder: Path, path: Path, *, spent: int | None = None, seed: int = 0) -> list[Judgement]:
    """The same from files: the directory of a truth, and a file of estimates or a pivotality run's directory."""
    truth = KnownTruth.read(folder)
    return judge(truth, read_estimates(path, truth.places, spent), seed=seed)


def _judge(truth: KnownTruth, e: Estimates, name: str, values: np.ndarray, bootstrap: Bootstrap) -> Judgement:
    figures: dict[str, Figure] = {}
    if is_truth(name) and name in truth.known:
        known = truth.known[name]
        there = np.isfinite(values) & np.isfinite(known)
        off = np.where(there, values - known, 0.0)
        unit = "" if name not in ("value", "before_after", "replace", "spread") else "success probability"
        figures["bias"] = _mean(bootstrap, off, there, unit)
        figures["error"] = _mean(bootstrap, off**2, there, unit, root=True)
        if name in e.bounds:
            low, high = e.bounds[name]
            ends = there & np.isfinite(low) & np.isfinite(high)
            figures["coverage"] = _mean(bootstrap, ((low <= known) & (known <= high)).astype(float), ends, "share")
    effect = truth.known["before_after"]
    size = np.where(np.isfinite(values), np.abs(values), -1.0)
    pivotal = (np.abs(effect) >= PIVOTAL).astype(float)
    draws = {
        "precision": average_precision(size, pivotal, bootstrap.weights),
        "captured": share_of_top(size, effect**2, TOP, bootstrap.weights, per_token=False),
    }
    figures |= {key: Figure.of(bootstrap.estimate(x), "share") for key, x in draws.items()}
    return Judgement(e.name, name, figures, int(np.isfinite(values).sum()), e.spent)


def _mean(bootstrap: Bootstrap, values: np.ndarray, there: np.ndarray, unit: str, *, root: bool = False) -> Figure:
    """The mean over the tokens that are there, or its root."""
    sums = bootstrap.sums(np.stack([np.where(there, values, 0.0), there.astype(float)], 1))
    mean = np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)
    return Figure.of(bootstrap.estimate(np.sqrt(mean) if root else mean), unit)
