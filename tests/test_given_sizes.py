"""Effects given sizes that were predicted beforehand: limits, another formula, less error with true sizes, refusals."""

import numpy as np
import pytest
import torch
from tests.test_pivotality import modular_study, truths

from tokencredit.durable import write_parquet
from tokencredit.pivotality.budgets import Fixed, TwoStage
from tokencredit.pivotality.crew import Here
from tokencredit.pivotality.estimator import estimate
from tokencredit.pivotality.given_sizes import given_sizes, read_sizes, spread_rollouts
from tokencredit.pivotality.measure import measure
from tokencredit.pivotality.store import RolloutStore

torch.set_num_threads(1)


def drawn(truth, num, seed=0):
    design = truth.design(num)
    successes = truth.draw(design, np.random.default_rng(seed), 1)[0]
    return estimate(design, successes, truth.reward)


def test_endless_sizes_give_the_unbiased_estimate_and_none_gives_nothing():
    for truth in truths()[:8]:
        found, ones = drawn(truth, 4), np.ones(len(truth.completion))
        wide = given_sizes(found, truth.reward, 1e4 * ones)
        assert np.allclose(wide.value, found.before_after.value, atol=1e-5, equal_nan=True)
        narrow = given_sizes(found, truth.reward, 0 * ones)
        assert np.allclose(np.nan_to_num(narrow.value), 0) and np.allclose(np.nan_to_num(narrow.standard_error), 0)


def test_it_is_the_posterior_in_information_form():
    """(Aᵀ Σ⁻¹ A + S⁻¹)⁻¹, with A written element by element, from what the value without a token is."""
    truth, rng = truths()[3], np.random.default_rng(1)
    found, num = drawn(truth, 6), len(truth.completion)
    size = rng.uniform(0.05, 0.4, num)
    d = found.design
    noise = np.zeros(num)
    for h, i in enumerate(d.position):
        rate = (found.proportion[h] * d.num[h] + 1) / (d.num[h] + 2)
        noise[i] += d.weight[h] ** 2 * rate * (1 - rate) / d.num[h]
    A = np.zeros((num, num))
    for i in range(num):
        A[i, i] = -1 / truth.rest[i]
        A[i, i + 1 :] = -1
    covariance = np.linalg.inv(A.T / noise @ A + np.diag(size**-2))
    answer = given_sizes(found, truth.reward, size)
    assert np.allclose(answer.value, covariance @ (A.T / noise) @ (found.v_not - truth.reward), atol=1e-9)
    assert np.allclose(answer.standard_error, np.sqrt(np.diag(covariance)), atol=1e-9)


def test_true_sizes_take_away_error_and_their_own_error_is_known():
    """Two rollouts a token: with |Q − V| for the sizes the squared error is a fraction of the unbiased estimate's."""
    plain, sized, promised = 0.0, 0.0, 0.0
    for truth in truths():
        for seed in range(20):
            found = drawn(truth, 2, seed)
            answer = given_sizes(found, truth.reward, np.abs(truth.before_after))
            plain += np.square(found.before_after.value - truth.before_after).sum()
            sized += np.square(answer.value - truth.before_after).sum()
            promised += np.square(answer.standard_error).sum()
    assert sized < 0.5 * plain and 0.5 < sized / promised < 2


def test_rollouts_go_where_sizes_are_large_and_are_as_many_as_asked_for():
    _, _, sampler, traces, judge = modular_study()[:5]
    sizes = [np.full(len(t.completion), 1e-3) for t in traces]
    sizes[0][1] = 1.0
    none = {k: np.zeros(len(t.completion), bool) for k, t in enumerate(traces)}
    num = list(spread_rollouts(Here(sampler, judge), dict(enumerate(traces)), sizes, 4, none, {}).values())
    total, tokens = sum(int(n.sum()) for n in num), sum(len(t.completion) for t in traces)
    assert 4 * tokens - tokens <= total <= 4 * tokens and min(n.min() for n in num) == 1
    assert num[0].sum() > 0.8 * (total - tokens)
    store = RolloutStore(None, {})
    found = measure(traces, sampler, judge, budget=Fixed(4), max_new_tokens=4, store=store, sizes=sizes)
    assert [m.rollouts for m in found] == [int(n.sum()) for n in num]
    assert all(m.sized is not None and (np.abs(np.nan_to_num(m.sized.value)) < 0.01).all() for m in found[1:])
    with pytest.raises(ValueError, match="to a fixed budget, not to two stages"):
        measure(traces, sampler, judge, budget=TwoStage(), max_new_tokens=4, store=store, sizes=sizes)


def test_sizes_from_a_file(tmp_path):
    traces = modular_study()[3][:2]
    rows = [
        {"trace": k, "position": i, "learned_size": 0.1} for k, t in enumerate(traces) for i in range(len(t.completion))
    ]
    path = tmp_path / "sizes.parquet"
    write_parquet(path, rows)
    assert [len(x) for x in read_sizes(path, traces)] == [len(t.completion) for t in traces]
    write_parquet(path, rows[1:])
    with pytest.raises(ValueError, match="token 0 of trace 0 has learned_size nan"):
        read_sizes(path, traces)
    write_parquet(path, [{"trace": 0, "position": 0}])
    with pytest.raises(ValueError, match="it needs trace, position and learned_size"):
        read_sizes(path, traces)
