"""Measures the pivotality of every token of traces: designs, requests, rollouts, estimates.

traces -> distributions along them -> strata and requests -> rollouts, verified and stored -> estimates (-> a second,
fresh stage)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tokencredit.lm.sampling import Progress, Sampler, Trace
from tokencredit.pivotality.allocation import Design
from tokencredit.pivotality.alternatives import AlternativeTable, substitute
from tokencredit.pivotality.budgets import Budget, TwoStage, allocate, choose
from tokencredit.pivotality.by_trace import ask_each
from tokencredit.pivotality.crew import Crew, Here
from tokencredit.pivotality.estimands import PathMap
from tokencredit.pivotality.estimator import Effect, TraceEstimate, estimate
from tokencredit.pivotality.given_sizes import given_sizes, spread_rollouts
from tokencredit.pivotality.stage import Stage, Wanted, coins, make_stage, skip_rule
from tokencredit.pivotality.store import Outcomes, RolloutStore
from tokencredit.pivotality.verdicts import Judge, own_reward


@dataclass(frozen=True)
class MeasuredTrace:
    """One trace and what was found. [T] arrays, one value per completion token.

    estimate      from the fresh second stage where there was one
    inclusion     probability that this token was among those given the full number of rollouts: its design weight is 1
                  / inclusion
    chosen        tokens that were: all of them unless there were two stages
    substitute    of the same alternatives as the estimate, each put in place of the token with the written rest kept;
                  nothing is sampled
    alternatives  counts of every alternative, in two independent halves (the screening and the second stage, where
                  there are two)
    entropy       of the distribution that sampled, nats
    sized         `before_after` given sizes that were predicted beforehand, where there are any: see `given_sizes`
    """

    trace: Trace
    reward: float
    reason: str
    truncated: bool
    estimate: TraceEstimate
    inclusion: np.ndarray
    chosen: np.ndarray
    substitute: Effect
    alternatives: AlternativeTable
    entropy: np.ndarray
    rollouts: int
    generated: int
    sized: Effect | None = None


def measure(
    traces: Sequence[Trace],
    sampler: Sampler,
    judge: Judge,
    *,
    budget: Budget,
    max_new_tokens: int,
    store: RolloutStore,
    seed: int = 0,
    progress: Progress | None = None,
    sizes: Sequence[np.ndarray] | None = None,
) -> list[MeasuredTrace]:
    """The pivotality of every token of every trace, found in this process; see `budgets` for how rollouts are spent and
    `store` for how they are kept. A trace that fails is an error; what was sampled is stored by then.

    sizes   predicted sizes [T] of before_after, per trace: a fixed budget is then spent where they are large, and
            `sized` is what its rollouts say given them
    """
    found, failed = measure_with(
        Here(sampler, judge),
        traces,
        budget=budget,
        max_new_tokens=max_new_tokens,
        store=store,
        seed=seed,
        progress=progress,
        sizes=sizes,
    )
    if failed:
        raise failed[min(failed)]
    return list(found.values())


def measure_with(
    crew: Crew,
    traces: Sequence[Trace],
    *,
    budget: Budget,
    max_new_tokens: int,
    store: RolloutStore,
    seed: int = 0,
    progress: Progress | None = None,
    sizes: Sequence[np.ndarray] | None = None,
) -> tuple[dict[int, MeasuredTrace], dict[int, Exception]]:
    """The same by a crew: the traces that were measured, and why the others were not, by number. A trace that fails
    changes nothing about the others, but that with two stages tokens are chosen among the traces that are left. The
    first error is raised where every trace failed.
    """
    if sizes is not None and isinstance(budget, TwoStage):
        raise ValueError(
            "predicted sizes take the place of a screening: give them to a fixed budget, not to two stages"
        )
    check_traces(traces, crew, max_new_tokens)
    numbered, failed = dict(enumerate(traces)), {}
    own = ask_each(crew, own_verdict, {k: (trace, None) for k, trace in numbered.items()}, failed)
    _check_left(traces, failed)
    screening = budget.first if isinstance(budget, TwoStage) else budget
    skipped, inclusion = skip_rule(crew, numbered, screening, seed, failed)

    # A trace without a verdict of its own is sampled with the others: what they are sampled with is always the same.
    name = "screen" if isinstance(budget, TwoStage) else "fixed"
    num = {k: np.full(len(traces[k].completion), screening.num) for k in skipped}
    if sizes is not None:
        num = spread_rollouts(crew, numbered, sizes, screening.num, skipped, failed)
    wanted = {k: Wanted(num[k], skipped[k], max_new_tokens, seed, name) for k in num}
    first = make_stage(crew, numbered, wanted, failed)
    _tell(progress, first)
    outcomes = _outcomes(crew, traces, first, store, "first", progress, failed)
    found = _estimates(first, outcomes, own, failed)
    chosen = {k: e.design.defined for k, e in found.items()}
    halves = [(first, outcomes, {k: first.traces[k].draw % 2 for k in found})]
    if isinstance(budget, TwoStage):
        chosen, share = _choice(traces, found, budget, seed)
        inclusion = {k: inclusion[k] * share[k] for k in found}
        num = _second_numbers(found, chosen, budget)
        wanted = {k: Wanted(num[k], skipped[k], max_new_tokens, seed, "confirm") for k in found}
        second = make_stage(crew, numbered, wanted, failed)
        _tell(progress, first, second)
        fresh = _outcomes(crew, traces, second, store, "second", progress, failed)
        found = _estimates(second, fresh, own, failed)
        halves = [
            (first, outcomes, {k: np.zeros(len(first.traces[k].draw), int) for k in found}),
            (second, fresh, {k: np.ones(len(second.traces[k].draw), int) for k in found}),
        ]
    last = halves[-1][0]
    swaps = {k: (traces[k], Swaps(own[k][0], last.traces[k].design, last.traces[k].drawn)) for k in found}
    swapped = ask_each(crew, swap, swaps, failed)
    _check_left(traces, failed)
    about = {"inclusion": inclusion, "chosen": chosen, "halves": halves, "ends": crew.ends}
    measured = {k: _gather(k, traces[k], *own[k], found[k], swapped[k], **about) for k in swapped}
    if sizes is not None:
        measured = {k: replace(m, sized=given_sizes(m.estimate, m.reward, sizes[k])) for k, m in measured.items()}
    return measured, failed


def _tell(progress: Progress | None, *stages: Stage) -> None:
    if progress:
        progress(0, total=sum(len(stage.requests) for stage in stages))


def _check_left(traces: Sequence[Trace], failed: Mapping[int, Exception]) -> None:
    """Raises the first error where every trace failed."""
    if failed and len(failed) == len(traces):
        raise failed[min(failed)]


def _outcomes(
    crew: Crew,
    traces: Sequence[Trace],
    stage: Stage,
    store: RolloutStore,
    name: str,
    progress: Progress | None,
    failed: dict[int, Exception],
) -> Outcomes:
    """The outcomes of a stage; what fails in it is put into `failed`, where it has not failed before."""
    found = store.collect(traces, stage.requests, crew, name, progress)
    for k, error in found.failed.items():
        failed.setdefault(k, error)
    _check_left(traces, failed)
    return found


def _estimates(
    stage: Stage, outcomes: Outcomes, own: Mapping[int, tuple[float, str]], failed: Iterable[int]
) -> dict[int, TraceEstimate]:
    """The estimate of every trace that has not failed."""
    left = [k for k in stage.traces if k not in failed]
    return {k: estimate(stage.traces[k].design, stage.successes(k, outcomes.reward), own[k][0]) for k in left}


def _choice(
    traces: Sequence[Trace], found: Mapping[int, TraceEstimate], budget: TwoStage, seed: int
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """(chosen [T], inclusion probability [T]) of every trace, from the screening."""
    effects = [e.effect(budget.estimand) for e in found.values()]
    chosen, share = choose(effects, budget, [coins(traces[k], seed, "control") for k in found])
    return dict(zip(found, chosen)), dict(zip(found, share))


def own_verdict(sampler: Sampler, judge: Judge, k: int, trace: Trace, given: Any) -> tuple[float, str]:
    """(reward, reason) of a trace itself, an `Ask`."""
    return own_reward(judge, k, trace, sampler.ends)


@dataclass(frozen=True)
class Swaps:
    """What `substitute` of a trace is made of: its own reward, and the alternatives (stratum, token) that a stage
    drew.
    """

    reward: float
    design: Design
    drawn: list[tuple[int, int]]


def swap(sampler: Sampler, judge: Judge, k: int, trace: Trace, swaps: Swaps) -> Effect:
    """`substitute` of a trace, an `Ask`: a verification of each alternative, no rollout."""
    return substitute(k, trace, swaps.reward, swaps.design, swaps.drawn, judge, sampler.ends)


def check_traces(traces: Sequence[Trace], crew: Crew, max_new_tokens: int) -> None:
    """ValueError for a sampler without alternatives, and for a trace that is not whole."""
    if crew.settings.temperature == 0:
        raise ValueError(
            "at temperature 0 the sampler never writes anything but its first choice: alternatives have probability 0"
            " and pivotality is undefined at every token. Use the temperature that the traces were sampled with"
        )
    for k, trace in enumerate(traces):
        ids = trace.completion
        if not ids or len(ids) > max_new_tokens or any(t in crew.ends for t in ids[:-1]):
            raise ValueError(
                f"trace {k} has {len(ids)} tokens; it needs 1 to {max_new_tokens} (max_new_tokens), and an end "
                "token only as the last"
            )
        if ids[-1] not in crew.ends and len(ids) < max_new_tokens:
            raise ValueError(
                f"trace {k} stops after {len(ids)} tokens without an end token, although {max_new_tokens} were allowed:"
                " its reward is not that of a completion. Give the max_new_tokens it was sampled with, or its end"
                " token"
            )


def _second_numbers(
    estimates: Mapping[int, TraceEstimate], choice: Mapping[int, np.ndarray], budget: TwoStage
) -> dict[int, np.ndarray]:
    """Rollouts of the second stage [T] of every trace, from the screened success rates."""
    found, chosen = list(estimates.values()), [choice[k] for k in estimates]
    defined = [e.design.defined for e in found]
    paths = [PathMap.of(np.where(d, e.design.pi, 1.0), np.where(d, e.design.rest, 0.0)) for e, d in zip(found, defined)]
    rate = [np.clip((np.nan_to_num(e.v_not) * budget.screen + 1) / (budget.screen + 2), 0.0, 1.0) for e in found]
    cost = [np.arange(len(d), 0, -1.0) for d in defined]
    total = budget.confirm * int(sum(c.sum() for c in chosen))
    sigma = [np.sqrt(r * (1 - r)) for r in rate]
    weights = [c.astype(float) for c in chosen]
    num = allocate(paths, weights, sigma, cost, total, sampled=defined, estimand=budget.estimand)
    return dict(zip(estimates, num))


def _gather(
    k: int,
    trace: Trace,
    reward: float,
    reason: str,
    found: TraceEstimate,
    swapped: Effect,
    *,
    inclusion: Mapping[int, np.ndarray],
    chosen: Mapping[int, np.ndarray],
    halves: Sequence[tuple[Stage, Outcomes, Mapping[int, np.ndarray]]],
    ends: Sequence[int],
) -> MeasuredTrace:
    rows = [
        (request.prefix, request.token, half, value)
        for stage, outcomes, which in halves
        for request, half, value in zip(
            stage.traces[k].requests, which[k].tolist(), outcomes.reward[stage.where[k]].tolist()
        )
    ]
    return MeasuredTrace(
        trace,
        reward,
        reason,
        trace.completion[-1] not in ends,
        found,
        np.where(found.design.rest > 0, inclusion[k], 0.0),
        chosen[k],
        swapped,
        AlternativeTable.of(rows),
        halves[-1][0].traces[k].entropy,
        len(rows),
        sum(int(outcomes.length[stage.where[k]].sum()) for stage, outcomes, _ in halves),
    )
