"""Predicted and true change of entropy against an enumerated world: gradient, second order, reweighting, intervals; and
the study.
"""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tokencredit.cli import make_parser
from tokencredit.dynamics import vectors
from tokencredit.dynamics.batch import draw, prompts_of
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.entropy import entropy_terms, entropy_weights, terms_of
from tokencredit.dynamics.measured import Measured, combined, jackknifed, mean, ratio
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.precision import expansion, rounding
from tokencredit.dynamics.reweighting import (
    PrefixTangents,
    at_rest,
    curvatures,
    effective_sample_size,
    linear_change,
    quadratic_change,
    reweighted,
    reweighted_sequences,
    second_derivatives,
    slopes,
)
from tokencredit.dynamics.to_go import (
    BASELINES,
    Baseline,
    after,
    baseline_of,
    before,
    hidden_states,
    moving_average,
    places,
)
from tokencredit.dynamics.true_change import by_reweighting, by_sampling
from tokencredit.dynamics.vectors import moved, norm, scaled
from tokencredit.lm.policy import PolicyConfig
from tokencredit.rollouts import Rollouts
from tokencredit.studies.book import Book
from tokencredit.studies.entropy.figures import _flags, figures
from tokencredit.studies.entropy.measure import Evaluation, draw_update
from tokencredit.studies.entropy.question import STUDY, Sizes, SweepConfig
from tokencredit.studies.entropy.statistics import UpdateStatistics, odd_change, pooled_ratio, relative_errors
from tokencredit.studies.options import identity
from tokencredit.tasks.exact import PromptedPolicy, encode, modular_world, tiny_model

torch.set_num_threads(1)
PROMPT = encode("2 + 1 * 2 =")


@pytest.fixture(scope="module")
def world():
    """Every completion of an enumerated world, its probability, log-prob and entropy per token, and derivatives along a
    direction.
    """
    rules, model = modular_world("2 + 1 * 2 =", 3), tiny_model(0).double()
    policy = PromptedPolicy(model, PROMPT)
    exact = rules.enumerate(policy)
    sequences, mask, probability, _ = exact.completions
    passes = Passes(model, [PROMPT] * len(sequences), [s[m].tolist() for s, m in zip(sequences, mask)])
    logprob, entropy = passes.values()
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: 0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in passes.parameters.items()
    }

    def entropy_at(factor):
        with moved(passes.parameters, direction, factor), torch.no_grad():
            return float(rules.enumerate(policy).entropy)

    gradient = dict(zip(passes.parameters, exact.entropy_gradient(passes.parameters.values())))
    first, second = PrefixTangents(*passes.forward(direction)), second_derivatives(passes, direction, 0.01)
    return SimpleNamespace(
        mask=mask,
        probability=probability.detach(),
        passes=passes,
        logprob=logprob,
        entropy=entropy,
        gradient=gradient,
        direction=direction,
        entropy_at=entropy_at,
        first=first,
        second=second,
    )


def none(world):
    return Baseline(torch.zeros_like(world.entropy), torch.zeros_like(world.entropy))


def of_prefix(world):
    """Numbers that the prefix decides, and far from what is to come."""
    so_far = before(world.entropy, world.mask)
    return Baseline(3 * world.entropy.sin() + so_far, (so_far + world.entropy.exp()) * world.mask)


def distance(world, terms):
    found = world.passes.reverse(sum(t.logprob for t in terms.values()), terms["direct"].entropy)
    gap = sum((found[name] - g).square().sum() for name, g in world.gradient.items())
    return float((gap / sum(g.square().sum() for g in world.gradient.values())).sqrt())


@pytest.mark.parametrize("baseline", [none, of_prefix])
def test_the_weights_give_the_exact_gradient(world, baseline):
    assert distance(world, terms_of(world.entropy, world.mask, baseline(world), world.probability)) < 1e-6


def test_weights_that_are_wrong_do_not(world):
    """A baseline that sees its token, an entropy to go that starts one token late, and each term left out."""
    mask, entropy = world.mask, world.entropy
    peeking = Baseline(0.3 * world.logprob.exp(), torch.zeros_like(entropy))
    late = Baseline(after(entropy, mask) - _next_after(entropy, mask), torch.zeros_like(entropy))
    for planted in (peeking, late):
        assert distance(world, terms_of(entropy, mask, planted, world.probability)) > 1e-3
    terms = terms_of(entropy, mask, none(world), world.probability)
    for name in terms:
        kept = {
            other: t if other != name else t._replace(logprob=0 * t.logprob, entropy=0 * t.entropy)
            for other, t in terms.items()
        }
        assert distance(world, kept) > 1e-2


def _next_after(x, mask):
    """Σ_{k>t+1}."""
    own = after(x, mask)
    return torch.cat([own[:, 1:], torch.zeros_like(own[:, :1])], 1) * mask


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("baseline", [none, of_prefix])
def test_reweighting_is_exact_at_any_distance(world, factor, baseline):
    with moved(world.passes.parameters, world.direction, factor):
        logprob, entropy = world.passes.values()
    sums = reweighted(logprob - world.logprob, entropy, world.mask, baseline(world))
    found = (world.probability @ sums.entropy) / (world.probability @ sums.length)
    assert float(found) == pytest.approx(world.entropy_at(factor), abs=1e-9)


def expanded(world, baseline):
    """(H′, H″/2) from sums weighted by the completions' probabilities."""
    parts = slopes(world.first, world.entropy, world.mask, baseline)
    bend = curvatures(world.first, world.second, world.entropy, world.mask, baseline)
    rest = at_rest(world.entropy, world.mask)
    slope, longer = (sum(getattr(part, name) for part in parts.values()) for name in ("entropy", "length"))
    sums = [float(world.probability @ x) for x in (*rest, slope, longer, *bend)]
    return linear_change(*sums[:4]), quadratic_change(*sums)


@pytest.mark.parametrize("baseline", [none, of_prefix])
def test_linear_and_quadratic_terms_are_the_exact_derivatives(world, baseline):
    """Finite differences of the enumerated entropy, extrapolated to step 0."""
    linear, quadratic = expanded(world, baseline(world))
    middle, ends = world.entropy_at(0.0), {h: (world.entropy_at(h), world.entropy_at(-h)) for h in (0.05, 0.1)}
    slope = {h: (plus - minus) / (2 * h) for h, (plus, minus) in ends.items()}
    bend = {h: (plus + minus - 2 * middle) / (2 * h * h) for h, (plus, minus) in ends.items()}
    assert linear == pytest.approx((4 * slope[0.05] - slope[0.1]) / 3, rel=1e-4)
    assert quadratic == pytest.approx((4 * bend[0.05] - bend[0.1]) / 3, rel=2e-3)


def test_the_quadratic_term_needs_the_moving_prefixes(world):
    """With the prefixes' distribution held, the second derivative is another number: a planted omission."""
    frozen = replace_logprob(world)
    _, quadratic = expanded(frozen, none(world))
    assert abs(quadratic / expanded(world, none(world))[1] - 1) > 0.05


def replace_logprob(world):
    still = [PrefixTangents(0 * t.logprob, t.entropy) for t in (world.first, world.second)]
    return SimpleNamespace(**{**vars(world), "first": still[0], "second": still[1]})


def sampled(world, num, seed):
    """Rollouts of an enumerated world, each a prompt of its own; and which completions they are."""
    rows = torch.multinomial(world.probability, num, replacement=True, generator=torch.Generator().manual_seed(seed))
    scores = {"entropy": world.entropy[rows], "logprob": world.logprob[rows]}
    return Rollouts(reward=torch.zeros(num), group=torch.arange(num), mask=world.mask[rows], scores=scores), rows


@pytest.mark.parametrize("name", [*BASELINES, "ema"])
def test_predictions_from_samples_are_right_on_average_and_their_intervals_cover(world, name):
    truth, found = expanded(world, none(world))[0], []
    for seed in range(200):
        rollouts, rows = sampled(world, 200, seed)
        entropy, mask = rollouts.score("entropy"), rollouts.mask
        parts = slopes(PrefixTangents(*(x[rows] for x in world.first)), entropy, mask, baseline_of(rollouts, name))
        rest = at_rest(entropy, mask)
        slope, longer = (sum(getattr(part, key) for part in parts.values()).numpy() for key in ("entropy", "length"))
        found.append(
            jackknifed(linear_change, [rest.entropy.numpy(), rest.length.numpy(), slope, longer], np.arange(200))
        )
    values = np.array([f.value for f in found])
    assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / np.sqrt(len(values))
    estimates = [f.estimate() for f in found]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / len(found))


def test_the_position_baseline_has_less_noise_than_none(world):
    rollouts, rows = sampled(world, 2000, 1)
    errors = {}
    for name in ("none", "position"):
        first, baseline = PrefixTangents(*(x[rows] for x in world.first)), baseline_of(rollouts, name)
        errors[name] = float(slopes(first, rollouts.score("entropy"), rollouts.mask, baseline)["path"].entropy.std())
    assert errors["position"] < 0.8 * errors["none"]


@pytest.mark.parametrize("name", [*BASELINES, "ema"])
def test_a_baseline_knows_neither_its_token_nor_what_follows(world, name):
    """Changing a rollout from token t on (its own log-prob, the entropies after it) leaves its baseline up to t as it
    was.
    """
    rollouts, _ = sampled(world, 60, 2)
    row, t = int(rollouts.length.argmax()), 1
    scores = {key: rollouts.score(key).clone() for key in ("entropy", "logprob")}
    scores["logprob"][row, t:] -= 1
    scores["entropy"][row, t + 1 :] += 1
    other = baseline_of(replace(rollouts, scores=scores), name)
    for mine, changed in zip(baseline_of(rollouts, name), other):
        assert torch.equal(mine[row, : t + 1], changed[row, : t + 1])


def test_ridge_is_fitted_on_other_prompts(world):
    """The rollouts of one prompt say nothing to one another's baselines, position and ridge."""
    rollouts, _ = sampled(world, 60, 3)
    rollouts = replace(rollouts, group=torch.arange(60) // 2)
    scores = {key: rollouts.score(key).clone() for key in ("entropy", "logprob")}
    scores["entropy"][1] += 1
    averaged, moved_on = (baseline_of(each, "ema").entropy for each in (rollouts, replace(rollouts, scores=scores)))
    assert torch.equal(averaged[:2], moved_on[:2]) and not torch.equal(averaged[2:], moved_on[2:])
    for name in ("position", "ridge"):
        own, changed = baseline_of(rollouts, name), baseline_of(replace(rollouts, scores=scores), name)
        assert torch.allclose(own.entropy[0], changed.entropy[0], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(own.entropy[2:], changed.entropy[2:], rtol=1e-6)


def test_the_moving_average_by_hand():
    """Prompts in their order: 0, then a tenth of the first one's mean, then that moved a tenth towards the second's."""
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    targets = torch.zeros(4, 2, 1, dtype=torch.float64)
    targets[:, 0, 0] = torch.tensor([1.0, 3.0, 10.0, 7.0])
    targets[:, 1, 0] = torch.tensor([5.0, 5.0, 99.0, 0.0])
    found = moving_average(targets, mask, torch.tensor([0, 0, 1, 2]), places(mask))[..., 0]
    expected = [[0, 0], [0, 0], [0.2, 0], [0.2 + 0.1 * (10 - 0.2), 0.5]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


def test_ratios_of_whole_completions_are_right_as_well_and_noisier(world):
    """Summed over all completions both are the moved entropy; from samples whole ratios have the larger error, and at
    rest there is nothing between them.
    """
    rest = reweighted_sequences(torch.zeros_like(world.logprob), world.entropy, world.mask)
    assert all(torch.equal(a, b) for a, b in zip(rest, at_rest(world.entropy, world.mask)))
    with moved(world.passes.parameters, world.direction, 1.0):
        logprob, entropy = world.passes.values()
    sums = reweighted_sequences(logprob - world.logprob, entropy, world.mask)
    found = (world.probability @ sums.entropy) / (world.probability @ sums.length)
    assert float(found) == pytest.approx(world.entropy_at(1.0), abs=1e-9)
    errors = {"prefixes": [], "completions": []}
    for seed in range(100):
        rollouts, rows = sampled(world, 100, seed)
        ratio, moved_to, mask = (logprob - world.logprob)[rows], entropy[rows], rollouts.mask
        baseline = baseline_of(rollouts, "position")
        ways = (reweighted(ratio, moved_to, mask, baseline), reweighted_sequences(ratio, moved_to, mask))
        for name, each in zip(errors, ways):
            errors[name].append(float(each.entropy.sum() / each.length.sum()) - world.entropy_at(1.0))
    assert np.std(errors["prefixes"]) < np.std(errors["completions"])
    huge = torch.tensor([[50.0, 0.0]])
    assert reweighted_sequences(huge, torch.ones(1, 2), torch.ones(1, 2).bool()).length[0] == pytest.approx(
        2 * np.e**10
    )


def test_a_softmax_in_float64_is_that_of_the_logits_in_float64(single):
    """Behind the same body in float32: values to its own precision, and the derivatives of both modes as in float32."""
    batch = draw(single, 4, 2, 3)
    plain, fine = (batch.passes(replace(single, softmax=dtype)) for dtype in (None, torch.float64))
    own = [torch.tensor([[*p, *c]]) for p, c in zip(batch.prompts, batch.completions)]
    logprob, entropy = fine.values()
    for row, (ids, prompt) in enumerate(zip(own, batch.prompts)):
        with torch.no_grad():
            hidden = single.model.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1].double()
            log_p = (hidden @ single.model.lm_head.weight.double().T / single.temperature).log_softmax(-1)
        token = ids[0, len(prompt) :]
        there = slice(0, len(token))
        assert torch.allclose(logprob[row, there], log_p.gather(1, token[:, None])[:, 0], rtol=0, atol=1e-6)
        assert torch.allclose(entropy[row, there], torch.special.entr(log_p.exp()).sum(1), rtol=0, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.values(), (logprob, entropy)))
    weights = entropy_weights(batch)
    along = plain.reverse(*weights)
    again = fine.reverse(*weights)
    assert all(torch.allclose(x, again[name], atol=1e-5 + 1e-3 * float(x.abs().max())) for name, x in along.items())
    pairs = zip(plain.forward(along), fine.forward(along))
    assert all(torch.allclose(a, b, atol=1e-3 * float(a.abs().max())) for a, b in pairs)


def test_what_a_baseline_refuses(world):
    rollouts, _ = sampled(world, 10, 0)
    with pytest.raises(ValueError, match="none, entropy, position, ridge, ema"):
        baseline_of(rollouts, "value")
    with pytest.raises(ValueError, match=r"features are \[B, T, F\]"):
        baseline_of(rollouts, "ridge", torch.zeros(10, 2, 3))


@pytest.fixture(scope="module")
def checkpoint():
    """The shipped model in float64, with an optimizer that has not made a step."""
    return open_checkpoint("reckon", dtype=torch.float64).fresh("adamw")


@pytest.fixture(scope="module")
def single():
    """The same in float32."""
    return open_checkpoint("reckon").fresh("adamw")


def test_weights_of_a_batch_are_its_terms_and_its_prediction(checkpoint):
    """Reverse mode with the weights, forward mode with the weights, and the sums over rollouts say the same number."""
    batch = draw(checkpoint, 6, 4, seed=3)
    passes = batch.passes(checkpoint)
    direction = {
        name: 1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for name, p in passes.parameters.items()
    }
    first, mask, entropy = (
        PrefixTangents(*passes.forward(direction)),
        batch.rollouts.mask,
        batch.rollouts.score("entropy"),
    )
    for name in BASELINES:
        weights = entropy_weights(batch, name)
        assert torch.equal(weights.logprob, sum(t.logprob for t in entropy_terms(batch, name).values()))
        gradient = passes.reverse(*weights)
        by_reverse = sum(float((gradient[key] * direction[key]).sum()) for key in direction)
        by_forward = float((weights.logprob * first.logprob + weights.entropy * first.entropy).sum())
        parts, rest = slopes(first, entropy, mask, baseline_of(batch.rollouts, name)), at_rest(entropy, mask)
        moving = [sum(float(getattr(part, key).sum()) for part in parts.values()) for key in rest._fields]
        by_sums = linear_change(*(float(x.sum()) for x in rest), *moving)
        assert by_reverse == pytest.approx(by_forward, rel=1e-6) and by_sums == pytest.approx(by_forward, rel=1e-9)


def test_passes_of_some_rollouts_are_as_wide_as_all_of_them(checkpoint):
    batch = draw(checkpoint, 6, 4, seed=3)
    length = batch.rollouts.length
    some = batch.take(length < length.max())
    assert some.passes(checkpoint).values()[0].shape == some.rollouts.mask.shape


def test_hidden_states_know_no_more_than_the_prefix(checkpoint):
    batch = draw(checkpoint, 4, 2, seed=5)
    other = [(*ids[:-1], 5 if ids[-1] != 5 else 6) for ids in batch.completions]
    one, two = (hidden_states(Passes(checkpoint.model, batch.prompts, ids)) for ids in (batch.completions, other))
    assert one.shape == (*batch.rollouts.mask.shape, checkpoint.model.config.hidden_size) and torch.allclose(
        one, two, atol=1e-10
    )


def test_sampling_an_unmoved_policy_changes_nothing_and_repeats_its_rollouts(checkpoint):
    rows = prompts_of(checkpoint, 6, 1)
    entropy, tokens = by_sampling(checkpoint, rows, 3, seed=9)
    again = by_sampling(checkpoint, rows, 3, seed=9)
    assert np.array_equal(entropy, again[0]) and np.array_equal(tokens, again[1])
    assert not np.array_equal(tokens, by_sampling(checkpoint, rows, 3, seed=10)[1])


def test_fresh_samples_are_of_the_prompts_as_the_policy_asks_them(single):
    """In a chat, a row's prompt goes through the template."""
    rows = prompts_of(single, 4, 1)
    tokenizer = copy.deepcopy(single.tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] + ' 7' }}"
    chatting = replace(single, policy=replace(single.policy, tokenizer=tokenizer, chat=True))
    asked = [row | {"prompt": row["prompt"] + " 7"} for row in rows]
    found, by_hand = by_sampling(chatting, rows, 3, seed=9), by_sampling(single, asked, 3, seed=9)
    assert all(np.array_equal(*both) for both in zip(found, by_hand))
    assert not np.array_equal(found[0], by_sampling(single, rows, 3, seed=9)[0])


def test_fresh_samples_and_reweighting_see_the_same_change(single):
    """Up and down the entropy itself: two kinds of truth that share nothing but the policies agree within four standard
    errors.
    """
    checkpoint, batch = single, draw(single, 32, 4, seed=5)
    uphill = batch.passes(checkpoint).reverse(*entropy_weights(batch))
    update, rows = scaled(uphill, 0.02 / norm(uphill)), prompts_of(checkpoint, 384, 1)
    evaluation = Evaluation.of(checkpoint, rows, 2)
    passes, ids, sums = evaluation.passes, np.arange(384), []
    rest = passes.values()
    for sign in (1, -1):
        moved_sums, size = by_reweighting(passes, rest, evaluation.mask, evaluation.baseline(), update, sign)
        assert 0.5 < size / 384 <= 1
        with moved(passes.parameters, update, sign):
            sums.append(([x.numpy() for x in moved_sums], by_sampling(checkpoint, rows, 2, seed=7)))
    one, two = (jackknifed(odd_change, [*sums[0][k], *sums[1][k]], ids) for k in (0, 1))
    assert abs(one.value) > 4 * one.error and abs(one.value - two.value) < 4 * np.hypot(one.error, two.error)


def test_a_collapse_of_weights_shows():
    ratio_of_one = torch.zeros(50, 3)
    ratio_of_one[7, 1] = 8.0
    assert effective_sample_size(torch.zeros(50, 3), torch.ones(50, 3).bool()) == pytest.approx(50)
    w = np.exp(8.0)
    assert effective_sample_size(ratio_of_one, torch.ones(50, 3).bool()) == pytest.approx((49 + w) ** 2 / (49 + w * w))


def test_rounding_is_smaller_in_double_precision(checkpoint, single):
    direction = draw_update(single, Sizes(prompts=8, group=4), 4).vector
    evaluation = Evaluation.of(single, prompts_of(single, 64, 1), 2)
    terms = expansion(checkpoint, evaluation.batch, evaluation.baseline(), direction)
    factors = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-1)
    found = [
        rounding(c, evaluation.batch, evaluation.baseline(), direction, terms, factors) for c in (single, checkpoint)
    ]
    assert 0 < found[1].noise < 0.6 * found[0].noise < 1e-6
    assert found[1].changes[-1] == pytest.approx(found[1].expansion[-1], rel=0.02)


def test_a_jackknifed_mean_is_the_textbook_s_and_clusters_count_once():
    x = np.random.default_rng(0).normal(size=40)
    once = jackknifed(lambda total, num: total / num, [x, np.ones(40)], np.arange(40))
    assert once.error == pytest.approx(x.std(ddof=1) / np.sqrt(40), rel=1e-9)
    twice = jackknifed(lambda total, num: total / num, [np.repeat(x, 2), np.ones(80)], np.repeat(np.arange(40), 2))
    assert twice.value == pytest.approx(once.value) and twice.error == pytest.approx(once.error, rel=0.02)
    with pytest.raises(ValueError, match="7 prompts are too few"):
        jackknifed(lambda total, num: total / num, [x, np.ones(40)], np.arange(40) % 7)


def test_errors_of_combinations_follow_the_gradient_and_shared_prompts_cancel():
    rng = np.random.default_rng(1)
    a, b = (Measured(value, rng.normal(size=30), np.arange(30)) for value in (2.0, -3.0))
    product = combined(lambda x: float(x[0] * x[1]), [a, b])
    assert product.value == -6 and np.allclose(
        product.influence, np.concatenate([-3 * a.influence, 2 * b.influence]), atol=1e-6
    )
    assert product.error == pytest.approx(np.sqrt(np.square(-3 * a.influence + 2 * b.influence).sum()), rel=1e-6)
    assert combined(lambda x: float(x[0] - x[1]), [a, a]).error == pytest.approx(0, abs=1e-9)
    assert mean([a, b]).error == pytest.approx(np.sqrt(np.square(a.influence + b.influence).sum()) / 2)
    elsewhere = replace(b, prompt=np.arange(100, 130))
    assert mean([a, elsewhere]).error == pytest.approx(np.hypot(a.error, b.error) / 2)


def test_fieller_s_interval_by_hand():
    """4 ± 0.5 over 2 ± 0.25, independent, t = 2.0017 at 59 degrees: the ends solve (4 − 2ρ)² = t² (0.25 +
    0.0625 ρ²).
    """
    units = np.full(30, 1 / np.sqrt(30))
    above, below = Measured(4.0, 0.5 * units, np.arange(30)), Measured(2.0, 0.25 * units, np.arange(30, 60))
    found = ratio(above, below)
    t2 = 2.00099538**2
    a, b, c = 4 - t2 * 0.0625, 8.0, 16 - t2 * 0.25
    ends = [(b + s * np.sqrt(b * b - a * c)) / a for s in (-1, 1)]
    assert found.value == 2 and (found.low, found.high) == (
        pytest.approx(ends[0], rel=1e-6),
        pytest.approx(ends[1], rel=1e-6),
    )
    assert ratio(above, replace(below, value=0.3)).high == np.inf


LINE, BEND, RATE, FACTORS = -2e-3, 4e-4, 1e-3, tuple(10 ** (k / 4) for k in range(-6, 4))


def curve(noise=0.0, line=LINE, num=32, seed=0):
    """The arrays of an update whose entropy is 0.3 + line f + BEND f² at factor f, over `num` prompts of 10 tokens
    each.
    """
    rng = np.random.default_rng(seed)
    tokens, zero = np.full(num, 10.0), np.zeros(num)

    def sums(f):
        return np.stack([tokens * (0.3 + line * f + BEND * f * f) + noise * f * rng.normal(size=num), tokens], -1)

    moved_sums = np.array([[sums(f), sums(-f)] for f in FACTORS])
    a = {
        "prompt": np.arange(num) + 1000 * seed,
        "rest_entropy": 0.3 * tokens + 0.1 * rng.normal(size=num),
        "rest_length": tokens,
        "direct": tokens * line + noise * rng.normal(size=num),
        "bend_entropy": 2 * BEND * tokens,
        "bend_length": zero,
        "lr": RATE,
        "variates": rng.normal(size=(num, 3)),
        "fresh_own": np.array([[sums(1.0), sums(-1.0)]]),
        "fresh_rest": sums(0.0),
        "sweep": moved_sums,
        "sweep_rest": sums(0.0),
        "covariance": np.zeros(2),
    }
    for name in BASELINES:
        a |= {f"path_{name}": zero, f"length_{name}": zero}
    for kind in ("same", "independent"):
        a |= {f"{kind}_moved": moved_sums, f"{kind}_rest": sums(0.0), f"{kind}_size": np.full((len(FACTORS), 2), num)}
    return UpdateStatistics(a, FACTORS)


def test_statistics_of_a_known_curve():
    u = curve()
    assert u.linear().value == pytest.approx(LINE) and u.quadratic.value == pytest.approx(BEND)
    assert u.own.odd.value == pytest.approx(LINE) and u.own.whole.value == pytest.approx(LINE + BEND)
    assert u.reach().value == pytest.approx(0.5 * abs(LINE) / BEND)
    assert [FACTORS[k] for k in u.inside(0.1)] == [f for f in FACTORS if 0.1 <= f < 2.5]
    slope, r2 = u.slope("fresh", 0.1)
    assert slope.value == pytest.approx(1, abs=1e-9) and r2 == pytest.approx(1, abs=1e-12)
    bent, r2 = u.slope("fresh", 0.1, odd=False)
    assert bent.value < 0.95 and r2 < 0.9999
    assert u.slope("fresh", 2.0) is None


def test_relative_errors_of_predictions_with_known_error():
    """Predictions that are all 10 % too large in size: + 0.1 over the typical change, whatever its sign, and an
    interval around it.
    """
    updates = [curve(noise=1e-4, seed=k + 1) for k in range(4)]
    for u in updates:
        u.arrays["direct"] = u.arrays["direct"] * 1.1
    errors = relative_errors(updates)
    for found in (errors["typical"], errors["own"]):
        assert found.value == pytest.approx(0.1, abs=4 * found.error) and 0 < found.error < 0.01
    pooled = pooled_ratio(updates)
    assert pooled.low < 1.1 < pooled.high and pooled.low > 1


def test_updates_are_flagged_not_hidden():
    u = curve(noise=1e-4)
    assert _flags(u, u.reach(), {"same": 1.0, "independent": 1.0}) == []
    outside = curve(noise=1e-5, line=5e-4)
    assert "is outside the linear range" in _flags(outside, outside.reach(), {})[0]
    assert "effective sample size falls to 5.0%" in _flags(u, u.reach(), {"independent": 0.05})[0]
    unresolved = curve(noise=0.2)
    assert "its true change is not resolved from 0" in _flags(unresolved, unresolved.reach(), {})


def test_a_study_of_updates_outside_their_linear_range_has_no_slope_and_says_so():
    updates, book = [curve(noise=1e-5, line=1e-5, seed=k + 1) for k in range(4)], Book("", 0)
    for u in updates:
        same = {f"batch_{name}": u.arrays[name] for name in ("direct", "path_position", "length_position", "fresh_own")}
        u.arrays.update(same, sub=np.zeros((2, 4)), batch_sub=np.zeros((2, 1)), vector=np.zeros(5))
    result = figures(updates, {"float32_noise": 1e-12, "float64_noise": 1e-12}, 16, book)
    assert np.isnan(book.figures["slope"].value) and result["updates"][0]["r2"] is None
    for k in range(4):
        assert any(f"Update {k + 1}: its own learning rate is outside" in finding for finding in result["findings"])
        assert any(f"Update {k + 1}: fewer than 3 rates" in finding for finding in result["findings"])


TINY = {
    "prompts": 8,
    "group": 4,
    "updates": 2,
    "eval_prompts": 32,
    "sweep_prompts": 16,
    "sub_batch": 8,
    "fresh": 1,
    "sweep_fresh": 1,
    "rates": 4,
    "policy": PolicyConfig("reckon"),
    "optimizer": "adamw",
}


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"eval_prompts": 4, "sub_batch": 2}, "--eval-prompts 4 are too few"),
        ({"rates": 3}, "--rates of 4 or more .* got 2, 1, 1, 3, 2"),
        ({"sub_batch": 20}, "--sub-batch 20: a small prediction"),
        ({"decades": 0.4}, "--decades over 0.5; got 2, 1, 1, 4, 0.4"),
    ],
)
def test_studies_that_cannot_answer_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        SweepConfig(**TINY | wrong)


def test_a_field_that_came_later_is_part_of_a_study_where_it_is_asked_for():
    assert "softmax" not in identity(SweepConfig()) and identity(SweepConfig(softmax="float64"))["softmax"] == "float64"
    parser = make_parser()
    asked = parser.parse_args(["dynamics", "entropy", "--run", "reckon", "--softmax", "float64"])
    assert asked.softmax == "float64"


def test_the_sweep_spans_its_decades_and_holds_the_optimizer_s_own_rate():
    factors = SweepConfig().factors
    assert len(factors) == 12 and 1.0 in factors and factors[-1] / factors[0] == pytest.approx(100) and factors[-1] > 3


def test_without_an_optimizer_the_study_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="--optimizer adamw or --optimizer sgd"):
        STUDY.run(SweepConfig(**TINY | {"optimizer": None}), tmp_path / "out")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("entropy") / "study"
    STUDY.run(SweepConfig(**TINY, workers=2), out, command="tokencredit dynamics entropy")
    return out


def test_the_result_has_its_figures_with_intervals(study):
    result = json.loads((study / "result.json").read_text())
    assert result["study"] == "entropy" and len(result["updates"]) == 2
    for name in ("slope", "r2", "relative_error_mean", "relative_error_spread_8", "precision_floor", "linear_range"):
        figure = result["figures"][name]
        assert {"value", "low", "high", "unit", "seed", "command"} <= figure.keys()
        assert name == "r2" or figure["low"] <= figure["value"] <= figure["high"]


def test_tables_hold_what_the_figures_are_made_of(study):
    import pyarrow.parquet as parquet

    from tokencredit.runs import Run

    rows = Run.open(study).tokens()
    assert {"logprob_change", "entropy_change", "share"} <= rows[0].keys() and len(rows) == 32
    table = parquet.read_table(study / "rollouts.parquet").to_pydict()
    result = json.loads((study / "result.json").read_text())
    first = [k for k, update in enumerate(table["update"]) if update == 0]
    sums = [sum(table[name][k] for k in first) for name in ("entropy", "length", "direct", "path", "length_slope")]
    predicted = linear_change(sums[0], sums[1], sums[2] + sums[3], sums[4])
    assert predicted == pytest.approx(result["figures"]["update/0/linear"]["value"])
    assert sum(sum(row["share"]) for row in rows) == pytest.approx(predicted, rel=1e-4)


def test_a_killed_study_ends_with_the_same_numbers_in_one_process(study, tmp_path):
    """Two processes made the first; one makes the last update of its copy again, and every figure."""
    import shutil

    other = tmp_path / "study"
    shutil.copytree(study, other)
    for name in ("result.json", "stages/update_1_0.npz"):
        (other / name).unlink()
    STUDY.run(SweepConfig(**TINY, workers=1), other, command="tokencredit dynamics entropy")
    one, two = (json.loads((path / "result.json").read_text()) for path in (study, other))
    assert one["figures"].keys() == two["figures"].keys()
    for name, figure in one["figures"].items():
        if figure["value"] is not None:
            assert two["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-4, abs=1e-9), name


def test_the_study_of_a_large_model_is_that_of_a_small_one(study, tmp_path, monkeypatch):
    """Its vectors are float32 and in files."""
    files = []
    monkeypatch.setattr(vectors, "FINE", 0)
    make = vectors.Filed.__init__
    monkeypatch.setattr(vectors.Filed, "__init__", lambda self, *args: files.append(args[1]) or make(self, *args))
    STUDY.run(SweepConfig(**TINY, workers=1), tmp_path / "large")
    assert len(files) >= 6 and set(files) == {tmp_path / "large"}, "a gradient and two vectors for each update"
    small, large = (json.loads((path / "result.json").read_text())["figures"] for path in (study, tmp_path / "large"))
    names = [name for name in small if name.startswith("term/") or name.endswith(("/linear", "/quadratic"))]
    assert len(names) > 8 and small.keys() - large.keys() == {"precision_floor/float64"}
    for name in (*names, "slope", "slope/same", "linear_range"):
        assert large[name]["value"] == pytest.approx(small[name]["value"], rel=5e-3, abs=1e-7), name


def test_the_command_and_the_report_find_it(study, tmp_path, capsys):
    from tokencredit.cli import main

    page = tmp_path / "page.html"
    assert main(["report", str(study), "--out", str(page)]) == 0
    assert "Predicted and true change" in page.read_text()
    out = tmp_path / "again"
    flags = [
        part for name, value in TINY.items() if name != "policy" for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    assert main(["dynamics", "entropy", "--run", "reckon", "--workers", "1", "--out", str(out), *flags]) == 0
    assert "relative_error_mean" in capsys.readouterr().out and (out / "report.html").exists()


@pytest.fixture(scope="module")
def page_path(study):
    return STUDY.write_page(study)


def test_the_page_draws_every_truth_of_every_rate(opened):
    marks = opened.locator("#over-learning-rates .mark")
    assert {marks.nth(k).get_attribute("data-kind") for k in range(marks.count())} == {"same", "independent", "fresh"}
    opened.get_by_label("Change", exact=True).select_option("whole")
    assert opened.locator("#over-learning-rates .curve[data-order]").count() == 2
    assert opened.locator("#predicted-and-true-change .mark").count() == 4
