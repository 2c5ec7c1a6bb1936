"""How many pivotal tokens a budget finds: fixed, and in two stages that select by one estimand or the other, at equal
numbers of generated tokens.

    python benchmarks/two_stage.py [--worlds 10] [--screen 4] [--second 12] [--select 0.1 0.3]

A world is a set of prompts, each an enumerated table of logits per prefix (`tasks.exact`), most of them far apart, so
that most tokens are near certain and a few decide, as in a language model. Traces are sampled from the tables, and
`measure` does what it does on a model. A second stage has `--second` rollouts per token on average, whatever share of
the tokens is selected. A token is pivotal where the exact |estimand| is above 0.1, and found where the interval of its
estimate leaves out 0 (false discovery rate .05) with the right sign. `recall` is the share of pivotal tokens that are
found, `error` the root mean squared error of the estimand at them. The fixed budget gets the smallest number of
rollouts per token with which it generates at least as many tokens as the two stages that it is compared with.
Intervals are over worlds.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch

from _result import finish
from tokencredit.lm.distribution import Settings, uniforms
from tokencredit.lm.sampling import Rollout, Trace
from tokencredit.pivotality.budgets import ESTIMANDS, Fixed, TwoStage
from tokencredit.pivotality.estimator import discoveries
from tokencredit.pivotality.measure import measure
from tokencredit.pivotality.store import RolloutStore
from tokencredit.stats import mean_of_units
from tokencredit.tasks.exact import ExactWorld, TabularPolicy

PIVOTAL = 0.1


def weighted_sum(completions):
    """1 where a weighted sum of the tokens is 1 modulo 3."""
    weights = torch.tensor([1.0, 2, 3, 1, 2, 3, 1, 2], dtype=torch.float64)[: completions.shape[1]]
    return ((completions.double() @ weights) % 3 == 1).double()


WORLD = ExactWorld(5, 8, weighted_sum, eos=4)


def forked_policy(seed, options):
    """A table in which a share of the prefixes is undecided (logits of scale 1) and the others nearly certain."""
    policy, generator = TabularPolicy(WORLD, seed=seed), torch.Generator().manual_seed(seed)
    for table in policy.tables:
        certain = torch.rand(len(table), 1, generator=generator) >= options.forks
        table.data *= torch.where(certain, options.scale, 1.0)
    return policy


class TableSampler:
    """Samples from enumerations, one per prompt, by the requests' seeds. A prompt is its enumeration's number."""

    settings = Settings()
    ends = (WORLD.eos,)

    def __init__(self, enumerations):
        self.log_probs = [torch.stack(levels) for levels in zip(*(e.log_probs for e in enumerations))]

    def distributions(self, traces):
        for trace in traces:
            prefixes = [torch.tensor([trace.completion[:i]], dtype=torch.long) for i in range(len(trace.completion))]
            yield torch.cat([self.log_probs[i][trace.prompt[0]][WORLD.index(x)] for i, x in enumerate(prefixes)])

    def continue_(self, traces, requests, progress=None):
        ids = [[*traces[r.trace].completion[: r.prefix], *(() if r.token is None else (r.token,))] for r in requests]
        begun = [len(each) for each in ids]
        for position in range(WORLD.horizon):
            open_ = [k for k, each in enumerate(ids) if len(each) == position and WORLD.eos not in each]
            if not open_:
                continue
            rows = WORLD.index(torch.tensor([ids[k] for k in open_], dtype=torch.long).view(len(open_), position))
            prompts = torch.tensor([traces[requests[k].trace].prompt[0] for k in open_])
            below = self.log_probs[position][prompts, rows].exp().cumsum(-1)
            u = uniforms(torch.tensor([requests[k].seed for k in open_]), torch.tensor(position))
            drawn = torch.searchsorted(below, (u.double() * below[:, -1])[:, None], right=True)[:, 0]
            for k, token in zip(open_, drawn.clamp(max=WORLD.vocab - 1).tolist()):
                ids[k].append(token)
        for k, each in enumerate(ids):
            written = tuple(each[begun[k] :])
            yield k, Rollout(written, each[-1] != WORLD.eos, (0.0,) * len(written), (0.0,) * len(written))


def exact_effects(enumeration, trace):
    """{estimand: [T]} of a trace from the enumeration."""
    token = torch.tensor(trace.completion)
    rows = [int(WORLD.index(token[None, :i])) for i in range(len(token))]
    p = torch.stack([enumeration.log_probs[i][row].exp() for i, row in enumerate(rows)])
    q = torch.stack([enumeration.action_values[i][row] for i, row in enumerate(rows)])
    at = torch.arange(len(token)), token
    credit = q[at] - (p * q).sum(-1)
    return {"before_after": credit.numpy(), "replace": (credit / (1 - p[at])).numpy()}


def scores(found, truth, estimand):
    """(recall, root mean squared error) at the pivotal tokens of a world."""
    value, p_value, exact = (
        np.concatenate(parts)
        for parts in (
            [m.estimate.effect(estimand).value for m in found],
            [m.estimate.effect(estimand).p_value for m in found],
            [each[estimand] for each in truth],
        )
    )
    pivotal = np.abs(exact) > PIVOTAL
    hit = discoveries(p_value) & (np.sign(value) == np.sign(exact))
    return float(hit[pivotal].mean()), float(np.sqrt(((value - exact)[pivotal] ** 2).mean()))


def study(seed, select, options):
    """{budget: {estimand: (recall, error)}, ...} of one world, with the tokens that each budget generated."""
    traces, enumerations = [], []
    for prompt in range(options.prompts):
        with torch.no_grad():
            enumerations.append(WORLD.enumerate(forked_policy(seed * options.prompts + prompt, options)))
        sequences, mask, _ = enumerations[-1].draw(options.samples, torch.Generator().manual_seed(seed))
        traces += [Trace((prompt,), ids) for ids in {tuple(s[m].tolist()): None for s, m in zip(sequences, mask)}]
    truth = [exact_effects(enumerations[trace.prompt[0]], trace) for trace in traces]
    sampler = TableSampler(enumerations)

    def run(budget):
        found = measure(
            traces,
            sampler,
            lambda k, ids, truncated: WORLD.verify(ids),
            budget=budget,
            max_new_tokens=WORLD.horizon,
            store=RolloutStore(None, {}),
            seed=seed,
        )
        return found, sum(m.generated for m in found)

    confirm = round(options.second / (select + options.control * (1 - select)))
    stages = TwoStage(options.screen, confirm, select, options.control)
    runs = {f"two stages by {name}": run(replace(stages, estimand=name)) for name in ESTIMANDS}
    for name in ESTIMANDS:
        enough, num = runs[f"two stages by {name}"][1], 2
        fixed = run(Fixed(num))
        while fixed[1] < enough:
            num = max(num + 1, int(num * enough / fixed[1]))
            fixed = run(Fixed(num))
        runs[f"fixed for {name}"] = fixed
    pivotal = {name: int(sum((np.abs(each[name]) > PIVOTAL).sum() for each in truth)) for name in ESTIMANDS}
    return {
        "tokens": sum(len(trace.completion) for trace in traces),
        "pivotal": pivotal,
        "generated": {name: generated for name, (_, generated) in runs.items()},
        "scores": {
            name: {estimand: scores(found, truth, estimand) for estimand in ESTIMANDS if pivotal[estimand]}
            for name, (found, _) in runs.items()
        },
    }


def interval(values):
    estimate = mean_of_units(values.tolist())
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def figures(worlds):
    """Recall and error of every budget for the estimand asked for, and their differences, over worlds."""
    found = {}
    for estimand in ESTIMANDS:
        some = [w["scores"] for w in worlds if w["pivotal"][estimand]]
        names = [*(f"two stages by {name}" for name in ESTIMANDS), f"fixed for {estimand}"]
        for which, measure_ in enumerate(("recall", "error")):
            column = {name: np.array([w[name][estimand][which] for w in some]) for name in names}
            for name, values in column.items():
                found[f"{estimand}/{measure_}/{name}"] = interval(values)
            asked = f"two stages by {estimand}"
            for name in names:
                if name != asked:
                    found[f"{estimand}/{measure_}/{asked} less {name}"] = interval(column[asked] - column[name])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("worlds", 10), ("prompts", 24), ("samples", 2), ("screen", 4), ("second", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--select", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--control", type=float, default=0.05)
    parser.add_argument("--forks", type=float, default=0.06)
    parser.add_argument("--scale", type=float, default=8.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for select in options.select:
        worlds = [study(seed, select, options) for seed in range(options.worlds)]
        found |= {f"select {select:g}/{name}": value for name, value in figures(worlds).items()}
        for name in worlds[0]["generated"]:
            found[f"select {select:g}/generated/{name}"] = sum(w["generated"][name] for w in worlds)
    tokens = sum(w["tokens"] for w in worlds)
    shares = {name: sum(w["pivotal"][name] for w in worlds) / tokens for name in ESTIMANDS}
    finish("two_stage", {"figures": found, "tokens": tokens, "pivotal_share": shares, "settings": vars(options)})


if __name__ == "__main__":
    main()
