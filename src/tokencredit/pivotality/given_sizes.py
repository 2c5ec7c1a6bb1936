"""Few rollouts, and a guess beforehand of how large each effect is: where to spend them, and what they then say.

    dᵢ = Vᵢ − Vᵢ₋₁ ~ N(0, sᵢ²)                              independent beforehand; sᵢ the predicted size, Vₜ = R known
    v̂₋ = R + A d + ε,   Aᵢᵢ = −1 / (1 − πᵢ),  Aᵢⱼ = −1 for j > i       values without the token, ε their sampling error
    E[d | v̂₋]   = S Aᵀ G⁻¹ (v̂₋ − R),    G = A S Aᵀ + Σ,  S = diag s²,  Σ = diag Var ε
    Var[d | v̂₋] = S − S Aᵀ G⁻¹ A S

The best linear guess under that prior. With s → ∞ it is the unbiased estimate `before_after`, with s = 0 it is 0. It is
not unbiased: it is for finding tokens, and for a claim about one of them its interval is worth what the sizes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.durable import read_rows
from tokencredit.lm.sampling import Sampler, Trace
from tokencredit.pivotality.allocation import trace_probabilities
from tokencredit.pivotality.budgets import allocate
from tokencredit.pivotality.by_trace import ask_each
from tokencredit.pivotality.crew import Crew
from tokencredit.pivotality.estimands import PathMap
from tokencredit.pivotality.estimator import Effect, TraceEstimate
from tokencredit.pivotality.verdicts import Judge

NORMAL = 1.959964
SIZE = "learned_size"


def given_sizes(found: TraceEstimate, reward: float, size: np.ndarray) -> Effect:
    """`before_after` of a trace given its rollouts and size [T] ≥ 0; NaN where a token has no alternatives.

    Var ε is of (successes + 1) / (rollouts + 2), so that rollouts that agree are not taken for certain.
    """
    d = found.design
    at = np.flatnonzero(d.defined)
    rate = (found.proportion * d.num + 1) / (d.num + 2)
    noise = np.bincount(d.position, d.weight**2 * rate * (1 - rate) / d.num, minlength=len(d.pi))[at]
    prior = size[at].astype(float) ** 2
    A = -np.triu(np.ones((len(at), len(at))), 1) - np.diag(1 / d.rest[at])
    gain = np.linalg.solve((A * prior) @ A.T + np.diag(noise), A * prior).T
    value, error = (np.full(len(size), np.nan) for _ in range(2))
    value[at] = gain @ (found.v_not[at] - reward)
    error[at] = np.sqrt(np.maximum(prior - np.einsum("ij,ji->i", gain, A * prior), 0.0))
    return Effect(value, error, value - NORMAL * error, value + NORMAL * error)


def spread_rollouts(
    crew: Crew,
    traces: Mapping[int, Trace],
    size: Sequence[np.ndarray],
    num: int,
    skipped: Mapping[int, np.ndarray],
    failed: dict[int, Exception],
) -> dict[int, np.ndarray]:
    """Rollouts [T] of each trace, `num` on average and one at least, that minimise Σ s² Var(before_after).

    A rollout's cost is the tokens that are left, and nothing is known of its success.
    """
    found = ask_each(crew, own_probabilities, {k: (traces[k], None) for k in skipped}, failed)
    sampled = {k: (rest > 0) & ~skipped[k] for k, (_, rest) in found.items()}
    numbers = allocate(
        [PathMap.of(np.where(sampled[k], pi, 1.0), np.where(sampled[k], rest, 0.0)) for k, (pi, rest) in found.items()],
        [size[k].astype(float) ** 2 for k in found],
        [np.full(len(sampled[k]), 0.5) for k in found],
        [np.arange(len(sampled[k]), 0, -1.0) for k in found],
        num * int(sum(s.sum() for s in sampled.values())),
        sampled=list(sampled.values()),
        least=1,
        estimand="before_after",
    )
    return dict(zip(found, numbers))


def own_probabilities(sampler: Sampler, judge: Judge, k: int, trace: Trace, given: Any) -> tuple[np.ndarray, ...]:
    """Probabilities [T] of a trace's tokens, and of all others at their places, an `Ask`."""
    (log_p,) = sampler.distributions([trace])
    return trace_probabilities(log_p, trace.completion)[:2]


def read_sizes(path: Path, traces: Sequence[Trace]) -> list[np.ndarray]:
    """Column `learned_size` of a Parquet file with trace and position, [T] of every trace.

    ValueError where a token is missing or has a size below 0.
    """
    rows = read_rows(Path(path))
    if not rows or any(name not in rows[0] for name in ("trace", "position", SIZE)):
        there = ", ".join(rows[0]) if rows else "nothing"
        raise ValueError(f"{path} holds {there}; it needs trace, position and {SIZE}: `credit-model predict` writes it")
    known = {(row["trace"], row["position"]): row[SIZE] for row in rows}
    found = []
    for k, trace in enumerate(traces):
        sizes = np.array([known.get((k, i), np.nan) for i in range(len(trace.completion))], float)
        if not (sizes >= 0).all():
            i = int(np.flatnonzero(~(sizes >= 0))[0])
            raise ValueError(f"{path}: token {i} of trace {k} has {SIZE} {sizes[i]}; it needs a number of at least 0")
        found.append(sizes)
    return found
