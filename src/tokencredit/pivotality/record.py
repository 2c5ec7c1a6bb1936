"""What a pivotality run leaves behind: traces, tokens and alternatives as Parquet, and the figures of the whole.

traces.parquet        one row per trace: the task's row as JSON, prompt and completion ids, reward, V₀
tokens.parquet        one row per token: probability, V before and after, every estimand with standard error and
                      interval
alternatives.parquet  one row per (token, alternative): rollouts and successes
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.durable import plain, read_rows, write_parquet
from tokencredit.figure import Figure
from tokencredit.lm.policy import Policy
from tokencredit.lm.text import piece_after
from tokencredit.pivotality.alternatives import max_alternative
from tokencredit.pivotality.estimands import total_variance
from tokencredit.pivotality.estimator import discoveries
from tokencredit.pivotality.measure import MeasuredTrace
from tokencredit.pivotality.store import prefix_digest
from tokencredit.stats import Estimate, mean_of_units
from tokencredit.tasks.task import Row


def write(folder: Path, measured: Sequence[MeasuredTrace], rows: Sequence[Row], policy: Policy) -> None:
    """The three tables; `rows` are the task's, one per trace."""
    tables = {"traces": _traces(measured, rows), "tokens": [], "alternatives": []}
    for number, m in enumerate(measured):
        tables["tokens"] += token_rows(number, m, policy)
        tables["alternatives"] += alternative_rows(number, m, policy)
    for name, table in tables.items():
        write_parquet(folder / f"{name}.parquet", table)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """One of the tables, as rows."""
    file = Path(folder) / f"{name}.parquet"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no {file.name}: it is no finished run of `tokencredit pivotality run`")
    return read_rows(file)


def _traces(measured: Sequence[MeasuredTrace], rows: Sequence[dict]) -> list[dict]:
    return [
        {
            "trace": k,
            "digest": prefix_digest(m.trace, len(m.trace.completion)).hex(),
            "row": json.dumps(plain(row)),
            "prompt_ids": list(m.trace.prompt),
            "completion_ids": list(m.trace.completion),
            "reward": m.reward,
            "reason": m.reason,
            "truncated": m.truncated,
            "start": float(m.estimate.value[0]),
            "start_standard_error": float(m.estimate.value_error[0]),
            "rollouts": m.rollouts,
            "generated": m.generated,
        }
        for k, (m, row) in enumerate(zip(measured, rows))
    ]


def token_rows(number: int, m: MeasuredTrace, policy: Policy) -> list[dict]:
    """Rows of tokens.parquet: those of trace `number`."""
    e, d = m.estimate, m.estimate.design
    largest, which = max_alternative(m.alternatives, e.value, e.value_error)
    found = {
        "probability": d.pi,
        "entropy": m.entropy,
        "inclusion": m.inclusion,
        "value_before": e.value[:-1],
        "value_after": e.value[1:],
        "value_after_standard_error": e.value_error[1:],
        "value_without": e.v_not,
    }
    for name, effect in (
        ("replace", e.replace),
        ("before_after", e.before_after),
        ("max_alternative", largest),
        ("substitute", m.substitute),
    ):
        found |= {name: effect.value, f"{name}_standard_error": effect.standard_error}
        found |= {f"{name}_low": effect.low, f"{name}_high": effect.high}
    if m.sized is not None:
        found |= {"given_size": m.sized.value, "given_size_standard_error": m.sized.standard_error}
    found |= {
        "spread": e.spread,
        "spread_standard_error": e.spread_error,
        "spread_squared": e.spread_squared,
        "spread_squared_missing": e.spread_missing,
        "p_value": e.replace.p_value,
    }
    num = np.bincount(d.position, d.num, minlength=len(d.pi)).astype(int)
    text = policy.tokens(m.trace.completion)
    values = {name: [None if np.isnan(x) else float(x) for x in column] for name, column in found.items()}
    return [
        {
            "trace": number,
            "position": i,
            "token_id": int(m.trace.completion[i]),
            "token": text[i],
            "rollouts": int(num[i]),
            "defined": bool(d.defined[i]),
            "skipped": bool(d.skipped[i]),
            "chosen": bool(m.chosen[i]),
            "max_alternative_token_id": int(which[i]),
            **{name: column[i] for name, column in values.items()},
        }
        for i in range(len(text))
    ]


def alternative_rows(number: int, m: MeasuredTrace, policy: Policy) -> list[dict]:
    """Rows of alternatives.parquet: those of trace `number`."""
    t = m.alternatives
    return [
        {
            "trace": number,
            "position": int(p),
            "token_id": int(v),
            "token": piece_after(policy.tokenizer, m.trace.completion[: int(p)], int(v)),
            "rollouts": int(n.sum()),
            "successes": float(s.sum()),
            "rollouts_by_half": n.tolist(),
            "successes_by_half": s.tolist(),
        }
        for p, v, n, s in zip(t.position, t.token, t.num, t.successes)
    ]


def figures(
    measured: Sequence[MeasuredTrace], prompts: Sequence[Any], *, seed: int = 0, command: str = ""
) -> dict[str, dict[str, Any]]:
    """The figures of a run: {"value", "low", "high", "unit", "seed", "command"}, with 95 % intervals over prompts; a
    count has none.
    """

    def by_prompt(values: Sequence[float]) -> Estimate:
        groups: dict[Any, list[float]] = {}
        for prompt, value in zip(prompts, values):
            groups.setdefault(str(prompt), []).append(value)
        return mean_of_units([float(np.mean(group)) for group in groups.values()])

    start = [m.estimate.value[0] for m in measured]
    squared = [squared_increments(m) for m in measured]
    bound = [total_variance(v) + m.estimate.value_error[0] ** 2 for v, m in zip(start, measured)]
    found = discoveries(np.concatenate([m.estimate.replace.p_value for m in measured]))
    error = np.concatenate([m.estimate.replace.standard_error for m in measured])
    named = {
        "start": (by_prompt(start), "success probability"),
        "squared_increments": (by_prompt(squared), "probability squared"),
        "start_variance": (by_prompt(bound), "probability squared"),
        "law_difference": (by_prompt(np.subtract(squared, bound)), "probability squared"),
    }
    plain_ones = {
        "tokens": (len(error), "tokens"),
        "undefined": (int(sum((m.estimate.design.rest <= 0).sum() for m in measured)), "tokens"),
        "skipped": (int(sum(m.estimate.design.skipped.sum() for m in measured)), "tokens"),
        "pivotal": (int(found.sum()), "tokens"),
        "standard_error_median": (
            float(np.nanmedian(error)) if np.isfinite(error).any() else math.nan,
            "success probability",
        ),
        "bias_worst": (float(max(m.estimate.design.bias.max() for m in measured)), "success probability"),
        "rollouts": (sum(m.rollouts for m in measured), "rollouts"),
        "generated": (sum(m.generated for m in measured), "tokens"),
    }
    made = {"seed": seed, "command": command}
    figures = {name: Figure.of(estimate, unit, **made) for name, (estimate, unit) in named.items()}
    figures |= {name: Figure(value, unit=unit, **made) for name, (value, unit) in plain_ones.items()}
    return {name: figure.as_json() for name, figure in figures.items()}


def squared_increments(m: MeasuredTrace) -> float:
    """Σ (Vᵢ − Vᵢ₋₁)² of a trace, unbiased: each square less its own variance."""
    effect = m.estimate.before_after
    return float(np.nansum(effect.value**2 - effect.standard_error**2))
