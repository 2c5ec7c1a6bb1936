"""Agreement of a proxy with a noisy effect: against scipy, brute force, and worlds whose truth is known."""

import numpy as np
import pytest
import torch
from scipy import stats

from tokencredit.agreement import ranks
from tokencredit.agreement.calibration import calibration, confidences
from tokencredit.agreement.controls import BudgetCurve, Null, budget_curve, fit_limit, noise_only, permuted
from tokencredit.agreement.moments import (
    Squares,
    budget_law,
    corrected_draws,
    exact_draws,
    reliability,
    resolved,
    variance_draws,
)
from tokencredit.agreement.posterior import Posterior, ceiling_draws
from tokencredit.agreement.resampling import Bootstrap, compare
from tokencredit.agreement.rollouts import AlternativeRollouts
from tokencredit.tasks.exact import ExactWorld, TabularPolicy


def columns(seed=0, n=60, clusters=7):
    """Two related columns with many ties, a label, and a prompt for every token."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 8, n).astype(float)
    y = np.where(rng.random(n) < 0.5, x, rng.integers(0, 6, n)).astype(float)
    return x, y, np.clip(y / 6 + 0.1, 0, 1), np.sort(rng.integers(0, clusters, n))


def repeated(cluster, weights):
    """Row numbers of the sample in which cluster c occurs weights[c] times."""
    return np.concatenate([np.repeat(np.flatnonzero(cluster == c), int(w)) for c, w in enumerate(weights)])


@pytest.mark.parametrize("seed", range(3))
def test_weighted_measures_are_those_of_the_repeated_sample(seed):
    """Against scipy and loops, on the sample itself (row 0) and on bootstrap samples written out."""
    x, y, label, cluster = columns(seed)
    boot = Bootstrap(cluster, num=5, seed=seed)
    w, cw = boot.weights.astype(float), boot.cluster_weights
    rho, tau = ranks.spearman(x, y, w), ranks.kendall(x, y, cluster, cw)
    area, precision = ranks.auroc(x, label, w), ranks.average_precision(x, label, w)
    control = np.random.default_rng(seed).integers(0, 9, len(x)) + 0.3 * x
    partial = ranks.partial_spearman(x, y, control[None], w)
    for row in range(6):
        rows = repeated(cluster, cw[row])
        assert rho[row] == pytest.approx(stats.spearmanr(x[rows], y[rows]).statistic)
        # scipy breaks no ties between copies of a token either: copies are tied in both columns.
        assert tau[row] == pytest.approx(stats.kendalltau(x[rows], y[rows]).statistic)
        assert area[row] == pytest.approx(slow_auroc(x[rows], label[rows]))
        assert precision[row] == pytest.approx(slow_average_precision(x[rows], label[rows]))
        assert partial[row] == pytest.approx(slow_partial(x[rows], y[rows], control[rows]))


def slow_auroc(x, label):
    above = sum(p * (1 - q) * ((a > b) + 0.5 * (a == b)) for a, p in zip(x, label) for b, q in zip(x, label))
    return above / (label.sum() * (1 - label).sum())


def slow_average_precision(x, label):
    found = total = 0.0
    for threshold in np.unique(x)[::-1]:
        taken = x >= threshold
        found += label[x == threshold].sum() * label[taken].mean()
        total += label[x == threshold].sum()
    return found / total


def slow_partial(x, y, control):
    a, b, c = (stats.rankdata(each) for each in (x, y, control))
    design = np.stack([np.ones_like(c), c], 1)
    left = [each - design @ np.linalg.lstsq(design, each, rcond=None)[0] for each in (a, b)]
    return np.corrcoef(*left)[0, 1]


def test_measures_agree_with_hand_derived_values():
    """x = 1 2 3 4, labels 0 1 0 1. Pairs (positive, negative): 2>1, 2<3, 4>1, 4>3: AUROC 3/4. Precision at the
    positives, from the top: 1/1 and 2/3: AP 5/6. The top half is {4, 3}: precision 1/2; it holds 7/10 of Σ x."""
    x, label, w = np.arange(1.0, 5), np.array([0.0, 1, 0, 1]), np.ones((1, 4))
    assert ranks.auroc(x, label, w)[0] == 0.75
    assert ranks.average_precision(x, label, w)[0] == pytest.approx(5 / 6)
    assert ranks.share_of_top(x, label, 0.5, w, per_token=True)[0] == 0.5
    assert ranks.share_of_top(x, x, 0.5, w, per_token=False)[0] == pytest.approx(0.7)
    # All tied: the top half is half of everything.
    assert ranks.share_of_top(np.ones(4), x, 0.5, w, per_token=False)[0] == pytest.approx(0.5)
    # The ranks of (1 1 2 2) are (1.5 1.5 3.5 3.5); minus a half.
    assert ranks.midranks(np.array([1.0, 1, 2, 2]), w)[0].tolist() == [1.0, 1.0, 3.0, 3.0]


def test_constant_columns_and_missing_classes_are_undefined():
    x, one, w = np.arange(4.0), np.ones(4), np.ones((1, 4))
    found = [
        ranks.spearman(x, one, w),
        ranks.auroc(x, one, w),
        ranks.average_precision(x, 0 * one, w),
        ranks.pearson(x, one, w),
        ranks.kendall(x, one, np.arange(4), w),
        ranks.partial_spearman(x, x[::-1].copy(), x[None], w),
    ]
    assert all(np.isnan(each[0]) for each in found)
    rounded = np.array([[[1.0, 0.0], [0.0, -1e-18]]])
    assert np.isnan(ranks.correlations(rounded)[0, 0, 1])


def test_within_prompts_ignores_what_lies_between_them():
    """Two prompts, perfectly reversed inside each; the second has larger values of both, so the pooled correlation is
    positive.
    """
    x, y, cluster = np.array([1.0, 2, 3, 11, 12, 13]), np.array([3.0, 2, 1, 13, 12, 11]), np.repeat([0, 1], 3)
    assert ranks.within_matrix(np.stack([x, y]), cluster, np.ones((1, 2)))[0, 0, 1] == pytest.approx(-1)
    assert ranks.spearman(x, y, np.ones((1, 6)))[0] > 0.5


def test_bootstrap_intervals_cover_and_tests_hold_their_level():
    """Spearman of clustered tokens in a world where it is 0: a shared shift per prompt in both columns, independent of
    each other.
    """
    reps, inside, rejected = 300, 0, 0
    for rep in range(reps):
        rng = np.random.default_rng(rep)
        cluster = np.repeat(np.arange(40), 10)
        a, b, c = (rng.normal(size=40)[cluster] + rng.normal(size=400) for _ in range(3))
        boot = Bootstrap(cluster, num=200, seed=rep)
        matrix = ranks.spearman_matrix(np.stack([a, b, c]), boot.weights)
        estimate = boot.estimate(matrix[:, 0, 1])
        inside += estimate.low <= 0 <= estimate.high
        rejected += compare(boot, {"a": matrix[:, 0, 1], "c": matrix[:, 2, 1]}, "a")["c"]["p"] <= 0.05
    error = np.sqrt(0.05 * 0.95 / reps)
    assert inside / reps == pytest.approx(0.95, abs=4 * error)
    assert rejected / reps == pytest.approx(0.05, abs=4 * error)


def test_a_single_prompt_has_no_interval():
    """Every draw of it is itself: an interval of no width would be the most certain of all."""
    for cluster, known in ((np.zeros(6, int), False), (np.arange(6) // 3, True)):
        boot = Bootstrap(cluster, num=200)
        means = boot.sums(np.arange(6.0)) / boot.sums(np.ones(6))
        assert np.isfinite([boot.estimate(means).low, boot.estimate(means).high, boot.p_value(means)]).all() == known
        assert boot.estimate(means).value == 2.5


def test_comparisons_are_adjusted_by_holm_and_undefined_ones_left_out():
    boot = Bootstrap(np.arange(50), num=999)
    draws = {
        "entropy": boot.weights @ np.linspace(0, 1, 50),
        "same": boot.weights @ np.linspace(0, 1, 50),
        "none": np.full(1000, np.nan),
        "better": boot.weights @ np.linspace(1, 2, 50),
    }
    found = compare(boot, draws, "entropy")
    assert set(found) == {"same", "better"}
    assert found["better"]["p"] == pytest.approx(0.002) and found["better"]["holm"] == pytest.approx(0.004)
    assert found["same"]["holm"] == 1.0
    assert compare(boot, draws, "none") == {}


# Worlds with known effects --------------------------------------------------------------------------------------------


def world(seed, n=16, prompts=40, length=12, effects=True, alternatives=3):
    """(rollouts, truth, prompt of every token, entropy). Any V₋ make a consistent completion: V follows from them and
    R.

    Entropy knows V(1 − V) and, where there are effects, sometimes their place. Without effects only the last token
    decides (and does not count); before it V is one number per completion.
    """
    rng = np.random.default_rng(seed)
    traces = 2 * prompts
    trace = np.repeat(np.arange(traces), length)
    last = np.tile(np.arange(length) == length - 1, traces)
    pi = rng.choice([0.9999, 0.95, 0.5], traces * length, p=[0.4, 0.3, 0.3])
    reward = rng.integers(0, 2, traces).astype(float)
    matters = (rng.random(len(pi)) < 0.15) & effects
    value, before, other = reward.copy(), np.empty_like(pi), np.empty_like(pi)
    for at in range(length - 1, -1, -1):
        here = np.arange(traces) * length + at
        decides = matters[here] | (last[here] & (not effects))
        aside = np.where(decides, rng.beta(0.7, 0.7, traces), value)
        pi[here[last[here]]] = 0.5
        other[here], value = aside, pi[here] * value + (1 - pi[here]) * aside
        before[here] = value
    after = (before - (1 - pi) * other) / pi
    spread_of = np.minimum(other, 1 - other) * rng.random(
        len(other)
    )  # alternatives' own values: other, other ± spread_of
    values = np.stack([other, other + spread_of, other - spread_of], 1)[:, :alternatives]
    share = np.full(alternatives, 1 / alternatives)
    chosen = rng.integers(0, alternatives, (len(pi), n))
    rewards = (rng.random((len(pi), n)) < np.take_along_axis(values, chosen, 1)).astype(float)
    truth = {
        "replace": after - other,
        "before_after": after - before,
        "spread": np.sqrt(np.maximum(pi * after**2 + (1 - pi) * (values**2 * share).sum(1) - before**2, 0)),
    }
    entropy = (
        before * (1 - before) + 0.3 * rng.random(len(pi)) + 0.25 * matters * rng.random(len(pi)) + 0.1 * (pi < 0.9)
    )
    return AlternativeRollouts(trace, pi, reward, rewards, chosen, share[chosen]), truth, trace // 2, entropy, ~last


def test_effects_are_unbiased_with_exact_variances():
    """One world, its rollouts drawn 400 times: means within 4 standard errors, squares and variances too, for every
    token together.
    """
    base, truth, *_ = world(3, prompts=6, n=8)
    value = truth_values(base, truth)
    rng, reps = np.random.default_rng(0), 400
    found = {name: [] for name in ("replace", "before_after", "spread_squared", "replace_squares", "noise")}
    for _ in range(reps):
        chosen = rng.integers(0, 3, base.rewards.shape)
        rewards = (rng.random(chosen.shape) < np.take_along_axis(value, chosen, 1)).astype(float)
        e = AlternativeRollouts(base.trace, base.pi, base.reward, rewards, chosen, base.share).effects()
        for name, array in zip(
            found, (e.replace, e.before_after, e.spread_squared, e.square("replace"), e.replace_variance)
        ):
            found[name].append(array)
    arrays = {name: np.stack(each) for name, each in found.items()}
    wanted = {
        "replace": truth["replace"],
        "before_after": truth["before_after"],
        "spread_squared": truth["spread"] ** 2,
        "replace_squares": truth["replace"] ** 2,
        "noise": arrays["replace"].var(0),
    }
    for name, target in wanted.items():
        error = arrays[name].std(0) / np.sqrt(reps) + 1e-4
        if name == "noise":  # the empirical variance of 400 draws has an error of its own
            error = error + arrays["replace"].var(0) * np.sqrt(2 / reps)
        z = (arrays[name].mean(0) - target) / error
        assert np.abs(z).max() < 5 and np.abs(np.mean(z)) < 4 / np.sqrt(len(z)) * 3, name


def truth_values(base, truth):
    """Values of the three alternatives of `world`'s tokens, from the effects: other and other ± s with share 1/3
    each.
    """
    rest = 1 - base.pi
    other_minus = truth["replace"]
    _, after = base.recurse(np.zeros(len(base.pi)), base.reward)
    del after
    before, v = np.empty_like(base.pi), base.reward.copy()
    length = int(np.bincount(base.trace).max())
    other = np.empty_like(before)
    for at in range(length - 1, -1, -1):
        here = np.arange(len(base.reward)) * length + at
        other[here] = v - other_minus[here]
        v = base.pi[here] * v + rest[here] * other[here]
        before[here] = v
    after = other + other_minus
    second = (truth["spread"] ** 2 + before**2 - base.pi * after**2) / rest
    s = np.sqrt(np.maximum(second - other**2, 0) * 1.5)
    return np.stack([other, other + s, other - s], 1)


def test_the_recursion_is_the_hand_derived_one():
    """π = (.5, .8), R = 1, V₋ = (.25, .5): V₁ = .8 + .2·.5 = .9, V₀ = .5·.9 + .5·.25 = .575. The second completion: one
    undefined token.
    """
    rewards = np.array([[0, 1, 0, 0], [0, 1, 0, 1], [np.nan] * 4])
    r = AlternativeRollouts(
        np.array([0, 0, 1]),
        np.array([0.5, 0.8, 1.0]),
        np.array([1.0, 0.0]),
        rewards,
        np.zeros((3, 4), int),
        np.ones((3, 4)),
    )
    e = r.effects()
    assert e.before.tolist() == pytest.approx([0.575, 0.9, 0.0])
    assert e.replace[:2].tolist() == pytest.approx([0.65, 0.5]) and np.isnan(e.replace[2])
    assert e.before_after[:2].tolist() == pytest.approx([0.325, 0.1])
    # Var V₋ = p(1 − p)/(n − 1): .0625 and .08333; Var V₁ = .2² · .08333; Var replace₀ = .0625 + that.
    assert e.replace_variance[:2].tolist() == pytest.approx([0.0625 + 0.04 / 12, 1 / 12])
    with pytest.raises(ValueError, match="at least 4"):
        AlternativeRollouts(
            np.array([0]), np.array([0.5]), np.array([1.0]), rewards[:1, :3], np.zeros((1, 3), int), np.ones((1, 3))
        )


def test_partitions_are_disjoint_and_equal():
    r, *_ = world(0, n=9, prompts=2)
    keep = r.subsets(2, 5, seed=1)
    assert keep.shape == (5, 2, len(r.pi), 9) and (keep.sum(-1) == 4).all() and not (keep[:, 0] & keep[:, 1]).any()


@pytest.mark.parametrize(
    ("estimand", "n", "prompts"),
    [("replace", 8, 40), ("replace", 16, 40), ("before_after", 8, 40), ("spread", 16, 120)],
)
def test_the_corrected_correlation_is_unbiased_and_covers(estimand, n, prompts):
    """Fixed repetitions; the target of each is the exact correlation of that world's tokens, so what is left is the
    rollouts' noise.
    """
    reps, errors, widths, naive = 60, [], [], []
    for rep in range(reps):
        r, truth, prompt, x, counts = world(rep, n=n, prompts=prompts)
        boot = Bootstrap(prompt[counts], num=150, seed=rep)
        squares = Squares.of(r, (estimand,), partitions=8)[estimand].at(counts)
        draws = corrected_draws(x[counts], squares, boot)
        target = exact_draws(x[counts], truth[estimand][counts], boot)[0]
        naive.append(stats.pearsonr(r.effects().size(estimand)[counts] ** 2, x[counts])[0] - target)
        if draws is not None:
            errors.append(draws[0] - target)
            estimate = boot.estimate(draws)
            widths.append(estimate.low <= target <= estimate.high)
    errors = np.array(errors)
    assert len(errors) > 0.9 * reps
    # A ratio of unbiased moments is unbiased up to 1/prompts: 0.02 is allowed for that, besides 4 standard errors.
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(len(errors)) + 0.02, (errors.mean(), np.mean(naive))
    # The interval also covers the draw of the prompts, which this target holds fixed: it may only cover more than 95 %.
    assert np.mean(widths) > 0.95 - 4 * np.sqrt(0.05 * 0.95 / len(widths))


def test_a_world_without_effects_gives_no_false_correlation():
    """Entropy knows V(1 − V). The naive correlation finds something; the null explains it, and the correction refuses
    or covers 0.
    """
    reps, found, explained, refused, covers = 40, [], 0, 0, 0
    for rep in range(reps):
        r, _, prompt, x, counts = world(100 + rep, effects=False)
        size = r.effects().size("replace")[counts]
        naive = stats.spearmanr(size, x[counts]).statistic
        null = Null.of(noise_only(r, {"x": x}, ("replace",), counts, draws=60, seed=rep)["replace"]["x"])
        found.append(naive)
        explained += null.low - 0.05 <= naive <= null.high + 0.05
        boot = Bootstrap(prompt[counts], num=200, seed=rep)
        draws = corrected_draws(x[counts], Squares.of(r, ("replace",), partitions=8)["replace"].at(counts), boot)
        refused += draws is None
        covers += draws is None or bool(boot.estimate(draws).low <= 0 <= boot.estimate(draws).high)
    assert np.mean(found) > 0.1, "the trap must be there"
    assert explained >= 0.9 * reps
    assert refused >= 0.85 * reps, "5 % of tests of a true null may resolve"
    assert covers >= 0.9 * reps


def test_variance_is_resolved_only_where_there_is_some():
    with_effects, _, prompt, _, counts = world(0)
    boot = Bootstrap(prompt[counts], num=300)
    assert resolved(Squares.of(with_effects, ("replace",))["replace"].at(counts), boot)


def test_a_variance_that_is_mostly_noise_is_not_resolved():
    """The effects' own variance is 1, clearly above zero in every draw of prompts, and that of U is 10: refused. With 3
    it is not.
    """
    rng, size = np.random.default_rng(0), 4000
    own, boot = rng.normal(size=size), Bootstrap(np.repeat(np.arange(200), 20), num=200)
    for total, verdict in ((10, False), (3, True)):
        halves = own + np.sqrt(2 * (total - 1)) * rng.normal(size=(1, 2, size))
        squares = Squares(halves.mean((0, 1)), halves)
        assert np.quantile(variance_draws(squares, boot), 0.01) > 0
        assert resolved(squares, boot) is verdict


def enumerated(seed, prompts, n, worlds):
    """(rollouts, spreads, prompt, entropy) of `prompts` of the worlds, two completions of each, n alternatives at every
    token: values, entropies and spreads from the enumeration.
    """
    rng = np.random.default_rng(seed)
    trace, columns, reward, spread, prompt, entropy = [], [], [], [], [], []
    for number, k in enumerate(np.repeat(rng.permutation(len(worlds))[:prompts], 2)):
        prefix = 0
        for log_p, q in worlds[k]:
            p, values = np.exp(log_p[prefix]), q[prefix]
            token = rng.choice(len(p), p=p / p.sum())
            others = np.where(np.arange(len(p)) == token, 0, p) / (1 - p[token])
            drawn = rng.choice(len(p), n, p=others / others.sum())
            columns.append((p[token], (rng.random(n) < values[drawn]).astype(float), drawn, others[drawn]))
            spread.append(np.sqrt(p @ (values - p @ values) ** 2))
            entropy.append(-(p * log_p[prefix]).sum())
            trace.append(number)
            prompt.append(number // 2)
            prefix = prefix * len(p) + token
        reward.append(values[token])
    pi, rewards, drawn, share = (np.array(x) for x in zip(*columns))
    rollouts = AlternativeRollouts(np.array(trace), pi, np.array(reward), rewards, drawn, share)
    return rollouts, np.array(spread), np.array(prompt), np.array(entropy)


@pytest.fixture(scope="module")
def worlds():
    """Sixty worlds of four tokens out of six, so decided that most alternatives are rare: (log p, Q) by depth."""
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        right = torch.tensor(rng.random(6**4) < rng.uniform(0.1, 0.6)).double()
        place = 6 ** torch.arange(3, -1, -1)
        one = ExactWorld(6, 4, lambda ended, right=right, place=place: right[(ended * place).sum(-1)])
        with torch.no_grad():
            known = one.enumerate(TabularPolicy(one, seed=seed, scale=4.0))
        found.append([(lp.numpy(), q.numpy()) for lp, q in zip(known.log_probs, known.action_values)])
    return found


def test_the_spread_of_few_rollouts_is_refused(worlds):
    """12 prompts, 8 rollouts: what `study correlation --small` had, where 0.78 [0.48, 1.19] was given for 0.30. The
    same rollouts resolve the effect of a token.
    """
    rollouts, _, prompt, entropy = enumerated(0, 12, 8, worlds)
    boot = Bootstrap(prompt, num=200)
    squares = Squares.of(rollouts, ("spread", "before_after"), partitions=8)
    assert corrected_draws(entropy, squares["spread"], boot) is None
    assert corrected_draws(entropy, squares["before_after"], boot) is not None


@pytest.mark.parametrize("prompts", [12, 40])
def test_the_corrected_figure_of_spread_covers_where_it_is_given(worlds, prompts):
    """Fixed repetitions; the target is the exact figure of the tokens that were drawn, as above."""
    reps, errors, covers = 60, [], []
    for rep in range(reps):
        rollouts, spread, prompt, entropy = enumerated(rep, prompts, 16, worlds)
        boot = Bootstrap(prompt, num=150, seed=rep)
        draws = corrected_draws(entropy, Squares.of(rollouts, ("spread",), partitions=8)["spread"], boot)
        if draws is not None:
            target = exact_draws(entropy, spread, boot)[0]
            errors.append(draws[0] - target)
            covers.append(boot.estimate(draws).low <= target <= boot.estimate(draws).high)
    assert len(errors) > 0.6 * reps
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(len(errors)) + 0.02
    assert np.mean(covers) > 0.95 - 4 * np.sqrt(0.05 * 0.95 / len(covers))


def test_reliability_is_the_share_of_the_variance():
    r, truth, prompt, _, counts = world(5, n=16, prompts=150)
    boot = Bootstrap(prompt[counts], num=50)
    found = reliability(r, "replace", counts, boot)
    estimate = r.effects().replace[counts]
    signed = np.corrcoef(estimate, truth["replace"][counts])[0, 1] ** 2
    squared = np.corrcoef(r.effects().square("replace")[counts], truth["replace"][counts] ** 2)[0, 1] ** 2
    assert found["signed"][0] == pytest.approx(signed, abs=0.05) and found["squared"][0] == pytest.approx(
        squared, abs=0.06
    )


def test_posterior_labels_are_calibrated_and_sharp():
    """Among tokens labelled with probability p, about p have |effect| ≥ τ; and labels beat the naive threshold's
    error.
    """
    r, truth, *_, counts = world(11, n=16, prompts=150)
    label = Posterior.fit(r, draws=80).label("replace", 0.2)[counts]
    real = np.abs(truth["replace"][counts]) >= 0.2
    for low, high in ((0, 0.2), (0.2, 0.8), (0.8, 1.01)):
        inside = (label >= low) & (label < high)
        assert real[inside].mean() == pytest.approx(label[inside].mean(), abs=0.07)
    naive = (np.abs(r.effects().replace[counts]) >= 0.2).astype(float)
    assert ((label - real) ** 2).mean() < 0.6 * ((naive - real) ** 2).mean()
    with pytest.raises(ValueError, match="0 and 1"):
        Posterior.fit(AlternativeRollouts(r.trace, r.pi, r.reward, r.rewards / 2, r.alternative, r.share))


def test_the_ceiling_is_what_the_truth_itself_reaches():
    r, truth, *_, counts = world(12, n=16, prompts=100)
    reached = stats.spearmanr(np.abs(truth["replace"][counts]), r.effects().size("replace")[counts]).statistic
    assert ceiling_draws(r, Posterior.fit(r, 100), "replace", counts, num=20).mean() == pytest.approx(reached, abs=0.06)


def test_permutation_keeps_only_what_lies_between_completions():
    rng = np.random.default_rng(0)
    trace = np.repeat(np.arange(100), 10)
    level, own = rng.normal(size=100)[trace], rng.normal(size=1000)
    draws = permuted(trace, {"between": level + rng.normal(size=1000), "inside": own}, level + own, draws=50)
    assert draws["between"].mean() > 0.2 and abs(draws["inside"].mean()) < 0.12
    assert stats.spearmanr(own, level + own).statistic > draws["inside"].max(), (
        "chance differences of the completions' means are small"
    )


def test_the_budget_curve_recovers_the_limit():
    """Exact curve, ρ∞ = .6 and c = 10; and where the thinned correlations really come from noise, the limit lies above
    the last of them.
    """
    n = np.array([4.0, 8, 16])
    limit, constant = fit_limit(n, (0.6 / np.sqrt(1 + 10 / n))[:, None])
    assert limit[0] == pytest.approx(0.6, abs=0.01) and constant[0] == pytest.approx(10, rel=0.1)
    assert fit_limit(np.array([8.0]), np.array([[0.3]]))[0][0] == pytest.approx(0.3)
    r, truth, prompt, _, counts = world(13, n=32, prompts=80)
    proxy = {"oracle": np.abs(truth["before_after"])}
    curve = budget_curve(r, proxy, "before_after", counts, Bootstrap(prompt[counts], num=20))
    assert isinstance(curve, BudgetCurve) and curve.rollouts == [8, 16, 32]
    at = curve.draws["oracle"][:, 0]
    assert at[0] < at[1] < at[2] < curve.limit["oracle"][0] <= 1.1


def test_the_budget_law_holds_where_completions_are_sampled():
    """Two tokens, each right with probability ½ and 0.3: V₀ = .15. Completions are drawn on-policy and measured: E Σ δ²
    = .1275.
    """
    rng, b, n = np.random.default_rng(0), 3000, 8
    first, second = rng.random(b) < 0.5, rng.random(b) < 0.3
    pi = np.stack([np.full(b, 0.5), np.where(second, 0.3, 0.7)], 1).ravel()
    other = np.stack([np.where(first, 0, 0.3), np.where(second, 0, first)], 1).ravel()
    rewards = (rng.random((2 * b, n)) < other[:, None]).astype(float)
    r = AlternativeRollouts(
        np.repeat(np.arange(b), 2),
        pi,
        (first & second).astype(float),
        rewards,
        np.zeros((2 * b, n), int),
        np.ones((2 * b, n)),
    )
    total, spread = budget_law(r, np.ones(2 * b), np.arange(b) // 10)
    assert total.mean() == pytest.approx(0.1275, abs=4 * total.std() / np.sqrt(b))
    assert spread.mean() == pytest.approx(0.1275, abs=0.01)


def test_calibration_of_a_calibrated_and_of_an_overconfident_policy():
    rng = np.random.default_rng(0)
    sure = rng.beta(2, 2, 300)
    answers = [["a" if rng.random() < p else "b" for _ in range(16)] for p in sure]
    right = ["a" if rng.random() < p else "b" for p in sure]
    fair = calibration(answers, np.array([[a == r for a in group] for group, r in zip(answers, right)]), num=100)
    assert abs(fair.overconfidence[0]) < 0.05 and fair.ece[0] < fair.expected_ece + 0.05
    never = calibration(answers, np.zeros((300, 16)), num=100)
    assert never.overconfidence[0] == pytest.approx(confidences(answers).mean()) and never.ece[0] == pytest.approx(
        never.overconfidence[0]
    )
    assert confidences([["a", "a", "b"]]).tolist() == [[0.5, 0.5, 0.0]]


def test_the_estimator_of_the_pivotality_package_says_the_same():
    """Two implementations of one recursion: effects and variances against the explicit linear map, completion by
    completion.
    """
    from tokencredit.pivotality.estimands import PathMap

    r, *_ = world(7, prompts=5)
    found = r.effects()
    mean = r.rewards.mean(1)
    noise = mean * (1 - mean) / (r.count - 1)
    for trace in range(len(r.reward)):
        here = r.trace == trace
        path = PathMap.of(r.pi[here], 1 - r.pi[here])
        for name in ("replace", "before_after"):
            A, a = getattr(path, name)
            np.testing.assert_allclose(getattr(found, name)[here], A @ mean[here] + a * r.reward[trace], atol=1e-12)
            np.testing.assert_allclose(getattr(found, f"{name}_variance")[here], (A**2) @ noise[here], atol=1e-12)
