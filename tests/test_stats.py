"""Estimates against enumeration, and intervals against simulation with a fixed number of samples."""

from itertools import combinations
from math import comb, sqrt

import numpy as np
import pytest
from scipy import stats

from tokencredit.stats import (
    Estimate,
    cluster_bootstrap,
    holm,
    mean_of_units,
    paired_difference,
    pass_at_k,
    share_of_units,
)

LEVEL = 0.95
DRAWS = 1000
# Four standard errors of a coverage that is estimated from DRAWS samples.
BOUND = 4 * sqrt(LEVEL * (1 - LEVEL) / DRAWS)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n):
    for correct in range(n + 1):
        samples = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(samples, k))
            assert pass_at_k([correct], n, k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_holds_for_large_numbers_and_ragged_samples():
    exact = [1 - comb(1000 - 3, 100) / comb(1000, 100), 1 - comb(200 - 150, 100) / comb(200, 100)]
    assert pass_at_k([3, 150], [1000, 200], 100) == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ValueError, match="pass@4 needs at least 4 samples of every prompt; there are as few as 3"):
        pass_at_k([1, 1], [8, 3], 4)


def worlds(prompts, samples, mean, concentration, seed=0):
    """DRAWS evaluations [prompts] of success rates, in a world whose prompts differ in difficulty (beta-binomial)."""
    rng = np.random.default_rng(seed)
    rates = rng.beta(mean * concentration, (1 - mean) * concentration, size=(DRAWS, prompts))
    return rng.binomial(samples, rates) / samples


@pytest.mark.parametrize("concentration", [0.5, 2, 20])
@pytest.mark.parametrize("prompts, samples, mean", [(64, 8, 0.35), (64, 1, 0.35), (256, 8, 0.9), (256, 8, 0.05)])
def test_intervals_of_shares_cover(prompts, samples, mean, concentration):
    found = [share_of_units(rates) for rates in worlds(prompts, samples, mean, concentration)]
    coverage = np.mean([e.low <= mean <= e.high for e in found])
    assert 0.93 - 0.005 <= coverage <= 0.97 + 0.005
    assert all(0 <= e.low <= e.value <= e.high <= 1 for e in found)


@pytest.mark.parametrize("prompts, samples, mean, concentration", [(20, 8, 0.05, 0.5), (64, 8, 0.02, 2)])
def test_intervals_of_rare_successes_cover_less_and_the_docstring_says_how_much(prompts, samples, mean, concentration):
    found = [share_of_units(rates) for rates in worlds(prompts, samples, mean, concentration)]
    assert np.mean([e.low <= mean <= e.high for e in found]) > 0.89 - BOUND


def test_clusters_are_not_independent_samples():
    """Where prompts are all or nothing, 8 samples of each say no more than one: the interval must not shrink."""
    once, often = (share_of_units(worlds(64, n, 0.4, 0.01)[0]) for n in (1, 8))
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.15)
    naive = 2 * 1.96 * sqrt(0.4 * 0.6 / (64 * 8))
    assert often.high - often.low > 2 * naive


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_shares_that_all_agree_keep_a_width(rate):
    e = share_of_units([rate] * 30)
    z2 = stats.norm.ppf(0.975) ** 2
    assert e.value == rate and e.num == 30
    assert (e.high - e.low) == pytest.approx(z2 / (30 + z2))  # Wilson's interval of 0 out of 30
    assert share_of_units([rate]).high - share_of_units([rate]).low > 0.7


def test_plain_successes_have_wilsons_interval():
    x = [1.0] * 13 + [0.0] * 27
    # n* = p(1-p) / (p(1-p)/(n-1)) = n - 1: the spread between prompts has n - 1 degrees of freedom.
    wilson = stats.binomtest(13, 40).proportion_ci(method="wilson")
    e = share_of_units(x)
    assert (e.low, e.high) == pytest.approx((wilson.low, wilson.high), abs=0.005)


def test_mean_of_units_is_students():
    x = np.random.default_rng(0).normal(2, 3, size=7)
    low, high = stats.t.interval(0.95, 6, loc=x.mean(), scale=stats.sem(x))
    e = mean_of_units(x)
    assert (e.value, e.low, e.high, e.num) == pytest.approx((x.mean(), low, high, 7))
    assert mean_of_units([3.0]) == Estimate(3.0, -np.inf, np.inf, 1)
    assert str(mean_of_units([1.0, 1.0])) == "1.000 [1.000, 1.000]"
    assert str(mean_of_units([1.0, 3.0]).within(least=0)) == "2.000 [0.000, 14.706]"
    assert mean_of_units([3.0]).within(least=0) == mean_of_units([3.0]), "no interval is none"
    for function in (mean_of_units, share_of_units):
        with pytest.raises(ValueError, match="at least one value"):
            function([])


def test_paired_difference_is_scipys_paired_test():
    a, b = np.random.default_rng(1).normal(size=(2, 6))
    ci = stats.ttest_rel(a, b).confidence_interval(0.95)
    e = paired_difference(a, b)
    assert (e.low, e.high) == pytest.approx((ci.low, ci.high))
    with pytest.raises(ValueError, match="6 of one and 5 of the other"):
        paired_difference(a, b[:5])


def test_cluster_bootstrap_covers_where_the_naive_one_does_not():
    rng, draws = np.random.default_rng(2), 150
    hits, naive_hits = 0, 0
    for i in range(draws):
        clusters = np.repeat(np.arange(30), 6)
        values = rng.normal(size=30)[clusters] + 0.3 * rng.normal(size=180)
        whole, single = (
            cluster_bootstrap(lambda rows, values=values: values[rows].mean(), c, num=200, seed=i)
            for c in (clusters, np.arange(180))
        )
        hits += whole.low <= 0 <= whole.high
        naive_hits += single.low <= 0 <= single.high
    assert hits / draws > 0.93 - 4 * sqrt(0.93 * 0.07 / draws)
    assert naive_hits / draws < 0.75


def test_cluster_bootstrap_at_its_edges():
    x = np.array([1.0, 2.0, 4.0])
    assert cluster_bootstrap(lambda rows: x[rows].mean(), [0, 0, 0]) == Estimate(x.mean(), -np.inf, np.inf, 1)
    same = [cluster_bootstrap(lambda rows: x[rows].mean(), ["a", "b", "b"], num=50, seed=3) for _ in range(2)]
    assert same[0] == same[1] and same[0].num == 2 and (same[0].low, same[0].high) == (1.0, 3.0)
    never = cluster_bootstrap(lambda rows: float("nan"), [0, 1, 2], num=5)
    assert (never.low, never.high) == (-np.inf, np.inf)


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04; the running maximum makes the last .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.3]) == pytest.approx([0.3])
    assert len(holm([])) == 0


def test_holm_keeps_the_error_of_the_family():
    p = np.random.default_rng(4).uniform(size=(DRAWS, 8))
    assert np.mean([holm(row).min() < 0.05 for row in p]) < 0.05 + BOUND
