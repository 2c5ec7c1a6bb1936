"""The gradient noise scale: against Gaussian gradients of known covariance, and against an enumerated world of rollouts
and rewards.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from tokencredit.dynamics.batch_shape import best_group, best_split
from tokencredit.dynamics.noise_scale import from_pieces, noise_scale
from tokencredit.dynamics.variance_split import (
    independent,
    leave_one_out,
    leave_one_out_products,
    loads,
    prompt_products,
)
from tokencredit.stats import jackknife, jackknife_ratio
from tokencredit.tasks.exact import ExactWorld, TabularPolicy

DIM = 40
BETWEEN, WITHIN = (
    torch.linspace(0.1, 1.0, DIM).double(),
    torch.linspace(2.0, 0.5, DIM).double(),
)  # variances per coordinate


def nested(seed, prompts, size, mean):
    """Gradients [N, DIM] with Gaussian prompts and rollouts around `mean`, and their prompts [N]."""
    draw = torch.Generator().manual_seed(seed)
    effect = torch.randn(prompts, 1, DIM, generator=draw, dtype=torch.float64) * BETWEEN.sqrt()
    noise = torch.randn(prompts, size, DIM, generator=draw, dtype=torch.float64) * WITHIN.sqrt()
    return (mean + effect + noise).flatten(0, 1), torch.arange(prompts).repeat_interleave(size)


def within_four_errors(draws, truth):
    draws = np.asarray(draws, float)
    assert abs(draws.mean() - truth) < 4 * draws.std(ddof=1) / len(draws) ** 0.5


def test_nested_gaussian_gradients_without_bias_and_with_coverage():
    mean, prompts, size, runs = torch.full((DIM,), 0.5).double(), 24, 4, 400
    truth = {"signal": float(mean @ mean), "noise": float(BETWEEN.sum() + WITHIN.sum() / size)}
    truth |= {
        "between": float(BETWEEN.sum()),
        "rollout": float(WITHIN.sum()),
        "scale": truth["noise"] / truth["signal"],
    }
    truth["variance"] = float(BETWEEN.sum() + WITHIN.sum() / 9) / 50
    found = {name: [] for name in truth}
    for seed in range(runs):
        x, group = nested(seed, prompts, size, mean)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        gram, group = (x @ x.T)[order][:, order], group[order]
        scale, split = noise_scale(prompt_products(gram, group)), independent(gram, group)
        assert scale.resolved and split.pair.value == 0
        for name in truth:
            source = scale if hasattr(scale, name) else split
            found[name].append(split.variance(50, 9) if name == "variance" else getattr(source, name))
    for name, estimates in found.items():
        if name != "scale":
            within_four_errors([e.value for e in estimates], truth[name])
        covered = sum(e.low <= truth[name] <= e.high for e in estimates) / runs
        assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / runs), (name, covered)
    assert all(a.low < a.value < a.high for a in found["scale"])


def test_a_gradient_that_is_not_there_is_not_resolved():
    """G = 0: half of the estimates are below 0 and stay there, the ratio has no upper end, and p is uniform."""
    runs, prompts = 400, 24
    p, signals = [], []
    for seed in range(runs):
        x, _ = nested(seed, prompts, 1, torch.zeros(DIM).double())
        found = noise_scale(x @ x.T)
        p.append(found.p_noise)
        signals.append(found.signal.value)
        assert found.signal.value > 0 or (math.isinf(found.scale.value) and math.isinf(found.scale.high))
        assert found.scale.low > 0 and (found.signal.low > 0) == math.isfinite(found.scale.high)
    within_four_errors(signals, 0)
    assert min(signals) < 0 < max(signals)
    for level in (0.05, 0.5):
        share = np.mean(np.asarray(p) < level)
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / runs)


def test_pieces_are_mccandlish_and_single_prompts_the_u_statistic():
    x, _ = nested(0, 12, 1, torch.full((DIM,), 0.3).double())
    gram, total = x @ x.T, float(x.sum(0).square().sum())
    by_hand = sum(float(x[i] @ x[j]) for i, j in itertools.permutations(range(12), 2)) / (12 * 11)
    whole = noise_scale(gram)
    assert whole.signal.value == pytest.approx(by_hand)
    assert whole.noise.value == pytest.approx(float(x.var(0).sum()))
    signal, noise = from_pieces(x.square().sum(1), [1] * 12, total)
    assert (signal, noise) == (pytest.approx(by_hand), pytest.approx(whole.noise.value))
    pieces = x.unflatten(0, (4, 3)).sum(1)
    small, big = float((pieces / 3).square().sum(1).mean()), float(x.mean(0).square().sum())
    signal, noise = from_pieces(pieces.square().sum(1), [3] * 4, total)
    assert signal == pytest.approx((12 * big - 3 * small) / (12 - 3))
    assert noise == pytest.approx((small - big) / (1 / 3 - 1 / 12))


def test_unequal_pieces_are_unbiased():
    mean, sizes, found = torch.full((DIM,), 0.5).double(), [5, 1, 0, 2], []
    for seed in range(400):
        x, _ = nested(seed, 8, 1, mean)
        pieces = torch.stack([part.sum(0) for part in x.split(sizes)])
        found.append(from_pieces(pieces.square().sum(1), sizes, float(x.sum(0).square().sum())))
    signals, noises = zip(*found)
    within_four_errors(signals, float(mean @ mean))
    within_four_errors(noises, float((BETWEEN + WITHIN).sum()))


# --- an enumerated world of six prompts, rewards of 0, 1 and 2 --------------------------------------------------------


def world_of(prompt):
    """Three tokens, two of them to be written; the reward depends on the prompt."""
    return ExactWorld(3, 2, lambda done: (done[:, 0] == prompt % 3).double() + (done[:, 1] == 0).double())


class World:
    """Prompts share one table, so their gradients are in one space. Everything exact: score vectors, rewards,
    probabilities.
    """

    def __init__(self, prompts=6):
        policy = TabularPolicy(world_of(0), seed=3)
        self.tables = []
        for prompt in range(prompts):
            enumeration = world_of(prompt).enumerate(policy)
            _, _, probability, reward = enumeration.completions
            scores = [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(p.log(), list(policy.parameters()), retain_graph=True)]
                )
                for p in probability
            ]
            self.tables.append((probability.detach(), reward, torch.stack(scores)))
        self.gradients = torch.stack([(p * r) @ s for p, r, s in self.tables])  # ∇J of every prompt

    def draw(self, prompts, size, generator):
        """(scores [P, K, D], rewards [P, K], prompts [P])."""
        which = torch.randint(len(self.tables), (prompts,), generator=generator)
        scores, rewards = [], []
        for prompt in which.tolist():
            p, r, s = self.tables[prompt]
            rows = torch.multinomial(p, size, replacement=True, generator=generator)
            scores.append(s[rows])
            rewards.append(r[rows])
        return torch.stack(scores), torch.stack(rewards), which

    def variance(self, size):
        """tr Cov of one prompt's leave-one-out gradient, K rollouts, from its definition over all tuples of
        rollouts.
        """
        second = 0.0
        for p, r, s in self.tables:
            rows = torch.cartesian_prod(*[torch.arange(len(p))] * size)
            weight, reward = p[rows].prod(1), r[rows]
            credit = (size * reward - reward.sum(1, keepdim=True)) / (size - 1)
            gradient = torch.einsum("nk,nkd->nd", credit, s[rows]) / size
            second += float(weight @ gradient.square().sum(1)) / len(self.tables)
        return second - float(self.gradients.mean(0).square().sum())


@pytest.fixture(scope="module")
def world():
    return World()


def batch_of(world, prompts, size, seed):
    scores, rewards, _ = world.draw(prompts, size, torch.Generator().manual_seed(seed))
    s = scores.flatten(0, 1)
    return s @ s.T, rewards.flatten(), torch.arange(prompts).repeat_interleave(size)


def test_the_split_predicts_the_variance_of_every_group_size_from_one(world):
    """Measured at K = 5; the truth at K = 2, 3 and 4 is enumerated over all tuples of rollouts."""
    splits = [leave_one_out(*batch_of(world, 16, 5, seed)) for seed in range(300)]
    for size in (2, 3, 4):
        within_four_errors([split.variance(3, size).value for split in splits], world.variance(size) / 3)
    between = float((world.gradients - world.gradients.mean(0)).square().sum(1).mean())
    within_four_errors([split.between.value for split in splits], between)
    # Leave-one-out rollouts taken for independent ones fit the measured size and miss the others.
    naive = []
    for seed in range(300):
        gram, reward, group = batch_of(world, 16, 5, seed)
        r = reward.unflatten(0, (-1, 5))
        credit = ((5 * r - r.sum(1, keepdim=True)) / 4).flatten()
        found = independent(credit[:, None] * gram * credit, group)
        assert found.variance(1, 5).value == pytest.approx(splits[seed].variance(1, 5).value)
        naive.append(found.variance(1, 2).value)
    assert np.mean(naive) < 0.8 * world.variance(2)


def test_the_variance_of_simulated_batch_gradients_is_the_predicted_one(world):
    split = leave_one_out(*batch_of(world, 1500, 5, 0))
    for prompts, size in ((2, 8), (4, 2)):
        scores, rewards, _ = world.draw(8000 * prompts, size, torch.Generator().manual_seed(1))
        credit = (size * rewards - rewards.sum(1, keepdim=True)) / (size - 1)
        batches = torch.einsum("pk,pkd->pd", credit, scores).div(size).unflatten(0, (-1, prompts)).mean(1)
        squares = (batches - batches.mean(0)).square().sum(1)
        error = float(squares.std()) / len(squares) ** 0.5
        predicted = split.variance(prompts, size)
        predicted_error = (predicted.high - predicted.low) / 2 / 1.96
        assert abs(predicted.value - float(squares.mean())) < 4 * math.hypot(error, predicted_error)


def test_group_centred_credit_shrinks_the_gradient_and_leave_one_out_does_not(world):
    size = 2
    scores, rewards, _ = world.draw(200_000, size, torch.Generator().manual_seed(2))
    centred = rewards - rewards.mean(1, keepdim=True)
    direction = world.gradients.mean(0)
    truth = float(direction @ direction)
    for credit, factor in ((centred, 1 - 1 / size), (centred * size / (size - 1), 1.0)):
        found = torch.einsum("pk,pkd,d->p", credit, scores, direction) / size
        within_four_errors(found, factor * truth)  # group-centred credit: (1 − 1/K) ∇J
        assert factor == 1 or abs(float(found.mean()) - truth) > 10 * float(found.std()) / len(found) ** 0.5


def test_the_split_against_loops_over_pairs(world):
    """E₀, E₁, E₂ from their definitions, and the prompts' gradients from leave-one-out credit as the library gives
    it.
    """
    from tokencredit import METHODS, Rollouts

    size = 5
    scores, rewards, _ = world.draw(4, size, torch.Generator().manual_seed(5))
    s = scores.flatten(0, 1)
    gram, reward, group = s @ s.T, rewards.flatten(), torch.arange(4).repeat_interleave(size)
    found = leave_one_out(gram, reward, group)
    means = np.zeros((4, 3))
    for p in range(4):
        h = 0.5 * (rewards[p, :, None, None] - rewards[p, None, :, None]) * (scores[p, :, None] - scores[p, None])
        products = [[], [], []]
        for a, b in itertools.product(itertools.combinations(range(size), 2), repeat=2):
            products[len({*a} & {*b})].append(float(h[a] @ h[b]))
        means[p] = [np.mean(some) for some in products]
    none, one, two = means.mean(0)
    assert found.rollout.value == pytest.approx(4 * (one - none)) and found.pair.value == pytest.approx(
        2 * (two - 2 * one + none)
    )
    rollouts = Rollouts(reward=reward, group=group, mask=torch.ones(len(s), 1, dtype=torch.bool))
    credit = METHODS["rloo"].credit(rollouts)[:, 0]
    prompts = (credit[:, None] * s).unflatten(0, (4, size)).mean(1)
    assert torch.allclose(leave_one_out_products(gram, reward, group), prompts @ prompts.T)
    signal = noise_scale(prompts @ prompts.T).signal.value
    assert found.between.value == pytest.approx(none - signal)
    # The split adds up to the prompts' own variance at the measured size.
    assert found.variance(1, size).value == pytest.approx(noise_scale(prompts @ prompts.T).noise.value)


def test_prompts_without_mixed_rewards_need_no_gradients(world):
    gram, reward, group = batch_of(world, 8, 4, 7)
    reward[group == 2] = 1.0
    silent = gram.clone()
    silent[group == 2] = silent[:, group == 2] = 0.0
    full, less = (leave_one_out(g, reward, group) for g in (gram, silent))
    assert np.allclose(full.parts, less.parts) and np.allclose(full.left_out, less.left_out)


def split_of(tau, alpha, beta):
    """A split with given parts."""
    from dataclasses import replace

    x, group = nested(0, 4, 3, torch.zeros(DIM).double())
    split = independent(x @ x.T, group)
    values = (replace(e, value=v) for e, v in zip((split.between, split.rollout, split.pair), (tau, alpha, beta)))
    return replace(split, **dict(zip(("between", "rollout", "pair"), values)), smallest=2 if beta else 1)


@pytest.mark.parametrize("tau, alpha, beta", [(1, 30, 0), (1, 30, 25), (2, 10, 40), (1, 5, 5)])
@pytest.mark.parametrize("costs", [(0, 1), (3, 1), (20, 0.5)])
def test_the_best_split_is_the_best_of_all(tau, alpha, beta, costs):
    split, (cost_prompt, cost_rollout), budget = split_of(tau, alpha, beta), costs, 400
    tried = {}
    for k in range(split.smallest, 400):
        p = int(budget // (cost_prompt + k * cost_rollout))
        if p:
            tried[p, k] = (tau + alpha / k + (beta / (k * (k - 1)) if k > 1 else 0)) / p
    found = best_split(split, budget, cost_prompt=cost_prompt, cost_rollout=cost_rollout)
    assert tried[found.prompts, found.group] == pytest.approx(min(tried.values())) and found.cost <= budget
    assert found.near[0] <= found.group <= found.near[1] and not found.ignored
    price = lambda k: float(loads(k) @ [tau, alpha, beta]) * (cost_prompt + k * cost_rollout)  # noqa: E731
    best = best_group(split, cost_prompt, cost_rollout)
    assert price(best) <= min(price(k) for k in np.arange(split.smallest, 100, 0.01)) * (1 + 1e-9)
    if not beta:
        assert best == pytest.approx(max(math.sqrt(alpha * cost_prompt / (tau * cost_rollout)), 1))
    elif not cost_prompt:
        assert best == pytest.approx(max(1 + math.sqrt(beta / tau), 2))


def test_parts_below_zero_are_named_and_more_rollouts_may_always_be_better():
    found = best_split(split_of(-1.0, 30, 20), 64)
    assert found.ignored == ("between",) and math.isinf(found.exact) and (found.prompts, found.group) == (1, 64)


def test_bad_input_is_named():
    x, group = nested(0, 4, 2, torch.zeros(DIM).double())
    gram = x @ x.T
    with pytest.raises(ValueError, match="at least 3 prompts"):
        noise_scale(gram[:2, :2])
    with pytest.raises(ValueError, match="groups of at least 2, these have 1"):
        independent(gram, torch.arange(8))
    with pytest.raises(ValueError, match="groups of at least 4, these have 2"):
        leave_one_out(gram, torch.ones(8), group)
    with pytest.raises(ValueError, match="same number of rollouts, there are from 1 to 3"):
        independent(gram, torch.tensor([0, 0, 1, 1, 1, 2, 3, 3]))
    with pytest.raises(ValueError, match=r"\[N, N\] for the 8 rollouts"):
        independent(gram[:4, :4], group)
    with pytest.raises(ValueError, match="two pieces with prompts"):
        from_pieces([1.0, 0.0], [3, 0], 1.0)
    with pytest.raises(ValueError, match="does not pay for one prompt with 1 rollouts: that costs 6"):
        best_split(independent(gram, group), 5, cost_prompt=5)
    with pytest.raises(ValueError, match="a rollout costs something"):
        best_split(independent(gram, group), 5, cost_rollout=0)
    with pytest.raises(ValueError, match="at least 1 prompt and 1 rollouts"):
        independent(gram, group).variance(0, 2)


def test_the_jackknife_of_a_mean_is_students_interval_and_fieller_ends_solve_their_equation():
    from tokencredit.stats import mean_of_units

    x = np.random.default_rng(0).normal(3, 1, (2, 20))
    left = (x.sum(1, keepdims=True) - x) / 19
    found, plain = jackknife(x[0].mean(), left[0]), mean_of_units(x[0])
    assert (found.low, found.high) == (pytest.approx(plain.low), pytest.approx(plain.high))
    ratio = jackknife_ratio(x[0].mean(), x[1].mean(), tuple(left))
    for end in (ratio.low, ratio.high):  # at its ends, numerator − ρ denominator is just significant
        gap = mean_of_units(x[0] - end * x[1])
        assert min(abs(gap.low), abs(gap.high)) < 1e-9
    assert ratio.low < ratio.value < ratio.high
    open_ended = jackknife_ratio(x[0].mean(), 0.1, (left[0], left[1] - x[1].mean() + 0.1))
    gap = mean_of_units(x[0] - open_ended.low * (x[1] - x[1].mean() + 0.1))
    assert math.isinf(open_ended.high) and abs(gap.low) < 1e-9
