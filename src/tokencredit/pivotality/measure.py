"""Measures the pivotality of every token of traces: designs, requests, rollouts, estimates.

traces -> distributions along them -> strata and requests -> rollouts, verified and stored -> estimates (-> a second,
fresh stage)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokencredit.lm.distribution import entropy, seed_of, uniforms
from tokencredit.lm.sampling import Progress, Request, Sampler, Trace
from tokencredit.pivotality.allocation import REST, Design, make_design
from tokencredit.pivotality.alternatives import AlternativeTable, substitute
from tokencredit.pivotality.budgets import Budget, Fixed, TwoStage, allocate, choose, skip
from tokencredit.pivotality.estimands import PathMap
from tokencredit.pivotality.estimator import Effect, TraceEstimate, estimate
from tokencredit.pivotality.given_sizes import given_sizes, spread_rollouts
from tokencredit.pivotality.store import Judge, Outcomes, RolloutStore, judged, prefix_digest


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


@dataclass(frozen=True)
class Stage:
    """Designs of all traces and the requests they make; `stratum` and `draw` [n] say what each request is for."""

    designs: list[Design]
    entropy: list[np.ndarray]
    requests: list[Request]
    stratum: np.ndarray
    draw: np.ndarray
    bounds: np.ndarray  # requests of trace k: bounds[k] … bounds[k+1]

    def of(self, k: int) -> slice:
        return slice(int(self.bounds[k]), int(self.bounds[k + 1]))

    def successes(self, k: int, reward: np.ndarray) -> np.ndarray:
        """Sums of rewards [H] of a trace's strata."""
        return np.bincount(self.stratum[self.of(k)], reward[self.of(k)], minlength=len(self.designs[k].num))


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
    """The pivotality of every token of every trace; see `budgets` for how rollouts are spent and `store` for how they
    are kept.

    sizes   predicted sizes [T] of before_after, per trace: a fixed budget is then spent where they are large, and
            `sized` is what its rollouts say given them
    """
    if sizes is not None and isinstance(budget, TwoStage):
        raise ValueError(
            "predicted sizes take the place of a screening: give them to a fixed budget, not to two stages"
        )
    check_traces(traces, sampler, max_new_tokens)
    verdicts = [own_reward(judge, k, trace, sampler.ends) for k, trace in enumerate(traces)]
    rewards = [reward for reward, _ in verdicts]
    first_budget = budget.first if isinstance(budget, TwoStage) else budget
    skipped, inclusion = skip_rule(traces, sampler, first_budget, seed)
    num = [np.full(len(trace.completion), first_budget.num) for trace in traces]
    if sizes is not None:
        num = spread_rollouts(traces, sampler, sizes, first_budget.num, skipped)
    first = make_stage(
        traces, sampler, num, skipped, max_new_tokens, seed, "screen" if isinstance(budget, TwoStage) else "fixed"
    )
    if progress:
        progress(0, total=len(first.requests))
    outcomes = store.collect(traces, first.requests, sampler, judge, "first", progress)
    found = [estimate(d, first.successes(k, outcomes.reward), rewards[k]) for k, d in enumerate(first.designs)]
    chosen = [e.design.defined for e in found]
    halves = [(first, outcomes, first.draw % 2)]
    if isinstance(budget, TwoStage):
        coins = [_coins(trace, seed, "control") for trace in traces]
        chosen, share = choose([e.effect(budget.estimand) for e in found], budget, coins)
        inclusion = [a * b for a, b in zip(inclusion, share)]
        num = _second_numbers(found, chosen, budget)
        second = make_stage(traces, sampler, num, skipped, max_new_tokens, seed, "confirm")
        if progress:
            progress(0, total=len(first.requests) + len(second.requests))
        fresh = store.collect(traces, second.requests, sampler, judge, "second", progress)
        found = [estimate(d, second.successes(k, fresh.reward), rewards[k]) for k, d in enumerate(second.designs)]
        halves = [(first, outcomes, np.zeros(len(first.draw), int)), (second, fresh, np.ones(len(second.draw), int))]
    swapped = [_substitute(k, trace, rewards[k], halves[-1][0], judge, sampler.ends) for k, trace in enumerate(traces)]
    gathered = [
        _gather(k, trace, *verdicts[k], sampler.ends, found[k], inclusion[k], chosen[k], swapped[k], halves)
        for k, trace in enumerate(traces)
    ]
    if sizes is None:
        return gathered
    return [replace(m, sized=given_sizes(m.estimate, m.reward, size)) for m, size in zip(gathered, sizes)]


def check_traces(traces: Sequence[Trace], sampler: Sampler, max_new_tokens: int) -> None:
    """ValueError for a sampler without alternatives, and for a trace that is not whole."""
    if sampler.settings.temperature == 0:
        raise ValueError(
            "at temperature 0 the sampler never writes anything but its first choice: alternatives have probability 0"
            " and pivotality is undefined at every token. Use the temperature that the traces were sampled with"
        )
    for k, trace in enumerate(traces):
        ids = trace.completion
        if not ids or len(ids) > max_new_tokens or any(t in sampler.ends for t in ids[:-1]):
            raise ValueError(
                f"trace {k} has {len(ids)} tokens; it needs 1 to {max_new_tokens} (max_new_tokens), and an end "
                "token only as the last"
            )
        if ids[-1] not in sampler.ends and len(ids) < max_new_tokens:
            raise ValueError(
                f"trace {k} stops after {len(ids)} tokens without an end token, although {max_new_tokens} were allowed:"
                " its reward is not that of a completion. Give the max_new_tokens it was sampled with, or its end"
                " token"
            )


def own_reward(judge: Judge, k: int, trace: Trace, ends: Sequence[int]) -> tuple[float, str]:
    """(reward, reason) of a trace itself. ValueError where the verifier answers differently the second time."""
    truncated = trace.completion[-1] not in ends
    answers = [judged(judge, k, trace.completion, truncated) for _ in range(3)]
    if len(set(answers)) > 1:
        raise ValueError(
            f"the verifier gave {answers} to the same completion (trace {k}): pivotality needs one that is"
            " deterministic"
        )
    return answers[0]


def make_stage(
    traces: Sequence[Trace],
    sampler: Sampler,
    num: Sequence[np.ndarray],
    skipped: Sequence[np.ndarray],
    max_new_tokens: int,
    seed: int,
    name: str,
) -> Stage:
    """Strata and requests for num[k] [T] rollouts at the tokens of trace k. Alternatives are drawn by the seeds of
    their requests.
    """
    designs, entropies, requests, stratum, draw, bounds = [], [], [], [], [], [0]
    for k, (trace, log_p) in enumerate(zip(traces, sampler.distributions(traces))):
        design = make_design(log_p, trace.completion, num[k], skipped[k])
        label = prefix_digest(trace, len(trace.completion))
        counter: dict[int, int] = {}
        for h, (i, token, n) in enumerate(zip(design.position.tolist(), design.token.tolist(), design.num.tolist())):
            start = counter.get(i, 0)
            counter[i] = start + n
            seeds = [seed_of(seed, name, label, i, c) for c in range(start, start + n)]
            tokens = [token] * n
            if token == REST:
                tokens = design.draw_rest(i, uniforms(torch.tensor(seeds), torch.tensor(i)).numpy()).tolist()
            requests += [Request(k, i, max_new_tokens - i - 1, s, int(t)) for s, t in zip(seeds, tokens)]
            stratum += [h] * n
            draw += range(n)
        # The cumulative distributions are as large as the vocabulary at every token.
        designs.append(replace(design, others={}))
        entropies.append(entropy(log_p.double()).numpy())
        bounds.append(len(requests))
    return Stage(designs, entropies, requests, np.array(stratum, int), np.array(draw, int), np.array(bounds))


def skip_rule(
    traces: Sequence[Trace], sampler: Sampler, budget: Fixed, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(skipped [T], inclusion probability [T]) of each trace; the model is asked only where a rule is set."""
    if budget.skip_below == 0:
        return [np.zeros(len(t.completion), bool) for t in traces], [np.ones(len(t.completion)) for t in traces]
    found = []
    for trace, log_p in zip(traces, sampler.distributions(traces)):
        p = log_p.double().exp()
        p[torch.arange(len(p)), torch.tensor(trace.completion)] = 0.0
        found.append(skip(p.sum(-1).numpy(), budget, _coins(trace, seed, "skip")))
    return [skipped for skipped, _ in found], [inclusion for _, inclusion in found]


def _coins(trace: Trace, seed: int, name: str) -> np.ndarray:
    """Uniforms [T] that depend on the trace and the seed alone."""
    key = torch.tensor([seed_of(seed, name, prefix_digest(trace, len(trace.completion)))])
    return uniforms(key, torch.arange(len(trace.completion))).numpy()


def _second_numbers(found: Sequence[TraceEstimate], chosen: Sequence[np.ndarray], budget: TwoStage) -> list[np.ndarray]:
    """Rollouts of the second stage [T] per trace, from the screened success rates."""
    defined = [e.design.defined for e in found]
    paths = [PathMap.of(np.where(d, e.design.pi, 1.0), np.where(d, e.design.rest, 0.0)) for e, d in zip(found, defined)]
    rate = [np.clip((np.nan_to_num(e.v_not) * budget.screen + 1) / (budget.screen + 2), 0.0, 1.0) for e in found]
    cost = [np.arange(len(d), 0, -1.0) for d in defined]
    total = budget.confirm * int(sum(c.sum() for c in chosen))
    sigma = [np.sqrt(r * (1 - r)) for r in rate]
    weights = [c.astype(float) for c in chosen]
    return allocate(paths, weights, sigma, cost, total, sampled=defined, estimand=budget.estimand)


def _substitute(k: int, trace: Trace, reward: float, stage: Stage, judge: Judge, ends: Sequence[int]) -> Effect:
    """`substitute` of trace k from the alternatives that a stage drew: a verification each, no rollout."""
    drawn = [(int(h), request.token) for h, request in zip(stage.stratum[stage.of(k)], stage.requests[stage.of(k)])]
    return substitute(k, trace, reward, stage.designs[k], drawn, judge, ends)


def _gather(
    k: int,
    trace: Trace,
    reward: float,
    reason: str,
    ends: Sequence[int],
    found: TraceEstimate,
    inclusion: np.ndarray,
    chosen: np.ndarray,
    swapped: Effect,
    halves: Sequence[tuple[Stage, Outcomes, np.ndarray]],
) -> MeasuredTrace:
    pieces = [
        [
            (r.prefix, r.token, half, reward)
            for r, half, reward in zip(
                stage.requests[stage.of(k)], which[stage.of(k)].tolist(), outcomes.reward[stage.of(k)].tolist()
            )
        ]
        for stage, outcomes, which in halves
    ]
    table = AlternativeTable.of([row for piece in pieces for row in piece])
    generated = sum(int(outcomes.length[stage.of(k)].sum()) for stage, outcomes, _ in halves)
    return MeasuredTrace(
        trace,
        reward,
        reason,
        trace.completion[-1] not in ends,
        found,
        np.where(found.design.rest > 0, inclusion, 0.0),
        chosen,
        swapped,
        table,
        halves[-1][0].entropy[k],
        sum(map(len, pieces)),
        generated,
    )
