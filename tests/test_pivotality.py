"""Estimators of pivotality against worlds whose values are known: enumeration, and the prefix tree of the embedded
world.
"""

import json
import math
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cuts import Cut
from tokencredit.distribute import together
from tokencredit.lm.completions import sample
from tokencredit.lm.distribution import Settings
from tokencredit.lm.fingerprint import model_hash
from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
from tokencredit.lm.policy import Policy
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.sampling import Request, Trace, end_tokens
from tokencredit.pivotality import export, record
from tokencredit.pivotality.allocation import REST, make_design, trace_probabilities
from tokencredit.pivotality.alternatives import AlternativeTable, max_alternative, substitute
from tokencredit.pivotality.budgets import ESTIMANDS, Fixed, TwoStage, allocate, choose, plan, skip
from tokencredit.pivotality.crew import Here
from tokencredit.pivotality.estimands import PathMap
from tokencredit.pivotality.estimator import Effect, before_after, discoveries, estimate, wilson, with_without
from tokencredit.pivotality.measure import measure
from tokencredit.pivotality.parts import cut, part_size
from tokencredit.pivotality.store import RolloutStore, StoreError, sampler_identity
from tokencredit.pivotality.tree import grow_forest, on_text
from tokencredit.tasks import load
from tokencredit.tasks.exact import (
    PROMPTS,
    ExactWorld,
    PromptedPolicy,
    TabularPolicy,
    encode,
    modular_world,
    tiny_model,
)
from tokencredit.tasks.reckon import Reckon
from tokencredit.tasks.verdict import CORRECT, WRONG, VerifierError

torch.set_num_threads(1)

REPETITIONS = 1200


def sums_to_one(completions):
    """Reward of moderate chance everywhere: a weighted digit sum, modulo 3."""
    weights = torch.tensor([1.0, 2, 3, 1, 2, 3], dtype=torch.float64)[: completions.shape[1]]
    return ((completions.double() @ weights) % 3 == 1).double()


WORLD = ExactWorld(5, 6, sums_to_one, eos=4)


class Truth:
    """A trace of an enumerated world: next-token log-probs, action values, and every estimand in closed form."""

    def __init__(self, world, enumeration, completion, reward):
        self.completion, self.reward = tuple(completion), float(reward)
        rows = [world.index(torch.tensor([completion[:i]], dtype=torch.long)) for i in range(len(completion))]
        self.log_p = torch.stack([enumeration.log_probs[i][row][0] for i, row in enumerate(rows)])
        self.q = np.array([enumeration.action_values[i][row][0].numpy() for i, row in enumerate(rows)])
        self.pi, self.rest, self.p = trace_probabilities(self.log_p, self.completion)
        self.after = self.q[np.arange(len(completion)), list(completion)]
        self.without = (self.p * self.q).sum(-1) / self.rest
        self.replace = self.after - self.without
        whole = self.log_p.exp().numpy()
        self.before = (whole * self.q).sum(-1)
        self.before_after = self.after - self.before
        self.spread_squared = (whole * (self.q - self.before[:, None]) ** 2).sum(-1)

    def proportions(self, design):
        """Success probability of every stratum [H]."""
        found = []
        for i, token in zip(design.position, design.token):
            tokens = design.others[i][0] if token == REST else [token]
            found.append(self.p[i, tokens] @ self.q[i, tokens] / self.p[i, tokens].sum())
        return np.clip(found, 0, 1)

    def design(self, num):
        return make_design(self.log_p, self.completion, np.full(len(self.completion), num))

    def draw(self, design, rng, repetitions=REPETITIONS):
        return rng.binomial(design.num, self.proportions(design), size=(repetitions, len(design.num)))


@cache
def truths(num_worlds=6, each=5):
    found = []
    for seed in range(num_worlds):
        with torch.no_grad():
            enumeration = WORLD.enumerate(TabularPolicy(WORLD, seed=seed, scale=1.5))
        sequences, mask, reward = enumeration.draw(each, torch.Generator().manual_seed(seed))
        found += [Truth(WORLD, enumeration, s[m].tolist(), r) for s, m, r in zip(sequences, mask, reward)]
    return found


def within(values, truth, errors=4.0):
    """Is the mean of repetitions [R,T] within so many standard errors of the truth, everywhere?"""
    error = values.std(0, ddof=1) / math.sqrt(len(values))
    return bool((np.abs(values.mean(0) - truth) <= errors * error + 1e-9).all())


# The estimators on an enumerated world: rollouts are coin tosses with the exact success probabilities.


def test_the_recursion_gives_the_exact_values():
    for t in truths():
        path = PathMap.of(t.pi, t.rest)
        values = path.values(t.without, t.reward)
        np.testing.assert_allclose(values, [*t.before, t.reward], atol=1e-12)
        A, a = path.before_after
        np.testing.assert_allclose(A @ t.without + a * t.reward, t.before_after, atol=1e-12)
        A, a = path.replace
        np.testing.assert_allclose(A @ t.without + a * t.reward, t.replace, atol=1e-12)


@pytest.mark.parametrize("num", [2, 5, 16])
def test_unbiased_at_every_token(num):
    rng = np.random.default_rng(num)
    for t in truths():
        d = t.design(num)
        e = estimate(d, t.draw(d, rng, 20000), t.reward)
        assert within(e.value, [*t.before, t.reward]) and within(e.v_not, t.without)
        assert within(e.replace.value, t.replace) and within(e.before_after.value, t.before_after)
        assert within(e.spread_squared, t.spread_squared - true_missing(t, d))
        proportion = t.proportions(d)
        assert within(e.replace.standard_error**2, e.maps["replace"] ** 2 @ (proportion * (1 - proportion) / d.num))


def true_missing(t, design):
    """Variance of V between the alternatives that are counted together."""
    missing = np.zeros(len(t.pi))
    for i, token in zip(design.position, design.token):
        if token == REST:
            tokens = design.others[i][0]
            p = t.p[i, tokens] / t.p[i, tokens].sum()
            missing[i] = t.p[i, tokens].sum() * (p @ t.q[i, tokens] ** 2 - (p @ t.q[i, tokens]) ** 2)
    return missing


def test_what_spread_may_miss_is_bounded():
    rng = np.random.default_rng(0)
    for t in truths():
        d = t.design(8)
        e = estimate(d, t.draw(d, rng), t.reward)
        error = e.spread_missing.std(0) / math.sqrt(REPETITIONS)
        assert (e.spread_missing.mean(0) + 4 * error + 1e-9 >= true_missing(t, d)).all()


@pytest.mark.parametrize("num", [8, 32])
def test_intervals_cover_as_they_say(num):
    """Share of (token, repetition) pairs whose 95 % interval holds the truth."""
    rng, covered = np.random.default_rng(num), {"replace": [], "before_after": []}
    for t in truths():
        d = t.design(num)
        e = estimate(d, t.draw(d, rng), t.reward)
        for name, found in covered.items():
            effect, truth = getattr(e, name), getattr(t, name)
            found.append(((effect.low - 1e-9 <= truth) & (truth <= effect.high + 1e-9)).mean(0))
    for name, found in covered.items():
        assert 0.93 <= np.concatenate(found).mean() <= 0.97, name


def test_the_joint_covariance_is_that_of_repetitions():
    rng = np.random.default_rng(1)
    for t in [t for t in truths() if len(t.pi) > 3][::5]:
        d = t.design(8)
        draws = t.draw(d, rng, 20000)
        e = estimate(d, draws, t.reward)
        for name in ("replace", "before_after", "value"):
            values = e.value if name == "value" else getattr(e, name).value
            empirical = np.cov(values.T)
            scale = np.sqrt(np.outer(np.diag(empirical), np.diag(empirical))) + 1e-6
            assert np.abs((e.covariance(name).mean(0) - empirical) / scale).max() < 0.06


def test_direct_estimators_are_unbiased_and_worse():
    """At equal rollouts the alternatives-only estimator has less variance, summed over tokens."""
    rng, sums = np.random.default_rng(2), np.zeros(2)
    for t in truths():
        half, full = t.design(8), t.design(16)
        on_path = rng.binomial(8, np.clip(t.after, 0, 1), size=(REPETITIONS, len(t.pi)))
        direct = with_without(half, t.draw(half, rng), on_path, np.full(len(t.pi), 8))
        ours = estimate(full, t.draw(full, rng), t.reward).replace
        assert within(direct.value, t.replace)
        sums += ours.value.var(0).sum(), direct.value.var(0).sum()
        num = np.full(len(t.pi), 16)
        simple = before_after(rng.binomial(16, t.before, size=(REPETITIONS, len(t.pi))), num, t.reward)
        variance = np.append(t.before * (1 - t.before), 0.0) / 16
        assert within(simple.value, t.before_after) and within(simple.standard_error**2, variance[:-1] + variance[1:])
    assert sums[0] <= 0.6 * sums[1]


def test_on_policy_squared_increments_sum_to_the_variance_of_the_start():
    """E Σ (Vᵢ − Vᵢ₋₁)² = V₀ (1 − V₀), exactly, over all completions of a world; and estimated without bias."""
    with torch.no_grad():
        enumeration = WORLD.enumerate(TabularPolicy(WORLD, seed=0, scale=1.5))
    sequences, mask, probability, _ = enumeration.completions
    credit = enumeration.scores(sequences, mask)["exact_value"]
    start = float(enumeration.success)
    assert float(probability @ (credit**2).sum(-1)) == pytest.approx(start * (1 - start), abs=1e-12)
    rng = np.random.default_rng(3)
    for t in truths()[::6]:
        d = t.design(8)
        effect = estimate(d, t.draw(d, rng), t.reward).before_after
        assert within((effect.value**2 - effect.standard_error**2).sum(-1)[:, None], (t.before_after**2).sum())


def test_discoveries_are_false_at_the_nominal_rate():
    """Only tokens 1 and 4 matter, and no token changes how the later ones are drawn: the others have no effect
    whatever.
    """

    def reward(completions):
        if completions.shape[1] < 5:
            return torch.zeros(len(completions))
        return ((completions[:, 1] >= 2) & (completions[:, 4] != 0)).double()

    world = ExactWorld(4, 6, reward)
    with torch.no_grad():
        enumeration = world.enumerate(lambda prefixes: torch.linspace(-0.5, 0.5, 4).expand(len(prefixes), 4))
    sequences, mask, rewards = enumeration.draw(12, torch.Generator().manual_seed(0))
    traces = [Truth(world, enumeration, s[m].tolist(), r) for s, m, r in zip(sequences, mask, rewards)]
    rng, p_values, null = np.random.default_rng(0), [], []
    for t in traces:
        d = t.design(16)
        p_values.append(estimate(d, t.draw(d, rng, 400), t.reward).replace.p_value)
        null.append(np.abs(t.replace) < 1e-9)
    p_values, null = np.concatenate(p_values, 1), np.concatenate(null)
    assert 0.4 < null.mean() < 0.9
    rejected = (p_values[:, null] < 0.05).mean()
    assert rejected <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)
    found = np.array([discoveries(p, 0.1) for p in p_values])
    false_share = (found & null).sum(1) / np.maximum(found.sum(1), 1)
    assert false_share.mean() <= 0.1 + 4 * false_share.std() / math.sqrt(len(found))
    assert found[:, ~null].mean() > 0.5


# Strata, budgets, alternatives.


@pytest.mark.parametrize("num", [1, 2, 3, 7, 8, 40])
def test_strata_hold_every_alternative_once(num):
    for t in truths():
        d = t.design(num)
        for i in range(len(t.pi)):
            at = d.position == i
            assert (
                d.num[at].sum() == num and d.weight[at].sum() == pytest.approx(1) and (d.num[at] >= min(num, 2)).all()
            )
            named = set(d.token[at]) - {REST}
            covered = named | set(d.others[i][0] if REST in d.token[at] else ())
            assert covered == set(np.flatnonzero(t.p[i])) and t.completion[i] not in covered


def test_the_rest_is_drawn_in_proportion():
    t = truths()[0]
    d = t.design(1)
    tokens, _ = d.others[0]
    drawn = d.draw_rest(0, np.random.default_rng(0).random(20000))
    expected = t.p[0, tokens] / t.p[0, tokens].sum()
    assert np.abs(np.bincount(drawn, minlength=5)[tokens] / 20000 - expected).max() < 4 * math.sqrt(0.25 / 20000)


def test_a_skipped_token_is_bounded_and_kept_now_and_then():
    t = max(truths(), key=lambda t: len(t.completion))
    skipped = t.rest < np.median(t.rest)
    d = make_design(t.log_p, t.completion, np.full(len(t.pi), 16), skipped)
    e = estimate(d, t.draw(d, np.random.default_rng(0), 4000), t.reward)
    gap = np.abs(e.value.mean(0) - [*t.before, t.reward])
    assert (gap <= d.bias + 0.03).all() and d.bias.max() > 0 and not d.bias[-1]
    assert np.isnan(e.replace.value[:, skipped]).all() and not np.isnan(e.replace.value[:, ~skipped]).any()
    held = (e.replace.low - 1e-9 <= t.replace) & (t.replace <= e.replace.high + 1e-9)
    assert held[:, ~skipped].mean() > 0.95
    rest = np.full(40000, 1e-4)
    out, inclusion = skip(rest, Fixed(8, skip_below=1e-3, control=0.1), np.random.default_rng(0).random(40000))
    assert abs(1 - out.mean() - 0.1) < 0.01 and set(inclusion) == {0.1}
    assert not skip(np.zeros(3), Fixed(8, skip_below=0.1), np.ones(3))[0].any()


def test_choice_has_a_known_inclusion_probability():
    values = [np.linspace(-1, 1, 1002), np.full(999, np.nan)]
    uniform = [np.random.default_rng(0).random(len(e)) for e in values]
    effects = [Effect(v, v, v - 0.1, v + 0.1) for v in values]
    chosen, inclusion = choose(effects, TwoStage(select=100 / 1002, control=0.2), uniform)
    large = np.abs(values[0]) >= np.sort(np.abs(values[0]))[-100]
    assert (inclusion[0] == np.where(large, 1.0, 0.2)).all() and chosen[0][large].all()
    assert abs(chosen[0][~large].mean() - 0.2) < 0.05 and not chosen[1].any() and not inclusion[1].any()


def test_selected_is_what_may_be_large_and_no_more_of_it_than_asked_for():
    """Of 0.4 ± 0.1, 0 ± 0.6 and 0.3 ± 0.1 the second may be largest; of equals the larger estimate, and then the share
    is kept: 2 of 5 defined tokens.
    """
    value = np.array([0.4, 0.0, 0.3, 0.3, 0.3, np.nan])
    half = np.array([0.1, 0.6, 0.1, 0.1, 0.2, np.nan])
    effect = Effect(value, half, value - half, value + half)
    assert effect.at_most[:5] == pytest.approx([0.5, 0.6, 0.4, 0.4, 0.5])
    (chosen,), (inclusion,) = choose([effect], TwoStage(select=0.4, control=0.0), [np.ones(6)])
    assert chosen.tolist() == [True, True, False, False, False, False] == (inclusion == 1).tolist()
    ties = Effect(*[np.full(10, 0.5)] * 4)
    assert choose([ties], TwoStage(select=0.25, control=0.0), [np.ones(10)])[0][0].sum() == 3


def test_two_stages_select_by_the_estimand_that_is_asked_for():
    """A token that is nearly certain and whose alternatives fail has a large `replace` and no `before_after`; a fork
    has both. By one estimand the first is selected, by the other the second: by their exact sizes, from which 200
    rollouts in the screening do not differ enough.
    """
    seen = {"replace": 0, "before_after": 0}
    for t in truths():
        d = t.design(200)
        e = estimate(d, t.draw(d, np.random.default_rng(0), 1)[0], t.reward)
        for name in seen:
            (chosen,), _ = choose([e.effect(name)], TwoStage(select=0.01, control=0.0), [np.ones(len(t.pi))])
            size = np.abs(getattr(t, name))
            assert chosen.sum() == 1 and size[chosen][0] > size.max() - 0.1
            other = np.abs(t.replace if name == "before_after" else t.before_after)
            seen[name] += int(chosen.argmax() != other.argmax())
    assert min(seen.values()) >= 5
    with pytest.raises(ValueError, match="replace, before_after, not by 'spread'"):
        TwoStage(estimand="spread")


def test_allocation_is_better_than_equal_numbers():
    """For the same total, the predicted variance of the wanted tokens is smaller, and no token is without."""
    t = max(truths(), key=lambda t: len(t.completion))
    path, sigma = PathMap.of(t.pi, t.rest), np.sqrt(t.without * (1 - t.without))
    weight = (np.arange(len(t.pi)) == 1).astype(float)
    equal = np.full(len(t.pi), 600 / len(t.pi))
    for name in ESTIMANDS:
        (num,) = allocate([path], [weight], [sigma], [np.ones(len(t.pi))], 600, sampled=[t.rest > 0], estimand=name)
        variance = [float((path.linear(name)[0][1] ** 2 * sigma**2 / n).sum()) for n in (num, equal)]
        assert num.min() >= 2 and num.sum() <= 600 and variance[0] < 0.7 * variance[1]


def test_the_plan_is_an_upper_bound_that_is_not_loose():
    rng, predicted, actual = np.random.default_rng(0), [], []
    for t in truths():
        d = t.design(16)
        found = plan([d], Fixed(16), tokens_per_second=100.0)
        assert found.rollouts == 16 * len(t.pi) and found.tokens == len(t.pi)
        assert found.seconds == pytest.approx(found.generated / 100, abs=0.01)
        predicted.append(found.standard_error_worst)
        actual.append(estimate(d, t.draw(d, rng), t.reward).replace.value.std(0).max())
    assert (np.array(predicted) * 1.06 >= actual).all() and np.mean(predicted) < 2 * np.mean(actual)


def test_the_largest_alternative_is_not_overstated():
    """All alternatives are alike: the largest difference, estimated on the other half, has mean zero."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        rows = [(0, token, half, float(rng.random() < 0.5)) for token in range(6) for half in (0, 1) for _ in range(5)]
        effect, _ = max_alternative(AlternativeTable.of(rows), np.array([0.5, 0.5]), np.zeros(2))
        found.append(effect.value[0])
        assert effect.low[0] <= effect.value[0] <= effect.high[0]
    assert abs(np.mean(found)) <= 4 * np.std(found) / 20
    effect, token = max_alternative(AlternativeTable.of([]), np.array([0.5, 0.5]), np.zeros(2))
    assert np.isnan(effect.value[0]) and token[0] == -1


def test_substitution_keeps_what_was_written():
    """By hand: reward 1 for an even last digit before E. Swapping another digit changes nothing; swapping that one
    does.
    """
    trace, log_p = Trace((0,), (1, 2, 4)), torch.full((3, 5), 0.2).log()

    def judge(k, ids, truncated):
        return len(ids) > 1 and not truncated and ids[-2] % 2 == 0

    d = make_design(log_p, trace.completion, np.full(3, 8))
    drawn = [(h, int(token)) for h, token in enumerate(d.token) for _ in range(d.num[h])]
    effect = substitute(0, trace, 1.0, d, drawn, judge, ends=(4,))
    # token 0: digits leave the reward, E ends at once with nothing before it: 1 − 3/4. Token 1: of 0, 1, 3 one is even;
    # E follows 1, odd: 1 − 1/4. Token 2: without the end the completion is cut: 1 − 0.
    assert effect.value.tolist() == [0.25, 0.75, 1.0] and effect.standard_error.tolist() == [0, 0, 0]


def test_measuring_substitutes_what_was_drawn_and_samples_nothing_for_it():
    """A reward of the first token alone: swapping it re-verifies the written rest, swapping any other leaves the
    reward.
    """
    _, _, sampler, traces, _ = modular_study()
    asked = []

    def judge(k, ids, truncated):
        asked.append(ids)
        return ids[0] == traces[k].completion[0]

    for m in measure(traces, sampler, judge, budget=Fixed(6), max_new_tokens=4, store=RolloutStore(None, {})):
        num = len(m.trace.completion)
        assert m.substitute.value == pytest.approx([1.0] + [0.0] * (num - 1)) and m.rollouts == 6 * num
        written = m.trace.completion[1:]
        assert any(ids[0] != m.trace.completion[0] and ids[1:] == written for ids in asked)


# The whole pipeline, on a model.

END = 9


def modular_study(horizon=4, prompt=PROMPTS[40], num=6, seed=0):
    """World, model, traces and judge of the modular world."""
    world, model = modular_world(prompt, horizon), tiny_model(1)
    sampler = PrefixSampler(model, ends=[END])
    drawn = sample(model, SimpleNamespace(eos_token_id=END), [encode(prompt)], num, max_new_tokens=horizon, seed=seed)[
        0
    ]
    traces = [Trace(tuple(encode(prompt)), c.ids) for c in drawn]
    return world, model, sampler, traces, lambda k, ids, truncated: world.verify(ids)


def test_measured_values_are_those_of_enumeration():
    world, model, sampler, traces, judge = modular_study()
    with torch.no_grad():
        enumeration = world.enumerate(PromptedPolicy(model, encode(PROMPTS[40])))
    for m in measure(traces, sampler, judge, budget=Fixed(300), max_new_tokens=4, store=RolloutStore(None, {})):
        t = Truth(world, enumeration, m.trace.completion, m.reward)
        np.testing.assert_allclose(m.estimate.design.pi, t.pi, rtol=1e-4)
        error = np.sqrt(t.without * (1 - t.without) / 300)
        assert (np.abs(m.estimate.v_not - t.without) <= 4 * error + 1e-5).all()
        assert m.rollouts == 300 * len(t.pi) and (m.inclusion == 1).all()
        np.testing.assert_allclose(m.entropy, -(t.log_p.exp() * t.log_p).sum(-1), atol=1e-4)


@cache
def reckon_study(num_prompts=6, samples=2):
    path, task = resolve_model("reckon"), load("reckon")
    model, tokenizer = load_model(path).eval(), load_tokenizer(path)
    rows = task.rows("test", num_prompts, 3)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    drawn = sample(model, tokenizer, prompts, samples, max_new_tokens=task.max_new_tokens, seed=5)
    traces = [Trace(tuple(p), c.ids) for p, some in zip(prompts, drawn) for c in some]
    mine = [row for row in rows for _ in range(samples)]

    def judge(k, ids, truncated):
        return task.verify(tokenizer.decode(list(ids), skip_special_tokens=True), mine[k], truncated)

    written = [[c.ids for c in some] for some in drawn]
    trees = grow_forest(
        model,
        prompts,
        [on_text(task.verify, tokenizer, row) for row in rows],
        eos_token_id=end_tokens(model, tokenizer),
        max_new_tokens=task.max_new_tokens,
        eps=1e-4,
        include=written,
        include_eps=1e-4,
    )
    sampler = PrefixSampler(model, ends=end_tokens(model, tokenizer))
    return (
        model,
        tokenizer,
        sampler,
        traces,
        mine,
        judge,
        [tree for tree in trees for _ in range(samples)],
        task.max_new_tokens,
    )


def test_measured_values_are_within_the_brackets_of_the_tree():
    """Every token of the embedded world: V₋ within 4.5 standard errors of a rigorous bracket; the law; intervals meet
    the brackets.
    """
    *_, sampler, traces, _, judge, trees, limit = reckon_study()
    found = measure(traces, sampler, judge, budget=Fixed(48), max_new_tokens=limit, store=RolloutStore(None, {}))
    held, law = [], []
    for m, tree in zip(found, trees):
        path = tree.path(m.trace.completion)
        after, before, rest = path.after.numpy(), path.before.numpy(), m.estimate.design.rest
        others = np.clip((before - (1 - rest)[:, None] * after) / rest[:, None], 0, 1)
        low, high = others.min(-1), others.max(-1)
        # Away from the bracket by more than sampling can explain, with the standard deviation of its nearer end.
        outside = np.maximum(np.maximum(low - m.estimate.v_not, m.estimate.v_not - high), 0)
        nearest = np.clip(m.estimate.v_not, low, high)
        assert (outside <= 4.5 * np.sqrt(nearest * (1 - nearest) / 48) + 0.005).all()
        credit, effect = path.credit_bracket.numpy(), m.estimate.before_after
        held.append((effect.low <= credit[:, 1] + 1e-6) & (credit[:, 0] - 1e-6 <= effect.high))
        law.append(
            record.squared_increments(m)
            - float(m.estimate.value[0] * (1 - m.estimate.value[0]) + m.estimate.value_error[0] ** 2)
        )
    assert np.concatenate(held).mean() >= 0.93
    assert abs(np.mean(law)) <= 4 * np.std(law, ddof=1) / math.sqrt(len(law))


def test_estimates_on_the_embedded_world_cover_what_they_say():
    """Unbiased at every token and 95 % intervals over 1,200 repetitions; an alternative that the tree pruned counts as
    a failure.

    Rollouts are coin tosses with the tree's values, which makes the repetitions cheap.
    """
    *_, sampler, traces, _, judge, trees, _ = reckon_study()
    rng, held = np.random.default_rng(0), {"replace": [], "before_after": []}
    for k, (trace, tree, log_p) in enumerate(zip(traces, trees, sampler.distributions(traces))):
        pi, rest, p = trace_probabilities(log_p, trace.completion)
        q = np.zeros(p.shape)
        for i in range(len(pi)):
            known = tree.alternatives(trace.completion[:i])
            q[i, known.token.numpy()] = known.value.mean(-1).numpy()
        without, reward = (
            (p * q).sum(-1) / rest,
            judge(k, trace.completion, trace.completion[-1] not in sampler.ends).correct,
        )
        values = PathMap.of(pi, rest).values(without, float(reward))
        truth = {"replace": values[1:] - without, "before_after": np.diff(values)}
        d = make_design(log_p, trace.completion, np.full(len(pi), 8))
        chance = Truth.proportions(SimpleNamespace(p=p, q=q), d)
        e = estimate(d, rng.binomial(d.num, chance, size=(REPETITIONS, len(d.num))), float(reward))
        for name, true in truth.items():
            effect, error = getattr(e, name), np.sqrt(e.maps[name] ** 2 @ (chance * (1 - chance) / d.num) / REPETITIONS)
            # An event of chance 1e-5 is seen in 1,200 repetitions once or not at all, which no normal bound allows for:
            # hence .002.
            assert (np.abs(effect.value.mean(0) - true) <= 4 * error + 0.002).all(), name
            held[name].append(((effect.low - 1e-9 <= true) & (true <= effect.high + 1e-9)).mean(0))
    for name, shares in held.items():
        assert 0.93 <= np.concatenate(shares).mean() <= 0.97, name


def test_two_stages_report_fresh_rollouts_only():
    """What the second stage says does not depend on what the verifier answered in the first."""
    _, _, sampler, traces, judge = modular_study()
    budget = TwoStage(screen=4, confirm=30, select=0.2, control=0.2)
    found = measure(traces, sampler, judge, budget=budget, max_new_tokens=4, store=RolloutStore(None, {}))
    screen = measure(traces, sampler, judge, budget=Fixed(4), max_new_tokens=4, store=RolloutStore(None, {}))
    for m, s in zip(found, screen):
        assert m.chosen.sum() <= len(m.chosen) and set(np.round(m.inclusion, 6)) <= {0.2, 1.0}
        assert (
            m.estimate.design.num.min() >= 2
            and (m.alternatives.num.sum(0) == [s.rollouts, m.rollouts - s.rollouts]).all()
        )
        on = np.bincount(m.estimate.design.position, m.estimate.design.num, minlength=len(m.chosen))
        assert on[m.chosen].sum() * (~m.chosen).sum() >= on[~m.chosen].sum() * m.chosen.sum()
    assert sum(m.chosen.sum() for m in found) < 0.6 * sum(len(m.chosen) for m in found)


def test_temperature_and_truncation_are_honoured():
    _, model, _, _, judge = modular_study()
    sampler = PrefixSampler(model, ends=[END], settings=Settings(0.8, top_k=2))
    drawn = [Trace(tuple(encode(PROMPTS[40])), ids) for ids in {continued(sampler, k) for k in range(4)}]
    for m in measure(drawn, sampler, judge, budget=Fixed(4), max_new_tokens=4, store=RolloutStore(None, {})):
        assert all(len(m.alternatives.at(i)) == 1 for i in range(len(m.trace.completion)))
    single = PrefixSampler(model, ends=[END], settings=Settings(1.0, top_k=1))
    only = measure(
        [Trace(tuple(encode(PROMPTS[40])), continued(single, 0))],
        single,
        judge,
        budget=Fixed(4),
        max_new_tokens=4,
        store=RolloutStore(None, {}),
    )[0]
    assert np.isnan(only.estimate.replace.value).all() and not only.inclusion.any() and only.rollouts == 0
    assert (only.estimate.value == only.reward).all()


def continued(sampler, seed):

    return dict(sampler.continue_([Trace(tuple(encode(PROMPTS[40])))], [Request(0, 0, 4, seed)]))[0].ids


def test_certain_and_impossible_prompts():
    """V₀ of 0 and of 1: no effect anywhere, no warning, intervals that hold zero."""
    _, _, sampler, traces, _ = modular_study()
    for reward in (0.0, 1.0):
        found = measure(
            traces, sampler, lambda *_, r=reward: r, budget=Fixed(8), max_new_tokens=4, store=RolloutStore(None, {})
        )
        for m in found:
            assert np.allclose(m.estimate.value, reward) and np.allclose(m.estimate.replace.value, 0)
            assert (m.estimate.replace.low <= 1e-9).all() and (m.estimate.replace.high >= -1e-9).all()
            assert not discoveries(m.estimate.replace.p_value).any()
        figures = record.figures(found, ["p"] * len(found))
        assert figures["start"]["value"] == pytest.approx(reward) and figures["pivotal"]["value"] == 0


def test_bad_input():
    _, model, sampler, traces, judge = modular_study()
    options = {"budget": Fixed(4), "max_new_tokens": 4, "store": RolloutStore(None, {})}
    with pytest.raises(ValueError, match="temperature 0"):
        measure(traces, PrefixSampler(model, ends=[END], settings=Settings(0.0)), judge, **options)
    with pytest.raises(ValueError, match="stops after 2 tokens"):
        measure([Trace(traces[0].prompt, (1, 2))], sampler, judge, **options)
    with pytest.raises(ValueError, match="has 5 tokens"):
        measure([Trace(traces[0].prompt, (1,) * 5)], sampler, judge, **options)
    with pytest.raises(ValueError, match="probability 0 under this sampler"):
        narrow = PrefixSampler(model, ends=[END], settings=Settings(top_k=1))
        measure([Trace(traces[0].prompt, (t,) * 4) for t in range(9)], narrow, judge, **options)
    coin = np.random.default_rng(0)
    with pytest.raises(ValueError, match="deterministic"):
        measure(traces, sampler, lambda *_: bool(coin.random() < 0.5), **options)
    with pytest.raises(VerifierError, match="ZeroDivisionError"):
        measure(traces, sampler, lambda *_: 1 / 0, **options)
    with pytest.raises(ValueError, match="between 0 and 1"):
        measure(traces, sampler, lambda *_: 3.0, **options)
    with pytest.raises(ValueError, match="context is 64"):
        measure([Trace((1,) * 70, (1, 2, 9))], sampler, judge, **options)
    for wrong in (lambda: Fixed(1), lambda: TwoStage(select=0.0), lambda: Fixed(8, skip_below=1.0)):
        with pytest.raises(ValueError):
            wrong()


def test_a_trace_cut_by_the_length_limit_keeps_its_own_reward():
    _, _, sampler, _, _ = modular_study()
    trace = Trace(tuple(encode(PROMPTS[40])), (0, 0, 0, 0))
    seen = []

    def judge(k, ids, truncated):
        seen.append((len(ids), truncated, ids[-1] == END))
        return WRONG if truncated else CORRECT

    m = measure([trace], sampler, judge, budget=Fixed(8), max_new_tokens=4, store=RolloutStore(None, {}))[0]
    assert m.truncated and m.reward == 0 and m.estimate.value[-1] == 0
    assert all(length <= 4 and truncated is not ended for length, truncated, ended in seen)


# The store.


def identity_of(model, sampler, name="a"):
    about = {"model": name, "model_digest": model_hash(model), "verifier": "modular", "max_new_tokens": 4}
    return sampler_identity("PrefixSampler", sampler.settings, sampler.ends, **about)


def test_a_store_of_another_model_or_sampler_is_refused(tmp_path):
    _, model, sampler, traces, judge = modular_study(num=1)
    unused = RolloutStore(tmp_path, identity_of(tiny_model(3), sampler))
    assert not tmp_path.joinpath("identity.json").exists() and unused.part is None
    store = RolloutStore(tmp_path, identity_of(model, sampler))
    measure(traces, sampler, judge, budget=Fixed(2), max_new_tokens=4, store=store)
    RolloutStore(tmp_path, identity_of(model, sampler, "moved"))
    other = tiny_model(2)
    with pytest.raises(StoreError, match=rf"'a'.*'b'[\s\S]*{model_hash(model)}.*{model_hash(other)}"):
        RolloutStore(tmp_path, identity_of(other, sampler, "b"))
    with pytest.raises(StoreError, match=r"sampler\.temperature: 1.0 in the store, 0.5 asked for"):
        RolloutStore(tmp_path, identity_of(model, PrefixSampler(model, ends=[END], settings=Settings(0.5))))


def test_stored_rollouts_are_read_and_not_sampled(tmp_path):
    import pyarrow.parquet as parquet

    _, model, sampler, traces, judge = modular_study()
    store = RolloutStore(tmp_path, identity_of(model, sampler), part=100, labels=["x"] * len(traces))
    options = {"budget": Fixed(8), "max_new_tokens": 4}
    first = measure(traces, sampler, judge, store=store, **options)
    table = parquet.read_table(tmp_path / "parts")
    assert set(table.column_names) >= {"trace", "position", "alternative", "reward", "reason", "length", "seed"}
    assert table.num_rows == sum(m.rollouts for m in first) and len(list((tmp_path / "parts").iterdir())) == -(
        -table.num_rows // 100
    )
    broken = PrefixSampler(model, ends=[END])
    broken.continue_ = None
    again = measure(
        traces,
        broken,
        judge,
        store=RolloutStore(tmp_path, identity_of(model, sampler), part=100, labels=["x"] * 6),
        **options,
    )
    assert all((a.estimate.proportion == b.estimate.proportion).all() for a, b in zip(first, again))
    with pytest.raises(TypeError):  # another row, so other rewards: nothing of what is stored may be used
        measure(
            traces,
            broken,
            judge,
            store=RolloutStore(tmp_path, identity_of(model, sampler), part=100, labels=["y"] * 6),
            **options,
        )


def test_parts_follow_the_work_and_nothing_else(tmp_path):
    """An eighth of the requests, from 64 to 4,096: what a kill costs. The stored parts are not many more than that
    makes, since they end where a trace does, and a store that is opened anew reads all of them.
    """
    assert [part_size(n) for n in (0, 1, 512, 513, 8_000, 32_768, 10**6)] == [64, 64, 64, 65, 1000, 4096, 4096]
    assert [part_size(100, longest) for longest in (1, 32, 64, 100, 128, 5000)] == [64, 64, 32, 20, 16, 16]
    assert part_size(8_000, 5000) == 1000
    for num in (65, 600, 5_000, 40_000):
        assert part_size(num) <= max(64, -(-num // 8))
    _, model, sampler, traces, judge = modular_study(num=12)
    found = []
    for _ in range(2):
        store = RolloutStore(tmp_path, identity_of(model, sampler))
        found.append(measure(traces, sampler, judge, budget=Fixed(32), max_new_tokens=4, store=store))
    total = sum(m.rollouts for m in found[0])
    assert 4 < -(-total // part_size(total)) <= len(list((tmp_path / "parts").iterdir())) <= 12
    assert all((a.estimate.proportion == b.estimate.proportion).all() for a, b in zip(*found))


@pytest.mark.parametrize("size", (1, 7, 10, 64))
def test_parts_end_where_a_trace_does(size):
    """Hand-derived for a size of 10: 4 + 5 fit, 3 + 6 fit, 25 are cut into 8 + 8 + 9, and 1 is left."""
    of_trace = [4, 5, 3, 6, 25, 1]
    requests = [Request(k, 0, 8, i) for k, num in enumerate(of_trace) for i in range(num)]
    where = cut(requests, size)
    assert [i for own in where for i in range(own.start, own.stop)] == list(range(len(requests)))
    assert all(0 < own.stop - own.start <= size for own in where)
    for k, num in enumerate(of_trace):
        holding = [own for own in where if any(r.trace == k for r in requests[own])]
        assert len(holding) == (1 if num <= size else -(-num // size))
        assert num <= size or all(r.trace == k for own in holding for r in requests[own])
    if size == 10:
        assert [own.stop - own.start for own in where] == [9, 9, 8, 8, 9, 1]
    assert cut([], size) == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_pivotality as t

def killed_in_the_middle(*_, **__):
    if len(list(Path({folder!r}, "parts").glob("*.parquet"))) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)

t.resumable({folder!r}, killed_in_the_middle)
"""


def resumable(folder, progress=None):
    """A study in many small parts; every estimate of `replace`."""
    _, model, sampler, traces, judge = modular_study(num=12)
    store = RolloutStore(folder, identity_of(model, sampler))
    found = measure(
        traces,
        sampler,
        judge,
        budget=TwoStage(20, 40),
        max_new_tokens=4,
        store=store,
        progress=progress,
    )
    return [m.estimate.replace.value.tolist() for m in found]


def test_killed_and_resumed_it_ends_with_the_same_numbers(tmp_path):
    """kill -9 in the middle, then the same command: the numbers of a command that was left alone, to the last bit."""
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "cut"))
    cut = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    parts, whole = tmp_path / "cut" / "parts", resumable(tmp_path / "whole")
    done, all_parts = (len(list((tmp_path / name / "parts").glob("*.parquet"))) for name in ("cut", "whole"))
    assert cut.returncode == -signal.SIGKILL and 3 <= done < all_parts, cut.stderr
    (parts / ".torn.tmp").write_bytes(b"half a part")
    assert resumable(tmp_path / "cut") == whole and len(list(parts.glob("*.parquet"))) == all_parts


def test_a_part_is_the_same_whatever_its_pieces_are(tmp_path, monkeypatch):
    """Pieces of 16 rollouts, cut by an exception after three of them and again between a part and the removal of its
    pieces; then the same store with whole parts, as on a faster machine: the same files, byte for byte, and the same
    numbers.
    """
    _, model, sampler, traces, judge = modular_study(num=4)
    per_token = sum(p.numel() for p in model.parameters())

    def measured(folder, each=None):
        store = RolloutStore(tmp_path / folder, identity_of(model, sampler), part=100)
        options = {"budget": Fixed(40), "max_new_tokens": 4, "store": store, "progress": each}
        return [m.estimate.replace.value.tolist() for m in measure(traces, sampler, judge, **options)]

    def files(folder, kind):
        there = (tmp_path / folder / kind).glob("*.parquet")
        return {path.name: path.read_bytes() for path in there}

    whole = measured("whole")
    monkeypatch.setattr(together, "WORK", per_token * 64)
    asked, run = [], sampler.continue_

    def cut(of, requests, progress=None):
        asked.append(len(requests))
        if len(asked) == 4:
            raise Cut
        return run(of, requests, progress)

    monkeypatch.setattr(sampler, "continue_", cut)
    with pytest.raises(Cut):
        measured("cut")
    assert len(files("cut", "pieces")) == 3 and not files("cut", "parts")
    unlink = Path.unlink

    def left(self, missing_ok=False):
        if self.parent.name == "pieces" and self.suffix == ".parquet":
            raise Cut
        unlink(self, missing_ok)

    with monkeypatch.context() as kept, pytest.raises(Cut):
        kept.setattr(Path, "unlink", left)
        measured("cut")
    num = len(asked)
    assert max(asked) <= 64 and len(files("cut", "parts")) == 1 and files("cut", "pieces")
    assert measured("cut") == whole and len(asked) == num and not files("cut", "pieces")
    assert files("cut", "parts") == files("whole", "parts") and len(files("whole", "parts")) > 1
    monkeypatch.setattr(together, "WORK", 1 << 40)
    assert measured("cut") == whole and len(asked) == num


def test_sampled_completions_are_stored(tmp_path, monkeypatch):
    _, model, sampler, traces, judge = modular_study(num=4)
    monkeypatch.setattr(together, "WORK", sum(p.numel() for p in model.parameters()) * 64)
    prompts = [Trace(trace.prompt) for trace in traces]
    requests = [Request(k, 0, 4, 10 * k + n) for k in range(4) for n in range(8)]
    open_store = lambda: RolloutStore(tmp_path, identity_of(model, sampler))  # noqa: E731
    expected = RolloutStore(None, {}).write(prompts, requests, Here(sampler, judge))
    assert open_store().write(prompts, requests, Here(sampler, judge)) == expected
    assert len(list((tmp_path / "traces").glob("*.parquet"))) == 2
    monkeypatch.setattr(sampler, "continue_", None)
    heard = []
    again = open_store().write(prompts, requests, Here(sampler, judge), lambda rows, *_: heard.append(rows))
    assert again == expected and heard == [16, 16]


# What is written out.


def test_tables_figures_and_pairs(tmp_path):
    model, tokenizer, sampler, traces, rows, judge, _, limit = reckon_study()
    store = RolloutStore(tmp_path / "store", identity_of(model, sampler))
    found = measure(traces, sampler, judge, budget=TwoStage(4, 48, select=0.15), max_new_tokens=limit, store=store)
    record.write(tmp_path, found, rows, Policy(model, tokenizer, Reckon()))
    tokens, alternatives, table = (record.read(tmp_path, name) for name in ("tokens", "alternatives", "traces"))
    assert (
        len(tokens) == sum(len(t.completion) for t in traces)
        and json.loads(table[0]["row"])["answer"] == rows[0]["answer"]
    )
    assert sum(row["rollouts"] for row in alternatives) == sum(m.rollouts for m in found)
    for name in ("replace", "before_after", "spread", "max_alternative", "substitute"):
        assert any(row[name] is not None and row[f"{name}_standard_error"] is not None for row in tokens), name
    named = {
        name: {(row["trace"], row["position"]) for row in tokens if row[name] is not None}
        for name in ("replace", "substitute")
    }
    assert named["replace"] == named["substitute"]
    figures = record.figures(found, [row["prompt"] for row in rows])
    assert (
        figures["law_difference"]["low"] <= 0 <= figures["law_difference"]["high"] and figures["pivotal"]["value"] > 0
    )
    wanted = export.candidates(tokens, alternatives, 0.1, "before_after")
    assert wanted == export.candidates(tokens, alternatives, 0.1)
    assert len(wanted) <= len(export.candidates(tokens, alternatives, 0.1, "replace"))
    pairs = export.verify_pairs(
        wanted[:12], traces, Here(sampler, judge), store, num=32, max_new_tokens=limit, margin=0.1
    )
    assert pairs
    for pair in pairs:
        assert pair.difference[1] > 0.1 and pair.chosen_rate[0] > pair.rejected_rate[0]
        assert pair.written_id in (pair.chosen_id, pair.rejected_id)
    for form in export.FORMATS:
        export.write_pairs(tmp_path / "pairs.jsonl", pairs, tokenizer, form)
        first = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
        assert (first["prompt_ids"], first["chosen_ids"], first["rejected_ids"]) == (
            pairs[0].prefix_ids,
            [pairs[0].chosen_id],
            [pairs[0].rejected_id],
        )
        ids = tokenizer(first["prompt_text"] + first["chosen_text"])["input_ids"]
        assert ids == first["prompt_ids"] + first["chosen_ids"] and first["chosen_text"] != first["rejected_text"]
        assert not {"prompt", "chosen", "rejected"} & first.keys()
    with pytest.raises(ValueError, match="dpo, jsonl"):
        export.write_pairs(tmp_path / "pairs.jsonl", pairs, tokenizer, "csv")


def test_pairs_of_equal_sides_are_dropped():
    """Twelve candidates at tokens that do not matter: the margin keeps nearly all of them out."""
    _, _, sampler, traces, _ = modular_study()
    wanted = [(k, 0, (traces[k].completion[0] + 1) % 9) for k in range(len(traces))]
    pairs = export.verify_pairs(
        wanted,
        traces,
        Here(sampler, lambda k, ids, truncated: sum(ids) % 2 == 0),
        RolloutStore(None, {}),
        num=64,
        max_new_tokens=4,
        margin=0.3,
    )
    assert all(pair.difference[0] > 0.3 for pair in pairs)


def test_wilson_is_scipys():
    from scipy.stats import binomtest

    for k, n in ((0, 5), (3, 8), (64, 64)):
        interval = binomtest(k, n).proportion_ci(method="wilson")
        assert [float(x) for x in wilson(np.array(k / n), np.array(n))] == pytest.approx(
            [interval.low, interval.high], abs=1e-9
        )


def test_the_command_line(tmp_path, capsys):
    """plan, run, run again from the store, export; a wrong setting is an error that can be mended, and leaves nothing
    behind.
    """
    from tokencredit.cli import main

    few = ["--prompts", "2", "--samples", "1", "--max-new-tokens", "30"]
    out = str(tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["pivotality", "run", "--out", out, *few, "--temperature", "0"])
    assert "argument --temperature: must be a temperature above 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert (
        main(
            [
                "pivotality",
                "plan",
                *few,
                "--rollouts",
                "4",
                "--tokens-per-second",
                "1000",
                "--out",
                str(tmp_path / "plan.json"),
            ]
        )
        == 0
    )
    assert main(["pivotality", "run", "--out", out, *few, "--rollouts", "4"]) == 0
    planned, result = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "run/result.json"))
    assert (
        planned["figures"]["rollouts"] == result["figures"]["rollouts"]["value"]
        and "pivotality run" in result["command"]
    )
    for figure in result["figures"].values():
        assert figure.keys() >= {"value", "low", "high", "unit"} and (figure["seed"], figure["command"]) == (
            0,
            result["command"],
        )
    by_replace = "fewer of the pivotal tokens of exact worlds than a fixed budget"
    assert by_replace not in capsys.readouterr().err
    stages = ["--budget", "two-stage", "--tokens-per-second", "1000"]
    assert main(["pivotality", "plan", *few, *stages]) == 0 and by_replace in capsys.readouterr().err
    assert main(["pivotality", "plan", *few, *stages, "--estimand", "before_after"]) == 0
    assert by_replace not in capsys.readouterr().err
    assert planned["figures"]["seconds"] == pytest.approx(planned["figures"]["generated"] / 1000, abs=0.01)
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "store" / "parts").iterdir()}
    capsys.readouterr()
    assert main(["pivotality", "run", "--out", out, *few, "--rollouts", "4"]) == 0
    rollouts, generated = (int(result["figures"][name]["value"]) for name in ("rollouts", "generated"))
    assert f"{rollouts:,} rollouts of {generated:,} tokens, 0 of them generated in" in capsys.readouterr().out
    assert parts == {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "store" / "parts").iterdir()}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["figures"] == result["figures"]
    assert main(["pivotality", "run", "--out", out, *few, "--top-k", "3"]) == 1
    assert "sampler.top_k: 0 in the store, 3 asked for" in capsys.readouterr().err.replace("\n", " ")
    capsys.readouterr()
    assert main(["pivotality", "export", out, "--fresh", "8"]) == 0 and (tmp_path / "run" / "pairs.jsonl").exists()
    assert "held-out" not in capsys.readouterr().err
    assert main(["pivotality", "run", "--out", out + "-test", *few, "--rollouts", "4", "--split", "test"]) == 0
    assert main(["pivotality", "export", out + "-test", "--fresh", "8"]) == 0
    assert "are of --split test" in capsys.readouterr().err.replace("\n", " ")
