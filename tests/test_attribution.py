"""Who causes a step's change of entropy and reward: exact worlds, brute force with a gradient per token, tables worked
out by hand.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cuts import Cut
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.cli import main
from tokencredit.distribute import together
from tokencredit.dynamics import attribution, passes, vectors
from tokencredit.dynamics.ablation import highest, token_sets, without, without_linear
from tokencredit.dynamics.attribution import (
    GOALS,
    PARTS,
    EntropyGoal,
    RewardGoal,
    answered,
    attribute,
    reward_weights,
)
from tokencredit.dynamics.batch import Batch, draw
from tokencredit.dynamics.checkpoint import Checkpoint, open_checkpoint
from tokencredit.dynamics.counterfactual import Coefficients, acting_parts, consequences, named_method
from tokencredit.dynamics.diagnostics import (
    agreement_in_sign,
    by_covariance,
    diagnostics,
    own_context,
    rank_correlations,
)
from tokencredit.dynamics.entropy import terms_of
from tokencredit.dynamics.exchange import ANY, STEP_KINDS, THIS, Change, fieller, rate, verdict
from tokencredit.dynamics.optimizer import Moments, OptimizerState, Rule
from tokencredit.dynamics.pivotal import batch_of_run, carried, from_trees
from tokencredit.dynamics.to_go import baseline_of
from tokencredit.dynamics.update import step_along, update_vector
from tokencredit.dynamics.vectors import dot, moved, scaled, total
from tokencredit.lm.policy import Policy
from tokencredit.methods import METHODS
from tokencredit.objective import SequenceMean, TokenMean
from tokencredit.rollouts import Rollouts
from tokencredit.stages import Stages
from tokencredit.studies.attribution import study as parts
from tokencredit.studies.attribution.question import STUDY, AttributeConfig
from tokencredit.studies.drawn import drawn
from tokencredit.tasks.exact import ExactWorld, PromptedPolicy, TabularPolicy, encode, modular_world, tiny_model
from tokencredit.tasks.given import Given
from tokencredit.train_config import TrainConfig

PROMPT = encode("1 + 1 * 2 =")


def checkpoint_of(model, optimizer, bound=None):
    return Checkpoint(None, 7, Policy(model, None, Given()), TrainConfig(), optimizer, bound)


def with_moments(model, rule):
    """An optimizer in the middle of its training."""
    generator = torch.Generator().manual_seed(5)
    moments = {
        name: Moments(
            7,
            1e-3 * torch.randn(p.shape, generator=generator, dtype=torch.float64),
            1e-5 * torch.rand(p.shape, generator=generator, dtype=torch.float64),
        )
        for name, p in model.named_parameters()
    }
    return OptimizerState(dict.fromkeys(moments, rule), moments)


@pytest.fixture(scope="module")
def tiny():
    """A Qwen2 of random weights in float64 and a world of 91 prefixes in which it can be enumerated; a reward that is
    not rare.
    """
    model, world = tiny_model(0, hidden=16, layers=1).double(), modular_world("1 + 1 * 2 =", horizon=3)
    return model, ExactWorld(world.vocab, 3, lambda completions: (completions.sum(1) % 3 == 0).double(), world.eos)


def rollouts_of(tiny, num, group, seed):
    """`num` rollouts of the one prompt, in groups as if each had a prompt of its own, with exact scores."""
    model, world = tiny
    with torch.no_grad():
        found = world.enumerate(PromptedPolicy(model, PROMPT))
        sequences, mask, reward = found.draw(num, torch.Generator().manual_seed(seed))
        scores = found.scores(sequences, mask)
    names = {name: scores[name] for name in ("logprob", "entropy")}
    rollouts = Rollouts(reward=reward, group=torch.arange(num) // group, mask=mask, scores=names)
    completions = [tuple(row[:length].tolist()) for row, length in zip(sequences, mask.sum(1).tolist())]
    return Batch([{}] * num, [PROMPT] * num, completions, [False] * num, [""] * num, rollouts)


def goals_of(checkpoint, batch, other):
    return {"entropy": EntropyGoal(batch, batch.passes(checkpoint)), "reward": RewardGoal.of(checkpoint, other)}


@pytest.fixture(scope="module")
def case(tiny):
    """A clipped AdamW step with momentum and decay, and goals on other rollouts."""
    model = tiny[0]
    checkpoint = checkpoint_of(model, with_moments(model, Rule("adamw", lr=1e-3, weight_decay=0.1)), 0.05)
    batch = rollouts_of(tiny, 24, 4, 1)
    goals = goals_of(checkpoint, rollouts_of(tiny, 64, 4, 2), rollouts_of(tiny, 64, 4, 3))
    update = update_vector(checkpoint, batch, METHODS["grpo"])
    return SimpleNamespace(
        checkpoint=checkpoint, batch=batch, goals=goals, update=update, attribution=attribute(update, goals)
    )


def token_gradients(model, batch):
    """{(row, token): {name: ∇log π}}, one backward pass each, through the model's own logits."""
    names = dict(model.named_parameters())
    found = {}
    for i, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions)):
        log_p = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        for t, token in enumerate(completion):
            grads = torch.autograd.grad(log_p[len(prompt) + t - 1, token], list(names.values()), retain_graph=True)
            found[i, t] = dict(zip(names, grads))
    return found


def test_tokens_momentum_and_decay_are_the_whole(case):
    """Against one gradient per token, by hand: φ = −s κ ⟨a ⊙ ∇F, ∇log π⟩; and the three parts are ⟨∇F, Δθ⟩."""
    update, shares = case.update, case.attribution.shares
    assert update.clip < 1 and all(case.attribution.estimate("entropy", part).value for part in PARTS)
    gradients = token_gradients(case.checkpoint.model, update.batch)
    for name, goal in case.goals.items():
        along = scaled(goal.gradient, update.gain)
        for (i, t), gradient in gradients.items():
            expected = -update.clip * float(update.coefficient[i, t]) * dot(along, gradient)
            assert float(shares[name][i, t]) == pytest.approx(expected, rel=1e-4, abs=1e-12)
        whole = dot(goal.gradient, update.vector)
        rest = dot(goal.gradient, update.momentum) + dot(goal.gradient, update.decay)
        assert float(shares[name].sum()) + rest == pytest.approx(whole, rel=1e-6)
        assert case.attribution.estimate(name).value == pytest.approx(whole, rel=1e-5)
        assert case.attribution.estimate(name, "tokens").value == pytest.approx(float(shares[name].sum()), rel=1e-5)


def test_a_rollout_taken_out_of_the_step(tiny):
    """In the exact world: the parameters are moved by the step with and without one rollout's term, and the true
    entropy and expected reward differ by the rollout's contribution along their true gradients; a small step, so that
    the rest is of second order."""
    model, world = tiny
    checkpoint = checkpoint_of(model, with_moments(model, Rule("adamw", lr=3e-5)))
    update = update_vector(checkpoint, rollouts_of(tiny, 12, 4, 1), METHODS["grpo"])
    parameters = dict(model.named_parameters())
    found = world.enumerate(PromptedPolicy(model, PROMPT))
    truth = {
        "entropy": found.entropy_gradient(parameters.values()),
        "reward": found.policy_gradient(parameters.values()),
    }

    def at(vector):
        with moved(parameters, vector), torch.no_grad():
            there = world.enumerate(PromptedPolicy(model, PROMPT))
            return {"entropy": float(there.entropy), "reward": float(there.success)}

    whole = at(update.vector)
    for row in update.coefficient.any(1).nonzero()[:3, 0].tolist():
        part = update.of_rollout(row)
        out = at(total(update.vector, scaled(part, -1)))
        for name, gradient in truth.items():
            share = float(update.shares(dict(zip(parameters, gradient)))[row].sum())
            assert whole[name] - out[name] == pytest.approx(share, rel=0.01)


def test_the_goals_estimate_the_true_changes(tiny):
    """⟨∇H, u⟩ and ⟨∇J, u⟩ from 2,000 rollouts, within 4 of the standard errors that they report."""
    model, world = tiny
    checkpoint, parameters = checkpoint_of(model, None), dict(model.named_parameters())
    found = world.enumerate(PromptedPolicy(model, PROMPT))
    generator = torch.Generator().manual_seed(0)
    u = {name: 1e-2 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in parameters.items()}
    truth = {
        "entropy": found.entropy_gradient(parameters.values()),
        "reward": found.policy_gradient(parameters.values()),
    }
    goals = goals_of(checkpoint, rollouts_of(tiny, 2000, 4, 11), rollouts_of(tiny, 2000, 4, 12))
    for name, goal in goals.items():
        values, expected = goal.changes([u])[0], dot(dict(zip(parameters, truth[name])), u)
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - expected) < 4 * error and error < abs(expected)
        assert dot(goal.gradient, u) == pytest.approx(values.mean(), rel=1e-6)


def test_changes_of_a_large_model_are_the_same_from_reverse_passes(case, monkeypatch):
    """One pass for a prompt and all directions, in place of one for a direction and all prompts."""
    directions = [case.update.momentum, case.update.decay, case.update.fresh]
    expected = attribution.changes(directions, case.goals)
    monkeypatch.setattr(vectors, "FINE", 0)
    monkeypatch.setattr(passes.Passes, "at_once", 2)
    monkeypatch.setattr(passes.Passes, "forward", None)
    for mine, other in zip(attribution.changes(directions, case.goals), expected):
        for name in GOALS:
            np.testing.assert_allclose(
                mine[name], other[name], rtol=1e-4, atol=1e-12 + 1e-6 * np.abs(other[name]).max()
            )


def test_a_large_vector_that_is_only_multiplied_is_held_in_half():
    generator = torch.Generator().manual_seed(0)
    u, g = ({name: torch.randn(n, generator=generator) for name, n in (("a", 90_000), ("b", 10_000))} for _ in range(2))
    held = vectors.condensed(u)
    assert {x.dtype for x in held.values()} == {torch.bfloat16}
    assert abs(dot(g, held) - dot(g, u)) < 4 * 2**-9 * (dot(u, u) * dot(g, g) / 100_000) ** 0.5


def test_the_reward_gradient_is_unbiased_by_enumeration():
    """All pairs of completions as groups of two, each with its probability: the estimator's expectation is ∇J
    itself.
    """
    world = ExactWorld(3, 2, lambda completions: (completions.sum(1) == 2).double())
    policy = TabularPolicy(world, seed=3)
    found = world.enumerate(policy)
    _, _, probability, reward = found.completions
    num = len(reward)
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(num), torch.arange(num), indexing="ij"))
    rows = torch.stack([first, second], 1).flatten()
    mask = torch.ones(len(rows), 2, dtype=torch.bool)
    rollouts = Rollouts(reward=reward[rows], group=torch.arange(num**2).repeat_interleave(2), mask=mask)
    weight = reward_weights(SimpleNamespace(rollouts=rollouts)).logprob[:, 0]
    chance = (probability[first] * probability[second]).detach().repeat_interleave(2) * num**2
    estimate = torch.autograd.grad(
        (weight * chance * probability.log()[rows]).sum(), list(policy.parameters()), retain_graph=True
    )
    for one, other in zip(estimate, found.policy_gradient(policy.parameters())):
        assert torch.allclose(one, other, atol=1e-14)


def test_leave_one_out_by_hand():
    """Rewards 1 0 0 | 1 1: the others' means are 0, ½, ½ | 1, 1, and N = 5."""
    mask = torch.ones(5, 1, dtype=torch.bool)
    rollouts = Rollouts(reward=torch.tensor([1.0, 0, 0, 1, 1]), group=torch.tensor([0, 0, 0, 1, 1]), mask=mask)
    assert reward_weights(SimpleNamespace(rollouts=rollouts)).logprob[:, 0].tolist() == pytest.approx(
        [0.2, -0.1, -0.1, 0, 0]
    )
    alone = replace(rollouts, group=torch.arange(5))
    with pytest.raises(ValueError, match="two rollouts"):
        reward_weights(SimpleNamespace(rollouts=alone))


def test_prompts_spread_as_the_entropy_estimate_does(case):
    """The pseudo-values are D + ∂D/∂w_q: the derivative of the whole estimate, its mean entropy and length included, by
    the weight of a prompt, here by finite differences."""
    goal, u = case.goals["entropy"], case.update.vector
    rollouts, d = goal.batch.rollouts, goal.passes.forward(u)
    entropy, group = rollouts.score("entropy"), rollouts.group_index
    baseline = baseline_of(rollouts, "position")

    def estimate(prompt, weight):
        terms = terms_of(
            entropy,
            rollouts.mask,
            baseline,
            torch.where(group == prompt, torch.tensor(weight, dtype=torch.float64), 1.0),
        )
        return sum(float((t.logprob * d[0] + t.entropy * d[1]).sum()) for t in terms.values())

    values = goal.changes([u])[0]
    for prompt in range(4):
        slope = (estimate(prompt, 1 + 1e-4) - estimate(prompt, 1 - 1e-4)) / 2e-4
        assert values[prompt] - values.mean() == pytest.approx(goal.num_prompts * slope, rel=1e-5, abs=1e-12)


class TwoTokens(nn.Module):
    """One distribution over two tokens, whatever was said: softmax of two logits."""

    def __init__(self, p):
        super().__init__()
        self.config = SimpleNamespace()
        self.table = nn.Parameter(torch.tensor([math.log(p), math.log(1 - p)], dtype=torch.float64))

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.table.expand(*input_ids.shape, 2))


@pytest.mark.parametrize(
    ("token", "credit", "lowers"), [(0, 1.0, True), (0, -1.0, False), (1, 1.0, False), (1, -1.0, True)]
)
def test_two_tokens_by_hand(token, credit, lowers):
    """p = (0.8, 0.2). A step of size η with credit c on token a moves the logits by η c (e_a − p), and ∇_z H = −p (log
    p + H): so H moves by −η c [p_a (log p_a + H) − Σ p² (log p + H)]. Pushing up the likely token, or pushing down the
    unlikely one, lowers entropy."""
    p, eta = torch.tensor([0.8, 0.2], dtype=torch.float64), 1e-4
    model = TwoTokens(0.8)
    entropy = float(-(p * p.log()).sum())
    slope = p * (p.log() + entropy)
    expected = -eta * credit * float(slope[token] - (p * slope).sum())
    assert (expected < 0) == lowers
    ones = torch.ones(1, 1, dtype=torch.float64)
    rollouts = Rollouts(
        reward=torch.tensor([1.0]),
        group=torch.tensor([0]),
        mask=ones.bool(),
        scores={"logprob": ones * p[token].log(), "entropy": ones * entropy},
    )
    batch = Batch([{}], [[0]], [(token,)], [False], [""], rollouts)
    checkpoint = checkpoint_of(model, OptimizerState.fresh(["table"], Rule("sgd", lr=eta)))
    update = step_along(checkpoint, batch, -credit * ones, credit * ones)
    goal = EntropyGoal(batch, batch.passes(checkpoint))
    found = attribute(update, {"entropy": goal}).shares["entropy"]
    assert float(found) == pytest.approx(expected, rel=1e-9)
    assert eta * float(own_context(update)) == pytest.approx(expected, rel=1e-9)
    with moved({"table": model.table}, update.vector):
        q = model.table.detach().softmax(0)
        assert float(-(q * q.log()).sum()) - entropy == pytest.approx(expected, rel=1e-3)


def test_own_context_is_the_gradient_through_the_logits(case):
    """κ ⟨∇_z log p(a), −∇_z H⟩ by autograd, token by token."""
    update, model = case.update, case.checkpoint.model
    found = own_context(update)
    for i in range(3):
        prompt, completion = update.batch.prompts[i], update.batch.completions[i]
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].detach().requires_grad_(True)
        log_p = logits.log_softmax(-1)
        for t, token in enumerate(completion):
            row = log_p[len(prompt) + t - 1]
            (up,), (down,) = (
                torch.autograd.grad(x, logits, retain_graph=True) for x in (row[token], -(row.exp() * row).sum())
            )
            expected = -update.clip * float(update.coefficient[i, t]) * float((up * down).sum())
            assert float(found[i, t]) == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_without_tokens_linear_and_exact(case, tiny):
    """With SGD and no clipping the gain does not depend on the batch, so both ways agree; with AdamW and clipping they
    need not, and the exact one is the step made anew."""
    sgd = checkpoint_of(tiny[0], OptimizerState.fresh(list(dict(tiny[0].named_parameters())), Rule("sgd", lr=0.1)))
    attribution = attribute(update_vector(sgd, case.batch, METHODS["grpo"]), case.goals)
    tokens = case.batch.rollouts.mask & (torch.arange(3) == 1)
    (found,), linear = (
        answered([without(sgd, attribution.update, tokens)], case.goals),
        without_linear(attribution, tokens),
    )
    for name in GOALS:
        assert found[f"exact/{name}"].mean() == pytest.approx(linear[name], rel=1e-5)
        assert linear[name] == pytest.approx(-float(attribution.shares[name][tokens].sum()))
    sets = (tokens, ~tokens & False, tokens)
    twice = answered((without(case.checkpoint, case.update, some) for some in sets), case.goals)
    clipped, linear = twice[2], without_linear(case.attribution, tokens)
    assert all(np.array_equal(twice[0][name], clipped[name]) for name in clipped)
    assert not any(values.any() for values in twice[1].values())
    other = step_along(case.checkpoint, case.batch, case.update.coefficient.masked_fill(tokens, 0), case.update.credit)
    for name, goal in case.goals.items():
        expected = dot(goal.gradient, other.vector) - dot(goal.gradient, case.update.vector)
        assert clipped[f"exact/{name}"].mean() == pytest.approx(expected, rel=1e-5)
    assert clipped["exact/entropy"].mean() != pytest.approx(linear["entropy"], rel=1e-3)


def test_token_sets(case):
    sets = token_sets(case.update)
    mask = case.batch.rollouts.mask
    assert all(not (tokens & ~mask).any() for tokens in sets.values())
    assert int(sets["top 20 % by entropy (forking tokens)"].sum()) + int(sets["the other 80 %"].sum()) == int(
        mask.sum()
    )
    x = torch.tensor([[3.0, 1.0, 9.0], [2.0, 5.0, 9.0]])
    inside = torch.tensor([[True, True, False], [True, True, False]])
    assert highest(x, inside, 0.5).tolist() == [[True, False, False], [False, True, False]]


def test_methods_by_name_field_and_repr():
    assert named_method("gtpo") is METHODS["gtpo"]
    changed = named_method("clip_cov(fraction=0.02, band=(0.5, 5.0))")
    assert (
        changed.surrogate == replace(METHODS["clip_cov"].surrogate, fraction=0.02, band=(0.5, 5.0))
        and "fraction" in changed.name
    )
    assert named_method(repr(METHODS["dapo"])) == METHODS["dapo"]
    with pytest.raises(ValueError, match="given by name"):
        named_method("clip_cov(0.02)")
    with pytest.raises(ValueError, match="is not a method"):
        named_method("clip_cov(fraction=open('x'))")
    with pytest.raises(KeyError, match="Did you mean"):
        named_method("gtpoo")


def test_what_acts_is_seen_in_the_coefficients(case):
    """KL-Cov's penalty has no gradient at ratio 1; what it shares with GRPO otherwise, the mean over tokens apart, is
    GRPO's.
    """
    batch, grpo = case.batch, Coefficients.of(METHODS["grpo"], case.batch)
    kl_cov = Coefficients.of(METHODS["kl_cov"], batch)
    assert acting_parts(kl_cov, METHODS["grpo"], batch) == {"surrogate": False, "aggregate": True}
    assert Coefficients.of(replace(METHODS["kl_cov"], aggregate=SequenceMean()), batch).same(grpo)
    assert kl_cov.factor(grpo) is None and Coefficients.of(replace(METHODS["grpo"], aggregate=TokenMean()), batch).same(
        kl_cov
    )
    dapo = Coefficients.of(METHODS["dapo"].within(100), batch)
    assert int(dapo.keep.sum()) == len(dapo.batch) < len(batch) and not dapo.wide[~dapo.keep].any()
    ratio = float(batch.rollouts.length.sum() / dapo.batch.rollouts.length.sum())
    assert dapo.factor(kl_cov) == pytest.approx(ratio, rel=1e-5)
    acting = acting_parts(
        Coefficients.of(METHODS["clip_cov"].replace(fraction=0.5, band=(-9, 9)), batch), METHODS["grpo"], batch
    )
    assert acting["surrogate"]
    none = replace(batch, rollouts=replace(batch.rollouts, reward=torch.zeros(len(batch))))
    with pytest.raises(ValueError, match="Draw more prompts"):
        Coefficients.of(METHODS["grpo"], none)


@pytest.mark.parametrize("name", ("grpo", "dapo"))
def test_consequences_agree_with_the_shares(case, name):
    """The change of the fresh part by evaluation prompt and by prompt of the step are two splits of one number; with
    rest, ⟨∇F, Δθ⟩.
    """
    method = METHODS[name].within(100)
    own = Coefficients.of(method, case.batch)
    (found,) = answered([consequences(case.checkpoint, own, case.batch, case.goals)], case.goals)
    update = update_vector(case.checkpoint, case.batch, method)
    for goal in GOALS:
        assert (
            found[f"shares/{goal}"].astype(bool).tolist() == case.batch.rollouts.informative.view(-1, 4)[:, 0].tolist()
        )
        assert found[f"shares/{goal}"].sum() == pytest.approx(found[f"fresh/{goal}"].mean(), rel=1e-5)
        whole = found[f"fresh/{goal}"].mean() + found[f"rest/{goal}"].mean()
        assert whole == pytest.approx(dot(case.goals[goal].gradient, update.vector), rel=1e-5)


def changes(entropy, reward, noise=0.01, num=50, seed=0):
    rng = np.random.default_rng(seed)
    goals = {"entropy": entropy + noise * rng.standard_normal(num), "reward": reward + noise * rng.standard_normal(num)}
    goals = {name: x - x.mean() + value for (name, x), value in zip(goals.items(), (entropy, reward))}
    return Change(goals, np.outer([entropy, reward], np.full(20, 1 / 20)) + 1e-4 * rng.standard_normal((2, 20)))


def test_rates_and_verdicts():
    """2 nats kept for 1 of reward given up is 2 per unit; without a resolved difference in reward there is no
    number.
    """
    base = changes(-4.0, 3.0)
    keeps = changes(-2.0, 2.0, seed=1)
    assert rate(keeps, base).value == pytest.approx(2.0) and verdict(keeps, base) == "entropy kept, reward given up"
    assert rate(keeps, base).low < 2 < rate(keeps, base).high
    assert (
        verdict(changes(-5.0, 4.0, seed=1), base) == "reward gained, entropy spent"
        and rate(changes(-5.0, 4.0, seed=1), base).value > 0
    )
    both = changes(-3.0, 4.0, seed=1)
    assert verdict(both, base) == "more entropy and more reward" and rate(both, base).value < 0
    even = changes(-3.0, 3.001, noise=0.05, seed=1)
    assert rate(even, base) is None and verdict(even, base) == "more entropy, reward not told apart"
    assert verdict(changes(-4.01, 3.01, noise=1e-3, seed=1), base) == "within 2 % of the baseline"
    assert changes(-4.0, 0.0).slope() is None and base.slope().value == pytest.approx(-4 / 3)
    wide, narrow = base.estimate("reward", ANY), base.estimate("reward", THIS)
    assert wide.high - wide.low > narrow.high - narrow.low and wide.value == narrow.value


def test_fieller():
    """Its ends are where top − ρ bottom is at its bound; an uncertain denominator has none; it covers, by simulation at
    a fixed size.
    """
    cov = np.array([[0.04, 0.01], [0.01, 0.09]])
    low, high = fieller(2.0, 4.0, cov)
    for rho in (low, high):
        assert (2 - rho * 4) ** 2 == pytest.approx(float(np.array([1, -rho]) @ cov @ np.array([1, -rho])))
    assert low < 0.5 < high and fieller(2.0, 0.25, cov) is None
    rng, num = np.random.default_rng(0), 4000
    draws = rng.multivariate_normal([1.0, 2.0], 0.25 * cov / 0.09, size=num)
    ends = [fieller(*draw, 1.959964**2 * 0.25 * cov / 0.09) for draw in draws]
    covered = np.mean([end is None or end[0] <= 0.5 <= end[1] for end in ends])
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / num) ** 0.5 + 0.01


def test_equal_length_scales_the_fresh_part_alone():
    found = {"length": np.array(4.0)} | {
        f"{part}/{goal}": np.arange(3.0) for part in ("fresh", "rest", "shares") for goal in GOALS
    }
    whole, fresh, equal = (Change.of(found, step, 2.0) for step in STEP_KINDS)
    assert whole.value[0] == 2.0 and fresh.value[0] == 1.0 and equal.value[0] == 0.5
    assert equal.update[0].tolist() == [0, 0.5, 1] and whole.update[0].tolist() == [0, 1, 2]


def test_diagnostics_and_their_correlations(case):
    found = diagnostics(case.update)
    mask = case.batch.rollouts.mask
    assert all(not x[~mask].any() for x in found.values())
    rate_of = case.batch.rollouts.reward.view(-1, 4).mean(1).repeat_interleave(4)
    assert torch.allclose(found["success rate"][:, 0], rate_of) and found["position"][0].tolist()[:2] == [0, 1]
    rng = np.random.default_rng(0)
    x, cluster = rng.standard_normal(200), np.arange(200) // 10
    columns = {"same": x, "opposite": -x, "noise": rng.standard_normal(200), "constant": np.ones(200)}
    table = rank_correlations(columns, {"entropy": x**3, "size of entropy": np.abs(x)}, Bootstrap(cluster, 200))
    values = {target: {name: each["estimate"].value for name, each in some.items()} for target, some in table.items()}
    assert values["entropy"]["same"] == pytest.approx(1) and values["entropy"]["opposite"] == pytest.approx(-1)
    assert values["size of entropy"]["opposite"] == pytest.approx(1) and math.isnan(
        table["entropy"]["constant"]["holm"]
    )
    assert table["entropy"]["same"]["holm"] < 0.05 < table["entropy"]["noise"]["holm"]


def test_groups_of_covariance_add_up():
    rng = np.random.default_rng(1)
    covariances, share, boot = (
        rng.standard_normal(1000),
        rng.standard_normal(1000),
        Bootstrap(np.arange(1000) // 20, 200),
    )
    groups = by_covariance(covariances, share, boot)
    assert groups["above 0"]["sum"].value + groups["below 0"]["sum"].value == pytest.approx(share.sum())
    parts = ("top 20 %", "middle 60 %", "lowest 20 %")
    assert sum(groups[name]["tokens"] for name in parts) == 1000 and groups["top 2 %"]["tokens"] == 20
    assert groups["top 20 %"]["sum"].value == pytest.approx(share[np.argsort(covariances)[800:]].sum())
    signs = agreement_in_sign(np.array([1.0, -1, 1, -1, 0]), np.array([1.0, -1, -3, 1, 9]), Bootstrap(np.arange(5), 50))
    assert signs["tokens"].value == 0.5 and signs["weighted"].value == pytest.approx(2 / 6)


def test_what_the_top_tokens_carry():
    """Planted: only every tenth token does anything. Who knows which carries it all; a random choice of a fifth carries
    a fifth.
    """
    rng, num = np.random.default_rng(2), 2000
    share = np.where(np.arange(num) % 10 == 0, 1.0, 0.0) * rng.choice([-1, 1], num)
    columns = {"knows": np.abs(share) + 1e-3 * rng.random(num), "entropy": rng.random(num)}
    found = carried(columns, share, Bootstrap(np.arange(num) // 40, 200))
    assert found["captured"]["knows"].value == pytest.approx(1) and found["captured"][
        "(itself)"
    ].value == pytest.approx(1)
    assert abs(found["captured"]["entropy"].value - 0.2) < 4 * (0.16 / (num / 10)) ** 0.5
    assert found["compared"]["knows"]["difference"].low > 0.5


@pytest.fixture(scope="module")
def reckon():
    return open_checkpoint("reckon").fresh("adamw")


@pytest.fixture(scope="module")
def pivots(tmp_path_factory):
    """A stored pivotality run on the shipped model: two prompts, a completion each."""
    out = tmp_path_factory.mktemp("pivots") / "run"
    assert main(["pivotality", "run", "--prompts", "2", "--samples", "1", "--rollouts", "2", "--out", str(out)]) == 0
    return out


def test_trees_are_laid_on_the_rollouts(reckon):
    """Along a completion Q − V adds up to its reward less V₀, which is the same for a prompt's rollouts; other prompts
    are left alone.
    """
    batch = draw(reckon, 4, 4, seed=3)
    found = from_trees(reckon, batch, 1)
    known = found["before_after"].isfinite()
    prompt = int(torch.unique(batch.rollouts.group_index[batch.rollouts.mixed])[0])
    assert torch.equal(known, batch.rollouts.mask & (batch.rollouts.group_index == prompt)[:, None])
    rows = known.any(1)
    start = batch.rollouts.reward[rows] - found["before_after"][rows].nan_to_num().sum(1)
    assert float(start.max() - start.min()) < 0.15 and 0 < float(start.mean()) < 1


def test_stored_pivotality_is_joined_token_by_token(reckon, pivots):
    from tokencredit.pivotality import record

    batch, known = batch_of_run(reckon, pivots, 4, seed=0)
    traces, tokens = record.read(pivots, "traces"), record.read(pivots, "tokens")
    assert len(batch) == 2 + 2 * 3 and sorted(batch.rollouts.group.tolist()) == [0] * 4 + [1] * 4
    for trace in traces:
        assert list(batch.completions[trace["trace"]]) == trace["completion_ids"]
        assert float(batch.rollouts.reward[trace["trace"]]) == trace["reward"]
    for token in tokens:
        value = float(known["before_after"][token["trace"], token["position"]])
        assert value == (token["before_after"] if token["defined"] else 0.0)
    assert int(known["before_after"].isfinite().sum()) == len(tokens)
    dapo = replace(reckon, config=replace(reckon.config, method="dapo"))
    drawn, kept = parts._rollouts(dapo, AttributeConfig(pivotality=str(pivots), group=4), set(), None)
    assert len(drawn) == 8 and len(kept["spread"]) == len(update_vector(dapo, drawn).batch) == int(
        drawn.rollouts.mixed.sum()
    )
    with pytest.raises(ValueError, match="larger groups"):
        batch_of_run(reckon, pivots, 1, seed=0)
    with pytest.raises(ValueError, match="temperature"):
        batch_of_run(replace(reckon, policy=replace(reckon.policy, temperature=0.5)), pivots, 4, seed=0)
    name, p = next(iter(reckon.model.named_parameters()))
    with moved({name: p}, {name: torch.ones_like(p)}), pytest.raises(ValueError, match="another policy"):
        batch_of_run(reckon, pivots, 4, seed=0)


def test_rollouts_are_stored_while_they_are_drawn(reckon, tmp_path, monkeypatch):
    """Cut after the second of four pieces, they go on with the third; they are those of `draw`, scores and all, and are
    not drawn again. Of a model of this size all prompts are one piece.
    """
    asked = (7, 2, 5)
    expected = draw(reckon, *asked, needs=["uniform"])
    drawn(Stages(tmp_path / "one"), "step", reckon, *asked)
    assert {path.name for path in (tmp_path / "one").glob("*.npz")} == {"step.npz", "step_0_7.npz"}
    per_token = sum(p.numel() for p in reckon.model.parameters())
    monkeypatch.setattr(together, "WORK", per_token * reckon.max_new_tokens * 2 * 2)
    starts, told, complete = [], [], Policy.complete

    def cut(self, prompts, num, *, first, **options):
        if first == 4 and not told:
            told.append("cut")
            raise Cut
        starts.append((first, len(prompts)))
        return complete(self, prompts, num, first=first, **options)

    monkeypatch.setattr(Policy, "complete", cut)
    folder = Stages(tmp_path / "four")
    with pytest.raises(Cut):
        drawn(folder, "step", reckon, *asked, needs=["uniform"])
    assert starts == [(0, 2), (2, 2)]
    for _ in range(2):
        found = drawn(folder, "step", reckon, *asked, needs=["uniform"])
        assert starts == [(0, 2), (2, 2), (4, 2), (6, 1)]
        for field in ("rows", "prompts", "completions", "truncated", "reasons"):
            assert getattr(found, field) == getattr(expected, field)
        mine, other = found.rollouts, expected.rollouts
        assert torch.equal(mine.mask, other.mask) and torch.equal(mine.group, other.group)
        assert torch.equal(mine.reward, other.reward) and mine.scores.keys() == other.scores.keys()
        for name, x in other.scores.items():
            torch.testing.assert_close(mine.scores[name], x)


SMALL = AttributeConfig(
    optimizer="adamw",
    prompts=8,
    group=4,
    methods=("kl_cov", "dapo"),
    entropy=(16, 2),
    reward=(24, 4),
    trees=2,
    bootstraps=200,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("attribution") / "run"
    return out, STUDY.run(SMALL, out, command="tokencredit <b>")


def test_the_study_adds_up(study):
    """The tables on disk and the figures are one split: tokens into rollouts, rollouts and momentum into the whole."""
    import pyarrow.parquet as parquet

    from tokencredit.runs import Run

    out, result = study
    figures = result["figures"]
    tokens = Run.open(out).tokens()
    sequences = parquet.read_table(out / "sequences.parquet").to_pylist()
    assert len(tokens) == len(sequences) == SMALL.prompts * SMALL.group
    for goal in GOALS:
        parts = {part: figures[f"change/{goal}/{part}"].value for part in (*PARTS, "total")}
        assert sum(parts[part] for part in PARTS) == pytest.approx(parts["total"])
        by_row = [row[f"change of {goal}"] for row in sequences]
        assert sum(by_row) == pytest.approx(parts["tokens"], rel=1e-3, abs=1e-9)
        assert [sum(row[f"change of {goal}"]) for row in tokens] == pytest.approx(by_row, rel=1e-3, abs=1e-9)
        assert sum(figures[f"outcome/{name}/{goal}/sum"].value for name in result["outcomes"]) == pytest.approx(
            sum(by_row), abs=1e-9
        )
        assert sum(found[goal]["tokens"] for found in result["roles"].values()) == result["about"]["tokens"]
    stored = json.loads((out / "result.json").read_text())["figures"]
    assert all({"value", "low", "high", "unit", "seed", "command"} <= set(figure) for figure in stored.values())
    kl_cov = next(each for each in result["methods"] if each["name"] == "kl_cov")
    assert kl_cov["acting"] == {"surrogate": False, "aggregate": True}
    assert [each["name"] for each in result["methods"]] == ["grpo", "kl_cov", "dapo"] and result["pivotal"][
        "source"
    ] == "prefix trees"


def test_a_killed_study_goes_on_with_the_same_numbers(study):
    out, _ = study
    result = json.loads((out / "result.json").read_text())
    (out / "result.json").unlink()
    (out / "stages" / "method_1.npz").unlink()
    STUDY.run(SMALL, out, command="tokencredit <b>")
    assert json.loads((out / "result.json").read_text())["figures"] == result["figures"]
    with pytest.raises(ValueError, match="different run"):
        STUDY.run(replace(SMALL, prompts=9), out)


@pytest.fixture(scope="module")
def page_path(study, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["report", str(study[0]), "--out", str(page)]) == 0
    return page


def test_the_page(opened, study):
    """Every drawing is there, in a real browser, without an error; the command is text."""
    text = opened.inner_text("body")
    assert "Who makes the next step’s change" in text and "tokencredit <b>" in text
    rollouts = len(study[1]["sequences"]["entropy"])
    opened.select_option("#rollouts select[aria-label=Show]", "all")
    assert opened.locator("circle.point").count() == rollouts > 0
    assert opened.locator("[data-method]").count() == 3
    opened.select_option("section:has(select[aria-label=Intervals]) select[aria-label=Step]", "whole")
    opened.select_option("select[aria-label=Intervals]", "any batch")
    assert opened.locator("[data-method]").count() == 3 and opened.locator("[data-bar]").count() == 2 * len(
        study[1]["roles"]
    )
    assert "change of entropy" in opened.inner_text(".ramp >> xpath=..")


def test_without_a_run_it_says_how_to_make_one(capsys):
    assert main(["dynamics", "attribute"]) == 1
    assert "tokencredit train" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="at least 3 prompts"):
        AttributeConfig(prompts=2)
