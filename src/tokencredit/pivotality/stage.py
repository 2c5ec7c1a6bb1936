"""A stage of a measurement: which rollouts are wanted at the tokens of traces, from the sampler's distributions along
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tokencredit.lm.distribution import entropy, seed_of, uniforms
from tokencredit.lm.sampling import Request, Sampler, Trace
from tokencredit.pivotality.allocation import REST, Design, make_design
from tokencredit.pivotality.budgets import Fixed, skip
from tokencredit.pivotality.by_trace import ask_each
from tokencredit.pivotality.crew import Crew
from tokencredit.pivotality.store import prefix_digest
from tokencredit.pivotality.verdicts import Judge


@dataclass(frozen=True)
class Wanted:
    """Rollouts wanted at the tokens of one trace: num, skipped [T]; `name` of the stage and `seed` make their seeds."""

    num: np.ndarray
    skipped: np.ndarray
    max_new_tokens: int
    seed: int
    name: str


@dataclass(frozen=True)
class TraceStage:
    """A stage of one trace: its strata, the entropy [T] of what samples there, and its requests; `stratum` and `draw`
    [n] say what each request is for.
    """

    design: Design
    entropy: np.ndarray
    requests: list[Request]
    stratum: np.ndarray
    draw: np.ndarray

    @property
    def drawn(self) -> list[tuple[int, int]]:
        """(stratum, token) of every request."""
        return [(int(h), request.token) for h, request in zip(self.stratum, self.requests)]


@dataclass(frozen=True)
class Stage:
    """The stages of traces, by number, and all their requests; `where` those of each are."""

    traces: dict[int, TraceStage]
    requests: list[Request]
    where: dict[int, slice]

    @classmethod
    def of_traces(cls, traces: dict[int, TraceStage]) -> Stage:
        """Of the stages of traces, one after the other."""
        requests, where = [], {}
        for k, own in traces.items():
            where[k] = slice(len(requests), len(requests) + len(own.requests))
            requests += own.requests
        return cls(traces, requests, where)

    @property
    def designs(self) -> list[Design]:
        return [own.design for own in self.traces.values()]

    def successes(self, k: int, reward: np.ndarray) -> np.ndarray:
        """Sums of rewards [H] of a trace's strata."""
        own = self.traces[k]
        return np.bincount(own.stratum, reward[self.where[k]], minlength=len(own.design.num))


def make_stage(
    crew: Crew, traces: Mapping[int, Trace], wanted: Mapping[int, Wanted], failed: dict[int, Exception]
) -> Stage:
    """Strata and requests at the tokens of traces. Alternatives are drawn by the seeds of their requests."""
    return Stage.of_traces(ask_each(crew, designed, {k: (traces[k], wanted[k]) for k in wanted}, failed))


def designed(sampler: Sampler, judge: Judge, k: int, trace: Trace, wanted: Wanted) -> TraceStage:
    """The stage of one trace, an `Ask`."""
    (log_p,) = sampler.distributions([trace])
    design = make_design(log_p, trace.completion, wanted.num, wanted.skipped)
    label = prefix_digest(trace, len(trace.completion))
    requests, stratum, draw = [], [], []
    counter: dict[int, int] = {}
    for h, (i, token, n) in enumerate(zip(design.position.tolist(), design.token.tolist(), design.num.tolist())):
        start = counter.get(i, 0)
        counter[i] = start + n
        seeds = [seed_of(wanted.seed, wanted.name, label, i, c) for c in range(start, start + n)]
        tokens = [token] * n
        if token == REST:
            tokens = design.draw_rest(i, uniforms(torch.tensor(seeds), torch.tensor(i)).numpy()).tolist()
        requests += [Request(k, i, wanted.max_new_tokens - i - 1, s, int(t)) for s, t in zip(seeds, tokens)]
        stratum += [h] * n
        draw += range(n)
    # The cumulative distributions are as large as the vocabulary at every token.
    small = replace(design, others={})
    return TraceStage(small, entropy(log_p.double()).numpy(), requests, np.array(stratum, int), np.array(draw, int))


def skip_rule(
    crew: Crew, traces: Mapping[int, Trace], budget: Fixed, seed: int, failed: dict[int, Exception]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """(skipped [T], inclusion probability [T]) of each trace; the model is asked only where a rule is set."""
    if budget.skip_below == 0:
        return (
            {k: np.zeros(len(trace.completion), bool) for k, trace in traces.items()},
            {k: np.ones(len(trace.completion)) for k, trace in traces.items()},
        )
    rest = ask_each(crew, alternatives_probability, {k: (trace, None) for k, trace in traces.items()}, failed)
    found = {k: skip(own, budget, coins(traces[k], seed, "skip")) for k, own in rest.items()}
    return {k: skipped for k, (skipped, _) in found.items()}, {k: inclusion for k, (_, inclusion) in found.items()}


def alternatives_probability(sampler: Sampler, judge: Judge, k: int, trace: Trace, given: Any) -> np.ndarray:
    """Σ of the probabilities of all other tokens [T], an `Ask`."""
    (log_p,) = sampler.distributions([trace])
    p = log_p.double().exp()
    p[torch.arange(len(p)), torch.tensor(trace.completion)] = 0.0
    return p.sum(-1).numpy()


def coins(trace: Trace, seed: int, name: str) -> np.ndarray:
    """Uniforms [T] that depend on the trace and the seed alone."""
    key = torch.tensor([seed_of(seed, name, prefix_digest(trace, len(trace.completion)))])
    return uniforms(key, torch.arange(len(trace.completion))).numpy()
