"""Rollouts: what they refuse and how they say it, what they derive; masked and grouped arithmetic."""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tokencredit import Rollouts
from tokencredit.masked import (
    column_mean,
    over,
    pool,
    pool_deviation,
    pool_mean,
    pool_std,
    row_mean,
    row_min_max,
    zero_off,
)
from tokencredit.testing import credit_like, rollouts_strategy

GOOD = {
    "reward": torch.tensor([1.0, 0.0, 1.0]),
    "group": torch.tensor([5, 5, -2]),
    "mask": torch.tensor([[1, 1], [1, 0], [0, 0]]).bool(),
    "scores": {"entropy": torch.tensor([[0.5, 1.0], [2.0, torch.nan], [torch.inf, -3.0]])},
}
NAN, INF = float("nan"), float("inf")


def entropy(*rows):
    return {"scores": {"entropy": torch.tensor(rows)}}


REFUSED = [
    ({"reward": [1.0, 0.0, 1.0]}, TypeError, r"reward must be a torch.Tensor, got list"),
    ({"group": None}, TypeError, r"group must be a torch.Tensor, got NoneType"),
    ({"mask": [[True]]}, TypeError, r"mask must be a torch.Tensor, got list"),
    ({"mask": torch.ones(3).bool()}, ValueError, r"mask must be \[B, T\], got shape \[3\]"),
    (
        {"mask": torch.tensor([[1, 1], [1, 2], [0, 0]])},
        ValueError,
        r"mask must be boolean or 0/1: row 1 holds other values",
    ),
    ({"mask": torch.tensor([[1.0, NAN], [1, 0], [0, 0]])}, ValueError, r"mask must be boolean or 0/1, got non-finite"),
    (
        {"reward": torch.tensor([1.0, 0.0])},
        ValueError,
        r"reward must be \[B\] = \[3\] as the mask has 3 rows, got shape \[2\]",
    ),
    ({"reward": torch.ones(3, 1)}, ValueError, r"reward must be \[B\] = \[3\].*got shape \[3, 1\]"),
    ({"group": torch.tensor([0, 1])}, ValueError, r"group must be \[B\] = \[3\].*got shape \[2\]"),
    ({"group": torch.tensor([0.0, 1.0, 1.0])}, TypeError, r"group must hold integers, got torch.float32"),
    ({"group": torch.tensor([True, True, False])}, TypeError, r"group must hold integers, got torch.bool"),
    (
        {"reward": torch.tensor([1.0, NAN, 0.0])},
        ValueError,
        r"reward must be finite: row 1 has nan. Fix the verifier, or drop the row",
    ),
    ({"reward": torch.tensor([1.0, 0.0, -INF])}, ValueError, r"reward must be finite: row 2 has -inf"),
    ({"reward": torch.tensor([1j, 0, 0])}, TypeError, r"reward must be real"),
    ({"scores": {"x": [[1.0]]}}, TypeError, r'score "x" must be a torch.Tensor, got list'),
    ({"scores": {"x": torch.ones(3)}}, ValueError, r'score "x" must be \[B, T\] = \[3, 2\], got shape \[3\]'),
    ({"scores": {"x": torch.ones(3, 2) * 1j}}, TypeError, r'score "x" must be real'),
    (
        entropy([0.5, NAN], [0.0, 0.0], [0.0, 0.0]),
        ValueError,
        r'score "entropy" must be finite on the mask: row 0, token 1 has nan',
    ),
    (
        entropy([0.5, 0.5], [INF, 0.0], [0.0, 0.0]),
        ValueError,
        r'score "entropy" must be finite on the mask: row 1, token 0 has inf',
    ),
    (entropy([0.5, 0.5], [-0.25, 0.0], [0.0, 0.0]), ValueError, r"entropy must be >= 0 nats: row 1, token 0 has -0.25"),
    (
        {"reward": torch.ones(3, device="meta")},
        ValueError,
        r"reward is on meta but mask is on cpu: move them to one device",
    ),
    ({"group": torch.ones(3, dtype=torch.long, device="meta")}, ValueError, r"group is on meta but mask is on cpu"),
    ({"scores": {"x": torch.ones(3, 2, device="meta")}}, ValueError, r'score "x" is on meta but mask is on cpu'),
]


@pytest.mark.parametrize("change, error, message", REFUSED, ids=[m for *_, m in REFUSED])
def test_bad_rollouts_are_refused_by_field_and_row(change, error, message):
    Rollouts(**GOOD)
    with pytest.raises(error, match=message):
        Rollouts(**GOOD | change)


def test_scores_are_clean():
    rollouts = Rollouts(**GOOD)
    assert rollouts.score("entropy").tolist() == [[0.5, 1.0], [2.0, 0.0], [0.0, 0.0]]  # anything may stand off the mask
    assert (
        Rollouts(**GOOD | entropy([0.5, 1.0], [-1e-6, 0.0], [0.0, 0.0])).score("entropy")[1, 0] == 0
    )  # a rounding below zero
    x = Rollouts(**GOOD | {"scores": {"x": torch.tensor([[-1.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])}}).score("x")
    assert x.min() == -3  # only entropies have a sign
    with pytest.raises(
        KeyError, match=r'this needs the score "x"; these rollouts have: entropy. Pass scores=\{"x": \[B, T\]\}'
    ):
        rollouts.score("x")


@pytest.mark.parametrize(
    "given_dtype, kept",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
    ids=str,
)
def test_numbers_are_float32_or_better(given_dtype, kept):
    reward, x = torch.tensor([1, 0, 1]).to(given_dtype), torch.ones(3, 2).to(given_dtype)
    rollouts = Rollouts(**GOOD | {"reward": reward, "scores": {"x": x}})
    assert rollouts.reward.dtype == rollouts.score("x").dtype == kept
    assert rollouts.success.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", (torch.int32, torch.uint8, torch.float32, torch.bfloat16), ids=str)
def test_masks_of_zeros_and_ones_are_accepted(dtype):
    rollouts = Rollouts(**GOOD | {"mask": GOOD["mask"].to(dtype)})
    assert torch.equal(rollouts.mask, GOOD["mask"])


def test_what_is_derived():
    reward = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 0.2, -1.0])
    group = torch.tensor([9, 9, -3, -3, 0, 0, 7])
    rollouts = Rollouts(reward, group, torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0], [0, 1], [1, 1], [1, 1]]))
    assert rollouts.success.tolist() == [True, False, True, True, True, True, False]
    assert rollouts.length.tolist() == [2, 1, 2, 0, 1, 2, 2]
    assert rollouts.group_index.tolist() == [3, 3, 0, 0, 1, 1, 2]
    assert rollouts.informative.tolist() == [True, True, False, False, True, True, False]  # 0.5 and 0.2 differ
    assert rollouts.mixed.tolist() == [True, True, False, False, False, False, False]  # but both are successes
    assert replace(rollouts, success_above=0.3).mixed.tolist() == [True, True, False, False, True, True, False]
    assert rollouts.index("batch").tolist() == [0] * 7 and rollouts.index("group") is rollouts.group_index
    assert len(rollouts) == 7


@given(rollouts=rollouts_strategy(()))
def test_derived_flags_by_loops(rollouts):
    batch = reference.batch_of(rollouts)
    for members in batch.groups():
        rewards = {batch.reward[i] for i in members}
        for i in members:
            assert rollouts.informative[i] == (len(rewards) > 1)
            assert rollouts.mixed[i] == (len({r > 0 for r in rewards}) == 2)
            assert rollouts.comparable[i] == batch.comparable(members)


@given(rollouts=rollouts_strategy(("x",)), seed=st.integers(0, 999))
def test_rows_copies_and_pickles(rollouts, seed):
    keep = torch.rand(len(rollouts), generator=torch.Generator().manual_seed(seed)) < 0.5
    for chosen in (keep, torch.nonzero(keep)[:, 0]):
        some = rollouts.rows(chosen)
        assert torch.equal(some.reward, rollouts.reward[keep]) and torch.equal(some.group, rollouts.group[keep])
        assert torch.equal(some.mask, rollouts.mask[keep]) and torch.equal(some.scores["x"], rollouts.scores["x"][keep])
    for same in (pickle.loads(pickle.dumps(rollouts)), copy.deepcopy(rollouts)):
        assert torch.equal(same.reward, rollouts.reward) and torch.equal(same.mask, rollouts.mask)
        assert torch.equal(same.scores["x"], rollouts.scores["x"]) and same.success_above == rollouts.success_above
    assert replace(rollouts, success_above=0.9).rows(keep).success_above == 0.9


def test_rollouts_are_frozen():
    rollouts = Rollouts(**GOOD)
    with pytest.raises(FrozenInstanceError):
        rollouts.reward = torch.zeros(3)
    with pytest.raises(TypeError):
        rollouts.scores["x"] = torch.zeros(3, 2)


# Masked and grouped arithmetic ----------------------------------------------------------------------------------------


@given(rollouts=rollouts_strategy(()), seed=st.integers(0, 999))
def test_masked_arithmetic_by_loops(rollouts, seed):
    x = credit_like(rollouts, seed)  # NaN off the mask
    batch, index = reference.batch_of(rollouts), rollouts.group_index
    rows, (low, high) = row_mean(x, rollouts.mask), row_min_max(x, rollouts.mask)
    columns, deviation = column_mean(x, rollouts.mask, index), pool_deviation(x, rollouts.mask, index)
    means, spread = pool_mean(x, rollouts.mask, index), pool_std(deviation, rollouts.mask, index)
    for members in batch.groups():
        values = [x[i, t].item() for i in members for t in batch.tokens[i]]
        mean = reference.mean(values) if values else 0.0
        std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else 0.0
        for i in members:
            own = [x[i, t].item() for t in batch.tokens[i]]
            assert rows[i].item() == pytest.approx(reference.mean(own) if own else 0.0)
            assert (low[i], high[i]) == ((min(own), max(own)) if own else (0.0, 0.0))
            assert means[i, 0].item() == pytest.approx(mean) and spread[i, 0].item() == pytest.approx(std, abs=1e-12)
            for t in range(batch.width):
                there = [x[k, t].item() for k in members if t in batch.tokens[k]]
                assert columns[i, t].item() == pytest.approx(reference.mean(there) if there else 0.0)
                assert deviation[i, t].item() == pytest.approx(
                    x[i, t].item() - mean if t in batch.tokens[i] else 0.0, abs=1e-12
                )


@pytest.mark.parametrize("value", (0.1, 1e-30, 1e30, 1 / 3))
def test_equal_numbers_have_no_deviation(value):
    x = torch.full((2000, 7), value)
    assert (pool_deviation(x, torch.ones_like(x).bool(), torch.arange(2000) % 3) == 0).all()
    slightly = x * (1 + 1.2e-7 * (torch.arange(7) % 2))  # a rounding upstream
    assert (pool_deviation(slightly, torch.ones_like(x).bool(), torch.zeros(2000, dtype=torch.long)) == 0).all()


def test_sums_and_quotients_of_nothing():
    assert over(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).tolist() == [0.0, 0.5]
    assert over(torch.tensor([1.0]), torch.tensor([0.0]), empty=1.0).tolist() == [1.0]
    assert pool(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1])).tolist() == [5.0, 2.0, 5.0]
    assert pool(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert zero_off(torch.tensor([[NAN, 2.0]]), torch.tensor([[False, True]])).tolist() == [[0.0, 2.0]]
    low, high = row_min_max(torch.zeros(2, 0), torch.zeros(2, 0).bool())
    assert low.tolist() == high.tolist() == [0.0, 0.0]
