"""How often the interval of a corrected correlation holds the exact one, for `spread` and `before_after`, by prompts
and rollouts: worlds of four tokens out of six or eight, enumerated, with policies from undecided to nearly certain;
95 % are promised.

Three rules say where a figure is given at all: "above zero", Cov(U_A, U_B) is at its lower bound; "share", it is above
a quarter of Var(U); "gate", that and enough rollouts, as `agreement.moments` has it. Each has [share of the
repetitions that are given a figure, coverage of those]; `totals` counts them.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import torch

from _result import finish
from tokencredit.agreement import moments
from tokencredit.agreement.moments import Squares, corrected_draws, exact_draws
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.agreement.rollouts import AlternativeRollouts
from tokencredit.tasks.exact import ExactWorld, TabularPolicy

HORIZON, WORLDS, REPETITIONS = 4, 60, 40
RULES = {"above zero": (0.0, False), "share": (moments.OWN, False), "gate": (moments.OWN, True)}
POLICIES = ((6, 2.0), (8, 3.0), (8, 4.0), (6, 5.0))  # tokens to choose from, standard deviation of their logits


def make_worlds(vocab, scale):
    """(log p, Q) by depth of every world."""
    found = []
    for seed in range(WORLDS):
        rng = np.random.default_rng(seed)
        right = torch.tensor(rng.random(vocab**HORIZON) < rng.uniform(0.1, 0.6)).double()
        place = vocab ** torch.arange(HORIZON - 1, -1, -1)
        world = ExactWorld(vocab, HORIZON, lambda ended, right=right, place=place: right[(ended * place).sum(-1)])
        with torch.no_grad():
            known = world.enumerate(TabularPolicy(world, seed=seed, scale=scale))
        found.append([(lp.numpy(), q.numpy()) for lp, q in zip(known.log_probs, known.action_values)])
    return found


def complete(world, n, rng):
    """One completion: its reward, and of every token (π, rewards, alternatives, shares, {effect}, entropy)."""
    prefix, tokens = 0, []
    for log_p, q in world:
        p, values = np.exp(log_p[prefix]), q[prefix]
        token = rng.choice(len(p), p=p / p.sum())
        others = np.where(np.arange(len(p)) == token, 0, p) / (1 - p[token])
        drawn = rng.choice(len(p), n, p=others / others.sum())
        effects = (values[token] - p @ values, np.sqrt(p @ (values - p @ values) ** 2))
        rewards = (rng.random(n) < values[drawn]).astype(float)
        tokens.append((p[token], rewards, drawn, others[drawn], *effects, -(p * log_p[prefix]).sum()))
        prefix = prefix * len(p) + token
    return values[token], tokens


def covered(worlds, prompts, n, rep):
    """{effect: {rule: (given, covers)}}."""
    rng = np.random.default_rng(rep)
    rows = [complete(worlds[k], n, rng) for k in np.repeat(rng.permutation(WORLDS)[:prompts], 2)]
    pi, rewards, drawn, share, before_after, spread, entropy = (
        np.array(x) for x in zip(*(token for _, tokens in rows for token in tokens))
    )
    trace = np.repeat(np.arange(len(rows)), HORIZON)
    rollouts = AlternativeRollouts(trace, pi, np.array([reward for reward, _ in rows]), rewards, drawn, share)
    boot, exact = Bootstrap(trace // 2, num=200, seed=rep), {"before_after": before_after, "spread": spread}
    squares = Squares.of(rollouts, tuple(exact), partitions=8)
    found = {name: {} for name in exact}
    for name, effect in exact.items():
        target = exact_draws(entropy, effect, boot)[0]
        for rule, (moments.OWN, counted) in RULES.items():
            here = squares[name] if counted else replace(squares[name], enough=True)
            draws = corrected_draws(entropy, here, boot)
            estimate = None if draws is None else boot.estimate(draws)
            found[name][rule] = (estimate is not None, bool(estimate and estimate.low <= target <= estimate.high))
    return found


def totals(figures):
    """{effect, rollouts, rule: [figures given, those that hold the exact one]} over worlds and numbers of prompts."""
    found = {}
    for name, (given, coverage) in figures.items():
        effect, *_, rollouts, rule = name.replace(" prompts x ", ", ").split(", ")
        place = found.setdefault(f"{effect}, {rollouts} rollouts, {rule}", [0, 0])
        place[0] += round(given * REPETITIONS)
        place[1] += round(given * REPETITIONS * (coverage or 0))
    return found


def main():
    torch.set_num_threads(1)
    figures = {}
    every = {policy: make_worlds(*policy) for policy in POLICIES}
    for (vocab, scale), prompts, n in product(POLICIES, (12, 48), (8, 16, 32)):
        reps = [covered(every[vocab, scale], prompts, n, rep) for rep in range(REPETITIONS)]
        for name, rule in product(reps[0], RULES):
            given, covers = np.array([rep[name][rule] for rep in reps], float).sum(0)
            figures[f"{name}, {vocab} tokens, scale {scale:g}, {prompts} prompts x {n}, {rule}"] = [
                given / REPETITIONS,
                covers / given if given else None,
            ]
    finish("spread_coverage", {"figures": figures, "totals": totals(figures), "repetitions": REPETITIONS})


if __name__ == "__main__":
    main()
