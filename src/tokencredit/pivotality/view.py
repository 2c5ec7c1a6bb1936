"""What there is to see of a pivotality run: completions with every token's effects, those with pivotal tokens first."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.lm.prompts import readable
from tokencredit.pivotality.estimator import Effect, discoveries
from tokencredit.pivotality.record import read

ESTIMANDS = ("before_after", "replace")
RATE, LEAST = 0.05, 0.05
"""Of a pivotal token: the rate of false discoveries among those of one estimand, and its least effect, below which an
effect that is sure matters to nobody.
"""
ALTERNATIVES = 6
"""Shown of a token, most often sampled first."""
Rows = list[dict[str, Any]]


def views(folder: str | Path) -> Rows:
    """The completions of a finished run, in the form that `report.effects` shows, those with pivotal tokens first.

    Each has `pivotal` {estimand: [T] bool}: effects of LEAST or more, and RATE false ones on average among all that are
    found in the run; and for every estimand value, interval and `certainty` [T]: 1 less the two-sided p value.
    FileNotFoundError where the run has not finished.
    """
    tokens, alternatives = (_by_trace(read(Path(folder), name)) for name in ("tokens", "alternatives"))
    found = [
        _view(trace, tokens[trace["trace"]], alternatives[trace["trace"]]) for trace in read(Path(folder), "traces")
    ]
    for name in ESTIMANDS:
        sizes = np.abs(np.concatenate([_column(view[name]["value"]) for view in found]))
        sure = discoveries(np.concatenate([view[name].pop("p_value") for view in found]), RATE)
        pivotal = (sure & (np.nan_to_num(sizes) >= LEAST)).tolist()
        for view in found:
            num = len(view["tokens"])
            view["pivotal"][name], pivotal = pivotal[:num], pivotal[num:]
    return sorted(found, key=_weight, reverse=True)


def _by_trace(rows: Rows) -> Mapping[int, Rows]:
    found: dict[int, Rows] = defaultdict(list)
    for row in rows:
        found[row["trace"]].append(row)
    return found


def _weight(view: Mapping[str, Any]) -> tuple[float, float]:
    """How much of a completion's effects are pivotal, and how much there is of them, in squares."""
    value = np.nan_to_num(_column(view["before_after"]["value"])) ** 2
    return float(value[np.array(view["pivotal"]["before_after"], bool)].sum()), float(value.sum())


def _column(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, float)


def _view(trace: Mapping[str, Any], tokens: Rows, alternatives: Rows) -> dict[str, Any]:
    others: dict[int, Rows] = defaultdict(list)
    for other in sorted(alternatives, key=lambda row: -row["rollouts"]):
        if other["rollouts"]:
            others[other["position"]].append(
                {"text": other["token"], "num": other["rollouts"], "correct": other["successes"]}
            )

    def column(name: str) -> list[Any]:
        return [token[name] for token in tokens]

    value = np.array([trace["start"], *column("value_after")], float)
    error = np.array([trace["start_standard_error"], *column("value_after_standard_error")], float)
    found = {
        "prompt": readable(json.loads(trace["row"])["prompt"]),
        "correct": trace["reward"] > 0,
        "reward": trace["reward"],
        "reason": trace["reason"],
        "tokens": column("token"),
        "role": None,
        "value": value.tolist(),
        "low": np.clip(value - 1.96 * error, 0, 1).tolist(),
        "high": np.clip(value + 1.96 * error, 0, 1).tolist(),
        "pi": column("probability"),
        "alternatives": [others[at][:ALTERNATIVES] for at in range(len(tokens))],
        "proxies": {"entropy": column("entropy")},
        "pivotal": {},
    }
    return found | {name: _effect(tokens, name) for name in ESTIMANDS}


def _effect(tokens: Rows, name: str) -> dict[str, Any]:
    ends = {"value": name, "standard_error": f"{name}_standard_error", "low": f"{name}_low", "high": f"{name}_high"}
    columns = {end: _column([token[column] for token in tokens]) for end, column in ends.items()}
    p_value = Effect(**columns).p_value
    shown = {end: columns[end].tolist() for end in ("value", "low", "high")}
    return {**shown, "certainty": (1 - np.nan_to_num(p_value, nan=1.0)).tolist(), "p_value": p_value}
