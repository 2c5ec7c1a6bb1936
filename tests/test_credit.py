"""Transforms against the slow reference, against numbers derived by hand, and at the edges."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tokencredit import Chain, Rollouts, Transform
from tokencredit.credit import (
    Above,
    Amplify,
    BatchWhiten,
    Below,
    BoundCredit,
    ColumnCenter,
    ConfidenceBonus,
    EntropyBonus,
    EntropyGradient,
    EntropyReward,
    GroupCenter,
    GroupRelativeOverlong,
    GroupWeight,
    LeaveOneOut,
    LengthMean,
    OptimalTokenBaseline,
    Outcome,
    Overlong,
    PolarityCenter,
    ProxyWeight,
    Redistribute,
    Returns,
    Score,
    Sum,
    Tilt,
    ToGo,
    TokenLeaveOneOut,
    TokenReward,
    TokenSampling,
    TopFraction,
    Weight,
)
from tokencredit.testing import credit_like, rollouts_strategy

DTYPES = st.sampled_from((torch.float64, torch.float32))


def make(reward, entropy=None, mask=None, group=None, **scores):
    """Rollouts from lists; one group and full rows unless said otherwise."""
    entropy = [[0.0]] * len(reward) if entropy is None else entropy
    entropy = torch.tensor(entropy, dtype=torch.float64)
    return Rollouts(
        reward=torch.tensor(reward, dtype=torch.float64),
        group=torch.zeros(len(reward), dtype=torch.long) if group is None else torch.tensor(group),
        mask=torch.ones(entropy.shape, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool),
        scores={"entropy": entropy} | {name: torch.tensor(x, dtype=torch.float64) for name, x in scores.items()},
    )


def run(transform, rollouts, credit=None):
    return transform(
        torch.zeros(rollouts.mask.shape, dtype=rollouts.reward.dtype) if credit is None else credit, rollouts
    )


def close(got, expected, at=None):
    tolerance = at or (1e-5 if got.dtype == torch.float32 else 1e-10)
    torch.testing.assert_close(
        got.double(), torch.as_tensor(expected, dtype=torch.float64).view(got.shape), rtol=tolerance, atol=tolerance
    )


def batches(*scores, rewards="any", **more):
    return DTYPES.flatmap(lambda dtype: rollouts_strategy(scores, rewards=rewards, dtype=dtype, **more))


# Against the reference ------------------------------------------------------------------------------------------------

OF_REWARD = {
    "group": (GroupCenter(), lambda b: reference.group_center(b, b.reward)),
    "ddof 0": (GroupCenter(eps=1e-4, ddof=0), lambda b: reference.group_center(b, b.reward, eps=1e-4, ddof=0)),
    "batch": (GroupCenter(scale="batch"), lambda b: reference.group_center(b, b.reward, scale="batch")),
    "none": (GroupCenter(scale="none"), lambda b: reference.group_center(b, b.reward, scale="none")),
    "leave one out": (LeaveOneOut(), lambda b: reference.leave_one_out(b, b.reward)),
    "overlong": (Overlong(5, 2), lambda b: reference.overlong(b, b.reward, 5, 2)),
    "overlong, rewards of −1 and 1": (
        Overlong(5, 2, penalty=1.0),
        lambda b: reference.overlong(b, b.reward, 5, 2, 1.0),
    ),
    "overlong, a fifth": (Overlong(4), lambda b: reference.overlong(b, b.reward, 4)),
    "relative overlong": (GroupRelativeOverlong(), lambda b: reference.group_relative_overlong(b, b.reward)),
    "both polarities": (
        GroupRelativeOverlong(0.6, punish_failures=True),
        lambda b: reference.group_relative_overlong(b, b.reward, 0.6, True),
    ),
    "dapo's chain": (
        Chain(Overlong(5, 2), GroupCenter()),
        lambda b: reference.group_center(b, reference.overlong(b, b.reward, 5, 2)),
    ),
}


@pytest.mark.parametrize("name", OF_REWARD)
@given(rollouts=batches())
def test_rollout_credit(name, rollouts):
    transform, expected = OF_REWARD[name]
    batch = reference.batch_of(rollouts)
    close(run(Chain(Outcome(), transform), rollouts), batch.rows(expected(batch)))


READINGS = [
    {"level": level, "compare": compare, "mean_of": mean, "scope": scope, "failures": failures}
    for level, compare in (("token", "column"), ("token", "row"), ("token", "matrix"), ("sequence", "column"))
    for mean in ("arithmetic", "geometric")
    for scope in ("group", "batch")
    for failures in (True, False)
]


def shape_of(reading):
    return EntropyReward(alpha=(1.0, 0.3), **{("mean" if k == "mean_of" else k): v for k, v in reading.items()})


@pytest.mark.parametrize("reading", READINGS, ids=lambda r: "-".join(map(str, r.values())))
@given(rollouts=batches("entropy"))
def test_entropy_reward(reading, rollouts):
    expected = reference.entropy_reward(reference.batch_of(rollouts), alpha=(1.0, 0.3), **reading)
    close(run(shape_of(reading), rollouts), expected)


@pytest.mark.parametrize("population", ("all", "within_polarity", "joint"))
@pytest.mark.parametrize("scope", ("group", "batch"))
@pytest.mark.parametrize("level", ("token", "sequence"))
@given(rollouts=batches("entropy"))
def test_polarity_center(level, scope, population, rollouts):
    batch = reference.batch_of(rollouts)
    shaped = reference.entropy_reward(batch, alpha=(1.0, 0.3), level=level, scope=scope)
    expected = reference.polarity_center(batch, shaped, scope, population, level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        center = PolarityCenter(scope=scope, population=population, level=level)
    chain = Chain(EntropyReward(alpha=(1.0, 0.3), level=level, scope=scope), center)
    # Without the zeros a polarity's spread is α₂ times that of entropy ratios, so float32 roundings of 1 weigh more in
    # it.
    close(
        run(chain, rollouts),
        expected,
        at=2e-4 if population == "within_polarity" and rollouts.reward.dtype == torch.float32 else None,
    )


@pytest.mark.parametrize("normalise", ("raw", "min_max", "mean_one", "rank"))
@given(rollouts=batches("x"), seed=st.integers(0, 999))
def test_proxy_weight(normalise, rollouts, seed):
    credit = credit_like(rollouts, seed)
    expected = reference.proxy_weight(reference.batch_of(rollouts), credit.double().tolist(), "x", normalise)
    close(run(ProxyWeight("x", normalise), rollouts, credit), expected)


@given(rollouts=batches("x", "entropy"), seed=st.integers(0, 999), fraction=st.sampled_from((0.01, 0.2, 0.5, 0.8, 1.0)))
def test_top_fraction_entropy_bonus_and_whitening(rollouts, seed, fraction):
    batch, credit = reference.batch_of(rollouts), credit_like(rollouts, seed)
    plain = credit.double().tolist()
    chosen = reference.top_tokens(batch, "x", fraction)
    close(run(TopFraction("x", fraction), rollouts, credit), reference.keep_only(batch, plain, chosen))
    close(
        run(Above("x", fraction), rollouts, credit),
        reference.keep_only(batch, plain, reference.tokens_above(batch, "x", fraction)),
    )
    below = {(i, t) for i, t in batch.everything() if batch.scores["x"][i][t] < fraction}
    close(run(Below("x", fraction), rollouts, credit), reference.keep_only(batch, plain, below))
    close(run(EntropyBonus(), rollouts, credit), reference.entropy_advantage(batch, plain))
    close(run(BatchWhiten(), rollouts, credit), reference.batch_whiten(batch, plain))
    close(run(Score("x"), rollouts, credit), reference.keep_only(batch, batch.scores["x"], batch.everything()))


@pytest.mark.parametrize("alone", ("zero", "own"))
@given(rollouts=batches("logprob", "sum_p2", signed=("logprob",)), seed=st.integers(0, 999))
def test_optimal_token_baseline(alone, rollouts, seed):
    batch, credit = reference.batch_of(rollouts), credit_like(rollouts, seed)
    expected = reference.optimal_token_baseline(batch, credit.double().tolist(), alone)
    close(run(OptimalTokenBaseline(alone), rollouts, credit), expected)


OF_CREDIT = {
    "leave one out, tokens": (TokenLeaveOneOut(), reference.leave_one_out_of_tokens),
    "column": (ColumnCenter(), reference.column_center),
    "returns": (Returns(), reference.returns),
    "returns, discounted": (Returns(0.7), lambda b, c: reference.returns(b, c, 0.7)),
    "to go": (ToGo("x", 0.5, 0.4), lambda b, c: reference.to_go(b, c, "x", 0.5, 0.4)),
    "to go, discounted": (ToGo("x", -2.0, gamma=0.9), lambda b, c: reference.to_go(b, c, "x", -2.0, gamma=0.9)),
    "so far": (
        ToGo("x", 2.0, None, 0.8, past=True),
        lambda b, c: reference.to_go(b, c, "x", 2.0, None, 0.8, past=True),
    ),
    "token reward": (TokenReward("x"), lambda b, c: reference.token_reward(b, c, "x")),
    "token reward, some given": (
        TokenReward(scale=-0.5, gamma=0.9),
        lambda b, c: reference.token_reward(b, c, scale=-0.5, gamma=0.9),
    ),
    "token reward, centred": (
        TokenReward(normalise="center"),
        lambda b, c: reference.token_reward(b, c, normalise="center"),
    ),
    "redistribute": (Redistribute("y"), lambda b, c: reference.redistribute(b, c, "y")),
    "redistribute, all": (Redistribute("y", 1.0), lambda b, c: reference.redistribute(b, c, "y", 1.0)),
    "amplify": (Amplify("x", 0.7, 0.4), lambda b, c: reference.amplify(b, c, "x", 0.7, 0.4)),
    "amplify, unbounded": (
        Amplify("x", 2.0, 3.0, floor=-math.inf),
        lambda b, c: reference.amplify(b, c, "x", 2.0, 3.0, -math.inf),
    ),
    "amplify, from nothing": (
        Amplify("x", 1.0, 1.0, base=0.0),
        lambda b, c: reference.amplify(b, c, "x", 1.0, 1.0, base=0.0),
    ),
    "tilt": (Tilt("x"), lambda b, c: reference.tilt(b, c, "x")),
    "length mean": (LengthMean(), reference.length_mean),
    "top of an outcome": (
        TopFraction("x", 0.3, "row", by_outcome=True),
        lambda b, c: reference.keep_only(b, c, reference.top_by_outcome(b, "x", 0.3)),
    ),
    **{
        f"proxy weight of the group, {how}": (
            ProxyWeight("y", how, "group"),
            lambda b, c, how=how: reference.proxy_weight_of_groups(b, c, "y", how),
        )
        for how in ("raw", "min_max", "mean_one")
    },
    "group weight": (GroupWeight("x"), lambda b, c: reference.group_weight(b, c, "x")),
    "bound": (BoundCredit(0.8), lambda b, c: reference.bound_credit(b, c, 0.8)),
    "confidence": (ConfidenceBonus(), reference.confidence_bonus),
    "confidence, group mean": (
        ConfidenceBonus(0.7, 0.5, "group_mean", True),
        lambda b, c: reference.confidence_bonus(b, c, 0.7, 0.5, "group_mean", True),
    ),
    "confidence, prompt": (
        ConfidenceBonus(prompt="prompt_confidence"),
        lambda b, c: reference.confidence_bonus(b, c, prompt="prompt_confidence"),
    ),
    "entropy gradient": (EntropyGradient(0.3), lambda b, c: reference.entropy_gradient(b, c, 0.3)),
    "entropy gradient, target": (
        EntropyGradient(0.3, target=0.9),
        lambda b, c: reference.entropy_gradient(b, c, 0.3, 0.9),
    ),
    "entropy gradient, difficulty": (
        EntropyGradient(0.3, difficulty=0.6),
        lambda b, c: reference.entropy_gradient(b, c, 0.3, difficulty=0.6),
    ),
    "entropy gradient, past difficulty": (
        EntropyGradient(0.3, difficulty=0.9, rate="past_pass_rate"),
        lambda b, c: reference.entropy_gradient(b, c, 0.3, difficulty=0.9, past=True),
    ),
    "sum": (
        Sum(Chain(Outcome(), GroupCenter()), ToGo("x"), Chain()),
        lambda b, c: reference.add(
            b, reference.add(b, c, b.rows(reference.group_center(b, b.reward))), reference.to_go(b, c, "x")
        ),
    ),
}


MEASURED = ("x", "y", "entropy", "logprob", "prompt_confidence", "past_pass_rate", "token_reward")


@pytest.mark.parametrize("name", OF_CREDIT)
@given(
    rollouts=batches(*MEASURED, signed=("x", "logprob")),
    seed=st.integers(0, 999),
)
def test_token_credit(name, rollouts, seed):
    transform, expected = OF_CREDIT[name]
    credit = credit_like(rollouts, seed)
    close(
        run(transform, rollouts, credit), expected(reference.batch_of(rollouts), credit.nan_to_num().double().tolist())
    )


SAMPLINGS = (
    {"score": "x"},
    {"score": "x", "fraction": 0.7, "power": 0.5, "floor": 0.1, "scope": "group"},
    {"score": "x", "fraction": 0.3, "by_credit": False, "scope": "row"},
    {"score": None, "fraction": 0.5},
)


@pytest.mark.parametrize("settings", SAMPLINGS, ids=str)
@given(rollouts=batches("x", "uniform"), seed=st.integers(0, 999))
def test_token_sampling(settings, rollouts, seed):
    batch, credit = reference.batch_of(rollouts), credit_like(rollouts, seed)
    credit = torch.where(rollouts.mask, credit, 0)
    plain = credit.double().tolist()
    close(TokenSampling(**settings).probability(credit, rollouts), reference.inclusion(batch, plain, **settings))
    close(run(TokenSampling(**settings), rollouts, credit), reference.token_sampling(batch, plain, **settings))


# Identities -----------------------------------------------------------------------------------------------------------


@given(rollouts=batches("x", "entropy"), seed=st.integers(0, 999))
def test_strength_zero_and_fraction_one_are_the_identity(rollouts, seed):
    rollouts = replace(
        rollouts,
        scores={
            **rollouts.scores,
            "logprob": -rollouts.score("x"),
            "uniform": torch.full_like(rollouts.mask, 0.999999, dtype=torch.float64),
        },
    )
    credit = credit_like(rollouts, seed)
    plain = torch.where(rollouts.mask, credit, 0)
    whole = (
        kind("x", 1.0, scope=scope) for kind in (TopFraction, TokenSampling) for scope in ("batch", "group", "row")
    )
    off = (
        *(ToGo("x", 0.0), Returns(0.0), Redistribute("x", 0.0), Amplify("x", 0.0, 0.0), GroupWeight("x", 1.0)),
        *(
            Below("x", math.inf),
            Tilt("x", 0.0, 0.0),
            BoundCredit(math.inf),
            ConfidenceBonus(0.0, score="x"),
            Overlong(3, 2, 0.0),
            Sum(Chain()),
        ),
        EntropyGradient(0.0, score="x"),
    )
    for same in (Weight("x", 0.0), *whole, *off, Above("x", -1.0), Chain()):
        assert torch.equal(run(same, rollouts, credit), plain)
    assert torch.equal(run(EntropyBonus(alpha=0.0), rollouts, credit), plain)
    assert torch.equal(run(Overlong(), rollouts, credit), plain)


@given(rollouts=rollouts_strategy(("entropy",), rewards="binary"), alpha=st.tuples(st.floats(0, 2), st.floats(0, 2)))
def test_proposition_2_2_column_sums(rollouts, alpha):
    """At every position the shaped rewards of the d living successes sum to (α₁+α₂) d, those of the h living failures
    to −(α₁+α₂) h.
    """
    credit = run(EntropyReward(alpha=alpha), rollouts)
    for group in rollouts.group.unique():
        for side, sign in ((rollouts.success, 1), (~rollouts.success, -1)):
            rows = side & (rollouts.group == group)
            close(credit[rows].sum(0), sign * sum(alpha) * rollouts.mask[rows].sum(0).double(), at=1e-9)


@given(rollouts=rollouts_strategy(("entropy",), rewards="binary"))
def test_proposition_b_5_rollout_sums(rollouts):
    """The shaped rewards of the n successes of a group sum to (β₁+β₂) n, those of its m failures to −(β₁+β₂) m."""
    credit = run(EntropyReward(alpha=(0.9, 0.2), level="sequence"), rollouts)
    value = credit.sum(1) / rollouts.length.clamp(min=1)
    for group in rollouts.group.unique():
        for side, sign in ((rollouts.success, 1), (~rollouts.success, -1)):
            rows = side & (rollouts.group == group) & (rollouts.length > 0)
            close(value[rows].sum(), sign * 1.1 * rows.sum().double(), at=1e-9)


@given(
    rollouts=batches("entropy", rewards="binary"),
    compare=st.sampled_from(("column", "row", "matrix")),
    h=st.floats(0.05, 5),
)
def test_uniform_entropy_makes_gtpo_plain(rollouts, compare, h):
    """Equal entropies leave one number per group and polarity, that of its outcome, the same as without entropy (α₂ =
    0) but scaled.
    """
    level = Rollouts(
        rollouts.reward, rollouts.group, rollouts.mask, {"entropy": torch.full_like(rollouts.score("entropy"), h)}
    )
    credit = run(Chain(EntropyReward(compare=compare), PolarityCenter()), level)
    plain = run(Chain(EntropyReward(alpha=(1.1, 0.0)), PolarityCenter()), rollouts)
    close(credit, plain)
    for group in level.group.unique():
        for side, sign in ((level.success, 1), (~level.success, -1)):
            values = credit[side & (level.group == group)][level.mask[side & (level.group == group)]]
            assert values.numel() == 0 or (values.max() - values.min() < 1e-4 and (sign * values >= 0).all())


@given(rollouts=batches("entropy"))
def test_grpo_is_dapo_without_overlong_and_rloo_is_scaled_dr_grpo(rollouts):
    assert torch.equal(
        run(Chain(Outcome(), Overlong(), GroupCenter()), rollouts), run(Chain(Outcome(), GroupCenter()), rollouts)
    )
    size = torch.bincount(rollouts.group_index)[rollouts.group_index][:, None] if len(rollouts) else torch.ones(0, 1)
    centred = run(Chain(Outcome(), GroupCenter(scale="none")), rollouts)
    close(run(Chain(Outcome(), LeaveOneOut()), rollouts), centred.double() * size / (size - 1).clamp(min=1))


# By hand --------------------------------------------------------------------------------------------------------------


def test_gtpo_shaping_by_hand():
    # Successes, H = [[3, 1], [1, 3]]: each column sums to 4 over 2 rollouts, so 3 -> 1 + 0.1 · 3/4 · 2 = 1.15 and 1 ->
    # 1.05.
    close(run(EntropyReward(), make([1, 1], [[3, 1], [1, 3]])), [[1.15, 1.05], [1.05, 1.15]])
    # Failures, H = [[4, 1], [1, 4]]: the inverses 1/4 and 1 sum to 5/4, so 4 -> −1 − 0.1 · (1/4)/(5/4) · 2 = −1.04 and
    # 1 -> −1.16.
    close(run(EntropyReward(), make([0, 0], [[4, 1], [1, 4]])), [[-1.04, -1.16], [-1.16, -1.04]])


def test_grpo_s_shaping_by_hand():
    # Mean entropies 2 and 6 of two successes: 1 + 0.1 · 2 · 2/8 = 1.05 and 1 + 0.1 · 2 · 6/8 = 1.15. Mean entropies 1
    # and 3 of two failures, inverses 1 and 1/3: −1 − 0.1 · 2 · 3/4 = −1.15 and −1 − 0.1 · 2 · 1/4 = −1.05. (The mean of
    # the inverses, rather than the inverse of the mean, would give row 2 a mean of (2 + 2/3)/2 = 4/3 instead of 1.)
    rollouts = make([1, 1, 0, 0], [[1, 3], [6, 6], [0.5, 1.5], [3, 3]])
    close(run(EntropyReward(level="sequence"), rollouts), [[1.05] * 2, [1.15] * 2, [-1.15] * 2, [-1.05] * 2])


def test_gtpo_shaping_with_other_means_by_hand():
    rollouts = make([1, 1], [[4, 1], [1, 1]])
    # geometric: column 0 has √(4 · 1) = 2: 4/2 = 2 and 1/2; column 1 has 1.
    close(run(EntropyReward(mean="geometric"), rollouts), [[1.2, 1.1], [1.05, 1.1]])
    # row: means 2.5 and 1.     matrix: mean 7/4.
    close(run(EntropyReward(compare="row"), rollouts), [[1.16, 1.04], [1.1, 1.1]])
    close(run(EntropyReward(compare="matrix"), rollouts), [[1 + 0.4 / 1.75, 1 + 0.1 / 1.75], [1 + 0.1 / 1.75] * 2])


def test_a_short_rollout_takes_no_part_in_later_columns():
    rollouts = make([1, 1], [[3, 1], [1, 9]], mask=[[1, 1], [1, 0]])
    close(run(EntropyReward(), rollouts), [[1.15, 1.1], [1.05, 0]])  # alone at its position, a token has ratio 1


def test_the_zeros_of_the_other_polarity_belong_to_the_population():
    # One success and one failure, one token each: shaped 1.1 and −1.1. R⁺ = {1.1, 0}: mean 0.55, std 1.1/√2; so
    # ±0.55/(1.1/√2) = ±1/√2.
    close(
        run(Chain(EntropyReward(), PolarityCenter(eps=0.0)), make([1, 0], [[2], [2]])),
        [[math.sqrt(0.5)], [-math.sqrt(0.5)]],
    )


@given(rollouts=rollouts_strategy(("entropy",), rewards="binary"))
def test_within_polarity_erases_the_outcome_and_says_so(rollouts):
    with pytest.warns(UserWarning, match=r"outcome signal is erased.*population=\"all\""):
        center = PolarityCenter(population="within_polarity", eps=0.0)
    credit = run(Chain(EntropyReward(), center), rollouts)
    for group in rollouts.group.unique():
        for side in (rollouts.success, ~rollouts.success):
            close(
                credit[side & (rollouts.group == group)].sum(), 0.0, at=1e-8
            )  # mean zero on both sides: no outcome is left


def test_zeros_included_keeps_the_outcome():
    random = torch.Generator().manual_seed(0)
    entropy = -torch.rand((8, 50), generator=random).log()
    rollouts = make([1, 1, 1, 0, 0, 0, 0, 0], entropy.tolist())
    credit = run(Chain(EntropyReward(), PolarityCenter()), rollouts)
    assert credit[:3].min() > 0.5 and credit[3:].max() < -0.5
    with pytest.warns(UserWarning):
        within = run(Chain(EntropyReward(), PolarityCenter(population="within_polarity")), rollouts)
    assert 0.3 < (within[:3] < 0).double().mean() < 0.7


def test_shaped_reward_clips_by_hand():
    rollouts = make([1, 1, 0], [[3], [1], [1]])  # shaped 1.15, 1.05, −1.1
    close(run(EntropyReward(reward_clip=(1.1, 1.2)), rollouts), [[1.15], [1.1], [-1.1]])  # failures are not clipped
    # H clipped to [0.2, 0.28]: both successes 0.28, so both ratios 1.
    close(run(EntropyReward(entropy_clip=(0.2, 0.28)), rollouts), [[1.1], [1.1], [-1.1]])


def test_overlong_by_hand():
    rollouts = make(
        [1, 1, 1, 1], [[1.0] * 5] * 4, mask=[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    )
    # L = 4, cache 2: lengths 2, 3, 4, 5 -> 0, −1/2, −1, −1, times λ.
    got = run(Chain(Outcome(), Overlong(4, 2, penalty=1.0)), rollouts)
    close(got[:, 0], [1.0, 0.5, 0.0, 0.0])
    close(run(Chain(Outcome(), Overlong(4, 2)), rollouts)[:, 0], [1.0, 0.75, 0.5, 0.5])


def test_dapos_punishment_weighs_what_it_weighs_in_the_paper():
    """A group (correct at the limit of 20, wrong, wrong, correct). The paper's rewards are −1 and 1: 1 − 1, −1, −1, 1,
    mean −1/4, std √(2.75/3) -> 0.261, −0.783, −0.783, 1.306. With 0 and 1 and the same λ = 1 it would be 0, 0, 0, 1.
    """
    mask = [[t < n for t in range(20)] for n in (20, 8, 8, 8)]
    spread = (2.75 / 3) ** 0.5
    paper = [0.25 / spread, -0.75 / spread, -0.75 / spread, 1.25 / spread]
    close(torch.tensor(paper), [0.261116, -0.783349, -0.783349, 1.305582], at=1e-6)
    for reward, penalty, expected in (
        ([1, 0, 0, 1], 0.5, paper),
        ([1, -1, -1, 1], 1.0, paper),
        ([1, 0, 0, 1], 1.0, [-0.5, -0.5, -0.5, 1.5]),
    ):
        chain = Chain(Outcome(), Overlong(20, penalty=penalty), GroupCenter(eps=0.0))
        close(run(chain, make(reward, [[0.0] * 20] * 4, mask=mask))[:, 0], expected)


def lengths(*numbers):
    return [[1] * n + [0] * (6 - n) for n in numbers]


def test_group_relative_overlong_by_hand():
    def punished(reward, *numbers, **settings):
        rollouts = make(reward, [[1.0] * 6] * len(reward), mask=lengths(*numbers))
        return (run(GroupRelativeOverlong(**settings), rollouts))[:, 0]

    # Easy, 3 of 4 right: of the right lengths 1, 2, 5 the mid-range 3 exceeds the mean 8/3; the 5 loses ½ · 2/3, the
    # wrong 5 nothing.
    close(punished([1, 1, 1, 0], 1, 2, 5, 5), [0, 0, -1 / 3, 0])
    # Medium, 3 of 5 right: of all lengths 1, 1, 6, 1, 1 the mid-range 3.5 exceeds the mean 2: the right 6 loses ½ ·
    # 2.5/3.5.
    close(punished([1, 1, 1, 0, 0], 1, 1, 6, 1, 1), [0, 0, -0.5 * 2.5 / 3.5, 0, 0])
    # Medium, half of them right: nobody, or the wrong 4 by ½ · 1.5/2.5.
    close(punished([1, 1, 0, 0], 1, 4, 4, 1), [0, 0, 0, 0])
    close(punished([1, 1, 0, 0], 1, 4, 4, 1, punish_failures=True), [0, 0, -0.3, 0])
    # Hard, 1 of 4 right: nobody.
    close(punished([1, 0, 0, 0], 6, 1, 1, 6, punish_failures=True), [0, 0, 0, 0])


def test_weights_by_hand():
    rollouts = make([1], [[1, 3]])
    ones = torch.ones(1, 2, dtype=torch.float64)
    close(run(Weight("entropy", 0.5), rollouts, ones), [[1.25, 1.75]])  # the mean is 2: 1 + 0.5 · 1/2 and 1 + 0.5 · 3/2
    close(run(ProxyWeight("entropy"), rollouts, ones), [[0.0, 1.0]])
    close(run(ProxyWeight("entropy", "raw"), rollouts, -2 * ones), [[-2.0, -6.0]])
    assert torch.equal(run(ProxyWeight("entropy", "raw"), make([1], [[1, 1]]), ones), ones)
    close(run(ProxyWeight("entropy", "mean_one"), rollouts, ones), [[0.5, 1.5]])
    close(
        run(ProxyWeight("entropy", "rank"), make([1], [[5, 5, 9, 0]]), torch.ones(1, 4).double()),
        [[1.0, 1.0, 1.75, 0.25]],
    )
    # −1 + min(0.4 · 1, 1/2) and −1 + min(0.4 · 3, 1/2).
    close(run(EntropyBonus(), rollouts, -ones), [[-0.6, -0.5]])


def test_sums_along_a_rollout_by_hand():
    # RTO: R = 2, log π_dpo/π_ref = 0.1, 0.5, −0.1 times 0.05, log π/π_ref = 0.05, 0.3, −0.05 times −0.01:
    # r = 0.0045, 0.022, 2 − 0.0045, and their sums from behind.
    rollouts = make([2], [[0, 0, 0]], dpo=[[0.1, 0.5, -0.1]], policy=[[0.05, 0.3, -0.05]], a=[[0.1, 0.3, 0.6]])
    chain = Chain(Outcome(), ToGo("dpo", 0.05, clip=0.05), ToGo("policy", -0.01))
    close(run(chain, rollouts), [[2.022, 2.0175, 1.9955]])
    # The bound comes after the scale: 0.05 · 9 = 0.45 counts as 0.05.
    close(run(ToGo("x", 0.05, 0.05), make([0], [[0, 0]], x=[[1, 9]])), [[0.1, 0.05]])
    # ABC: R = 2, β = 0.8: 0.4 at the end and 1.6 in shares 0.1, 0.3, 0.6: r = 0.16, 0.48, 1.36.
    close(run(Chain(Outcome(), Redistribute("a", 0.8)), rollouts), [[2.0, 1.84, 1.36]])
    # Discounts count tokens, not positions: 1 + ½ · 2 + ¼ · 4, then 2 + ½ · 4.
    gap = make([1], [[0, 0, 0, 0]], mask=[[1, 0, 1, 1]])
    credit = torch.tensor([[1, 9, 2, 4]], dtype=torch.float64)
    close(run(Returns(0.5), gap, credit), [[3.0, 0.0, 4.0, 4.0]])
    close(run(ToGo("x", 1.0, None, 0.5, past=True), make([0], [[0, 0]], x=[[4, 1]])), [[4.0, 3.0]])


def test_no_reward_of_a_token_is_not_a_reward_of_zero():
    # Rewards 1, 0 and 0, none: mean 1/3, deviations 2/3, −1/3, −1/3. Rollout 0 has 2/3 − 1/3 before its second reward;
    # rollout 1 has nothing after its only one. With zeros for what is missing the mean would be 1/4.
    none = math.nan
    rollouts = make([1, 0], [[0, 0, 0]] * 2, mask=[[1, 0, 1], [1, 1, 1]], token_reward=[[1, 7, 0], [0, none, none]])
    close(run(TokenReward(normalise="center"), rollouts), [[1 / 3, 0, -1 / 3], [-1 / 3, 0, 0]])
    std = math.sqrt((4 + 1 + 1) / 9 / 2)
    close(run(TokenReward(eps=0.0), rollouts), [[1 / 3 / std, 0, -1 / 3 / std], [-1 / 3 / std, 0, 0]])
    filled = make([1, 0], [[0, 0, 0]] * 2, mask=[[1, 0, 1], [1, 1, 1]], token_reward=[[1, 7, 0], [0, 0, 0]])
    close(run(TokenReward(normalise="center"), filled)[0], [1 - 0.2 - 0.2, 0, -0.2])
    # As they stand, none and 0 come to the same; where nobody has a reward, nothing is added.
    assert torch.equal(run(ToGo("token_reward"), rollouts), run(ToGo("token_reward"), filled))
    nobody = make([1, 0], [[0, 0]] * 2, token_reward=[[none] * 2] * 2)
    assert torch.equal(run(Chain(Outcome(), TokenReward()), nobody), run(Outcome(), nobody))
    assert rollouts.given("token_reward").tolist() == [[True, False, True], [True, False, False]]
    assert torch.isnan(rollouts.token_reward).tolist() == [[False, True, False], [False, True, True]]


def test_turn_rewards_beside_the_outcome_by_hand():
    """MT-GRPO: two turns of one token; the first turn's rewards are 1 and 0 (z = ±1/√2), the outcomes 0 and 1."""
    none, z = math.nan, 1 / math.sqrt(2)
    rollouts = make([0, 1], [[0, 0]] * 2, token_reward=[[1, none], [0, none]])
    chain = Chain(Outcome(), GroupCenter(eps=0.0), TokenReward(eps=0.0))
    close(run(chain, rollouts), [[z - z, -z], [z - z, z]])


def test_the_advantage_of_prime_by_hand():
    """β q = 0.01, −0.005, 0.015 | −0.02, 0.005: row means 0.02/3 and −0.0075, their mean −0.0004167; G/(G−1) = 2."""
    q = [[0.01, -0.005, 0.015], [-0.02, 0.005, 0.0]]
    rollouts = make([1, 0], [[0, 0, 0]] * 2, mask=[[1, 1, 1], [1, 1, 0]], q=q)
    tokens = [[0.020833, -0.009167, 0.030833], [-0.039167, 0.010833, 0.0]]
    close(run(Chain(Score("q"), TokenLeaveOneOut()), rollouts), tokens, at=1e-5)
    to_go = [[0.0425, 0.021667, 0.030833], [-0.028333, 0.010833, 0.0]]
    close(run(Chain(Score("q"), TokenLeaveOneOut(), Returns()), rollouts), to_go, at=1e-5)


def test_column_center_by_hand():
    # Means 0.25 and 0.25 where both live; alone, nothing stays.
    rollouts = make([1, 0], [[0, 0, 0]] * 2, mask=[[1, 1, 1], [1, 1, 0]], x=[[0.5, 0.25, 0.1], [0.0, 0.25, 7.0]])
    close(run(Chain(Score("x"), ColumnCenter()), rollouts), [[0.25, 0.0, 0.0], [-0.25, 0.0, 0.0]])
    chain = Chain(Sum(Chain(Outcome(), GroupCenter(scale="none")), Chain(ToGo("x", past=True), ColumnCenter())))
    # So far 0.5, 0.75, 0.85 | 0, 0.25: against the column ±0.25, ±0.25, 0, beside ±1/2 of the outcome.
    close(run(chain, rollouts), [[0.75, 0.75, 0.5], [-0.75, -0.75, 0.0]])


def test_amplified_bounded_and_group_weights_by_hand():
    rollouts = make([1], [[0] * 4], m=[[1, 1, 0, 0]])
    credit = torch.tensor([[1, -1, 1, -1]], dtype=torch.float64)
    close(run(Amplify("m", 0.2, 0.2), rollouts, credit), [[1.2, -0.8, 1.0, -1.0]])  # A + 0.2 |A| m
    # TGDPO's weights may turn a token, 1 − 2 · 1 = −1; floor = 0 stops at 0.
    close(run(Amplify("m", 2, 2, floor=-math.inf), rollouts, credit), [[3.0, 1.0, 1.0, -1.0]])
    close(run(Amplify("m", 2, 2), rollouts, credit), [[3.0, 0.0, 1.0, -1.0]])
    # 0, 0, 0, 4: mean 1, std √((3 + 9)/3) = 2.
    credit = torch.tensor([[0, 0, 0, 4]], dtype=torch.float64)
    close(run(BoundCredit(1.0), rollouts, credit), [[0.0, 0.0, 0.0, 2.0]])
    # Scores 0, 1, 4 in the group: 1, 1 + 0.7/4, 1.7.
    pair = make([1, 0], [[0, 0]] * 2, mask=[[1, 1], [1, 0]], d=[[0, 1], [4, 9]])
    close(run(GroupWeight("d", 1.7), pair, torch.ones(2, 2).double()), [[1.0, 1.175], [1.7, 0.0]])


ARM = [[-0.1, -2.0, -0.1, -1.0], [-0.05, -0.5, -0.05, -3.0]]


def test_confidence_bonus_by_hand():
    """The two least likely of four tokens: c = exp(−1.5) and exp(−1.75); c(q) = exp(−0.8); A = ±√½."""
    said = {"logprob": ARM, "prompt_confidence": [[math.exp(-0.8)] * 4] * 2}
    mixed, right = make([1, 0], [[0] * 4] * 2, **said), make([1, 1], [[0] * 4] * 2, **said)
    chain = Chain(Outcome(), GroupCenter(eps=0.0), ConfidenceBonus(0.3, 0.5, "prompt_confidence"))
    close(run(chain, mixed)[:, 0], [0.774966, -0.624440], at=1e-6)
    assert not run(chain, right).any()
    everyone = ConfidenceBonus(0.3, 0.5, "prompt_confidence", all_correct=True)
    close(run(everyone, right)[:, 0], [0.067860, 0.082667], at=1e-5)
    close(run(ConfidenceBonus(0.3, 0.5), mixed)[:, 0], [-0.3 * math.exp(-1.5), -0.3 * math.exp(-1.75)])
    middle = 0.3 * (math.exp(-1.75) - math.exp(-1.5)) / 2
    close(run(ConfidenceBonus(0.3, 0.5, "group_mean"), mixed)[:, 0], [middle, -middle])
    assert ConfidenceBonus().needs == {"logprob"}
    assert everyone.needs == {"logprob", "prompt_confidence"}


def test_the_entropy_gradient_is_the_gradient_of_the_entropy():
    """Exactly, summed over the three actions of a policy: Σ π(a) (−log π(a) − H) ∇log π(a) = ∇H."""
    logits = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    expected = torch.autograd.grad(entropy, logits, retain_graph=True)[0]
    scores = {"entropy": [[entropy.item()]] * 3, "logprob": logp.detach()[:, None].tolist()}
    credit = run(EntropyGradient(1.0), make([0, 0, 0], **scores))[:, 0]
    got = torch.autograd.grad((logp.exp().detach() * credit * logp).sum(), logits)[0]
    close(got, expected)
    assert abs((logp.exp() * credit).sum()) < 1e-12  # a term of mean zero


def test_entropy_gradient_by_hand():
    rollouts = make([1, 0, 0, 0], [[1.0, 1.0]] * 4, logprob=[[-3.0, -0.5]] * 4)
    close(run(EntropyGradient(0.1), rollouts)[0], [0.2, -0.05])
    # A share of successes of 1/4 against ρ = 1/2: λ = 1/2; against ρ = 1/4 or less: 0.
    close(run(EntropyGradient(0.1, difficulty=0.5), rollouts)[0], [0.1, -0.025])
    assert not run(EntropyGradient(0.1, difficulty=0.25), rollouts).any()
    # The prompt had 3/8 before, against ρ = 1/2: λ = 1/4, whatever the group shows; a harder prompt keeps all.
    past = make([1, 0], [[1.0, 1.0]] * 2, logprob=[[-3.0, -0.5]] * 2, past_pass_rate=[[0.375] * 2, [0.0] * 2])
    found = run(EntropyGradient(0.1, difficulty=0.5, rate="past_pass_rate"), past)
    close(found, [[0.05, -0.0125], [0.2, -0.05]])
    # Above the target nothing is added; at it, everything.
    assert not run(EntropyGradient(0.1, target=0.99), rollouts).any()
    close(run(EntropyGradient(0.1, target=1.0), rollouts)[0], [0.2, -0.05])


def test_group_credit_by_hand():
    # Rewards 1, 0, 0, 1: mean 1/2, std (ddof 1) √(1/3).
    rollouts = make([1, 0, 0, 1])
    close(
        run(Chain(Outcome(), GroupCenter(eps=0.0)), rollouts)[:, 0],
        [3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2, 3**0.5 / 2],
    )
    close(run(Chain(Outcome(), LeaveOneOut()), rollouts)[:, 0], [2 / 3, -2 / 3, -2 / 3, 2 / 3])  # 1 − (0 + 0 + 1)/3


# Edges ----------------------------------------------------------------------------------------------------------------


def test_the_floor_bounds_the_inverse_and_nothing_else():
    high = make([0, 0, 1], [[0.05, 0.4], [2.0, 0.05], [0.05, 1.0]])
    for mean in ("arithmetic", "geometric"):
        close(run(EntropyReward(mean=mean), high), run(EntropyReward(mean=mean, floor=1e-9), high))
        certain = run(
            EntropyReward(mean=mean, level="token"),
            make([0, 0, 1, 1], [[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [0.0, 3.0]]),
        )
        assert torch.isfinite(certain).all() and (certain[:2] >= -1 - 0.1 * 15).all()
    # A high floor bounds H from below, never 1/H: entropies above it count as they are.
    close(run(EntropyReward(mean="geometric", floor=0.5), make([0, 0], [[4], [16]])), [[-1 - 0.1 * 2], [-1 - 0.1 / 2]])
    with pytest.raises(ValueError, match=r"floor must be positive.*0"):
        EntropyReward(floor=0.0)


@given(rollouts=rollouts_strategy(("entropy",)))
def test_entropies_that_are_all_zero_are_uniform(rollouts):
    certain = Rollouts(
        rollouts.reward, rollouts.group, rollouts.mask, {"entropy": torch.zeros_like(rollouts.score("entropy"))}
    )
    for mean in ("arithmetic", "geometric"):
        lost = rollouts.mask & ~rollouts.success[:, None]
        close(run(EntropyReward(mean=mean), certain)[lost], torch.full((int(lost.sum()),), -1.1, dtype=torch.float64))
        won = rollouts.mask & rollouts.success[:, None]
        close(run(EntropyReward(mean=mean), certain)[won], (rollouts.reward[:, None] + 0.1).expand_as(won)[won])


GROUP_CHAINS = [
    Chain(Outcome(), GroupCenter()),
    Chain(Outcome(), GroupCenter(eps=0.0)),
    Chain(Outcome(), GroupCenter(scale="batch")),
    Chain(Outcome(), GroupCenter(scale="none")),
    Chain(Outcome(), LeaveOneOut()),
    Chain(Outcome(), GroupCenter(), EntropyBonus()),
    Chain(EntropyReward(), PolarityCenter(eps=0.0)),
    Chain(EntropyReward(), PolarityCenter(scope="batch")),
    Chain(EntropyReward(level="sequence"), PolarityCenter(level="sequence", eps=0.0)),
    Chain(EntropyReward(failures=False), PolarityCenter(population="joint", eps=0.0)),
]


@pytest.mark.parametrize("chain", GROUP_CHAINS, ids=repr)
@given(rollouts=batches("entropy"))
def test_equal_rewards_and_groups_of_one_get_nothing(chain, rollouts):
    silent = ~rollouts.informative
    alone = (torch.bincount(rollouts.group_index) == 1)[rollouts.group_index] if len(rollouts) else silent
    assert (silent | ~alone).all()
    assert (run(chain, rollouts)[silent] == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_large_group_of_equal_rewards_has_no_spread(dtype):
    """0.1 added up thousands of times is not thousands times 0.1: the rounding must not be blown up to unit
    variance.
    """
    num_rows, width = 3000, 40
    lengths = torch.arange(num_rows) % width + 1
    reward, group = torch.full((num_rows,), 0.1, dtype=dtype), torch.zeros(num_rows, dtype=torch.long)
    rollouts = Rollouts(reward, group, torch.arange(width) < lengths[:, None])
    for chain in (
        Chain(Outcome(), GroupCenter(eps=0.0)),
        Chain(Outcome(), LeaveOneOut()),
        Chain(Outcome(), BatchWhiten(eps=0.0)),
    ):
        assert (run(chain, rollouts) == 0).all()


def test_a_polarity_without_tokens_gives_no_contrast():
    # The failure was truncated and masked out: what is left are successes that differ in entropy only.
    rollouts = make([1, 1, 0], [[3, 1], [1, 2], [1, 1]], mask=[[1, 1], [1, 1], [0, 0]])
    assert rollouts.mixed.all() and not rollouts.comparable.any()
    for level in ("token", "sequence"):
        for scope in ("group", "batch"):
            chain = Chain(EntropyReward(level=level, scope=scope), PolarityCenter(level=level, scope=scope))
            assert (run(chain, rollouts) == 0).all()
    # GRPO still compares with the failure's reward: only the contrast of shaped token rewards is gone.
    assert (run(Chain(Outcome(), GroupCenter()), rollouts)[:2] > 0).all()


def test_batch_scope_compares_across_prompts_and_leaves_out_groups_without_contrast():
    entropy = [[3.0], [1.0], [1.0], [1.0], [50.0]]
    rollouts = make([1, 0, 1, 0, 1], entropy, group=[0, 0, 1, 1, 2])
    shaped = run(EntropyReward(scope="batch"), rollouts)
    # The successes of groups 0 and 1 share their mean entropy 2; the 50 of group 2 does not count.
    close(shaped[:, 0], [1.15, -1.1, 1.05, -1.1, 1.1])
    assert (run(Chain(EntropyReward(scope="batch"), PolarityCenter(scope="batch")), rollouts)[4] == 0).all()


def test_entropy_never_carries_a_gradient():
    entropy = torch.rand(4, 3, requires_grad=True)
    mask, scores = torch.ones(4, 3, dtype=torch.bool), {"entropy": entropy * 2}
    rollouts = Rollouts(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.zeros(4, dtype=torch.long), mask, scores)
    assert not rollouts.score("entropy").requires_grad
    for chain in (*GROUP_CHAINS, Chain(Outcome(), Weight("entropy"), ProxyWeight("entropy"), TopFraction("entropy"))):
        assert not run(chain, rollouts).requires_grad


def test_top_fraction_ties_and_scopes():
    rollouts = make([1, 1], [[1, 2, 2, 3], [9, 9, 9, 9]])
    select = lambda fraction, scope: TopFraction("entropy", fraction, scope).select(rollouts).int().tolist()  # noqa: E731
    assert select(0.5, "batch") == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert select(0.5, "row") == [[0, 1, 1, 1], [1, 1, 1, 1]]  # the second largest of 1 2 2 3 is 2, and both are kept
    assert select(0.25, "row") == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert select(1e-9, "batch") == [[0, 0, 0, 0], [1, 1, 1, 1]]
    # ⌈0.07 · 100⌉ is 7, although 0.07 · 100 is 7.000000000000001 in binary.
    assert TopFraction("entropy", 0.07).select(make([1], [list(range(100))])).sum() == 7


def test_above_keeps_what_is_marked():
    """Marks 1 0 1 and a score at the threshold: only what exceeds it is kept. A batch without a mark has no credit."""
    assert run(Above("x"), make([1], [[0, 0, 0]], x=[[1, 0, 1]]), torch.tensor([[2.0, 3.0, -4.0]])).tolist() == [
        [2, 0, -4]
    ]
    assert Above("x", 0.5).select(make([1], [[0, 0]], x=[[0.5, 0.6]])).tolist() == [[False, True]]
    assert Below("x", 0.5).select(make([1], [[0, 0, 0]], x=[[0.5, 0.4, 0.6]])).tolist() == [[False, True, False]]
    assert not run(Above("x"), make([1], [[0, 0]], x=[[0, 0]]), torch.ones(1, 2)).any()


def test_optimal_token_baseline_by_hand():
    """π and Σπ² of two tokens: π = 1/2 of two equal tokens has ‖s‖² = 1 − 1 + 1/2 = 1/2; a certain token 1 − 2 + 1 = 0;
    π = 1/2, Σπ² = 3/8 (1/2, 1/4, 1/4) 3/8. Rewards 1, 0, 0: at the first token W = 1/2, 0, 3/8, so B = (1/2)/(7/8) =
    4/7. At the second W = 1/2 + 0, and 0 + 1/2 for the second rollout, the third has ended: B = 1/2. At the third the
    first is alone: B = 0.
    """
    half, sure = math.log(0.5), 0.0
    logprob = [[half, sure, half], [sure, half, 0], [half, 0, 0]]
    sum_p2 = [[0.5, 1, 0.5], [1, 0.5, 0], [0.375, 0, 0]]
    mask = [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    rollouts = make([1, 0, 0], [[0] * 3] * 3, mask, logprob=logprob, sum_p2=sum_p2)
    close(run(Chain(Outcome(), OptimalTokenBaseline()), rollouts), [[3 / 7, 0.5, 1], [-4 / 7, -0.5, 0], [-4 / 7, 0, 0]])
    close(
        run(Chain(Outcome(), OptimalTokenBaseline("own")), rollouts),
        [[3 / 7, 0.5, 0], [-4 / 7, -0.5, 0], [-4 / 7, 0, 0]],
    )


def test_optimal_token_baseline_where_nothing_is_uncertain_or_rewards_are_equal():
    """Certain tokens have no weight: the mean is plain. Equal rewards leave exactly 0 where a sibling is alive."""
    certain = {"logprob": [[0, 0], [0, 0]], "sum_p2": [[1, 1], [1, 1]]}
    close(
        run(Chain(Outcome(), OptimalTokenBaseline()), make([1, 0], [[0, 0]] * 2, **certain)), [[0.5, 0.5], [-0.5, -0.5]]
    )
    mixed = {"logprob": [[-0.1, -2], [-1, -0.3]], "sum_p2": [[0.8, 0.3], [0.4, 0.6]]}
    assert not run(Chain(Outcome(), OptimalTokenBaseline()), make([0.3, 0.3], [[0, 0]] * 2, **mixed)).any()
    single = make([1], [[0, 0]], logprob=[[-1, -1]], sum_p2=[[0.5, 0.5]])
    assert run(Chain(Outcome(), OptimalTokenBaseline()), single).tolist() == [[1, 1]]
    assert run(Chain(Outcome(), OptimalTokenBaseline("own")), single).tolist() == [[0, 0]]


def test_token_sampling_by_hand():
    """Four tokens, credit 1, x = 6, 2, 1, 1, a budget of half of them, 2. Equal shares would give the first 2 · 6/10 >
    1, so it is certain and the others share 1 by x: 1/2, 1/4, 1/4. With φ = 0.2: 4 · (0.5 − 0.2)/0.8 = 1.5 beside the
    floor, by x 0.9, 0.3, 0.15, 0.15.
    """
    rollouts = make([1], [[0] * 4], x=[[6, 2, 1, 1]], uniform=[[0.9, 0.4, 0.26, 0.2]])
    credit = torch.ones(1, 4, dtype=torch.float64)
    close(TokenSampling("x", 0.5, floor=1e-9).probability(credit, rollouts), [[1, 0.5, 0.25, 0.25]], at=1e-8)
    close(run(TokenSampling("x", 0.5, floor=1e-9), rollouts, credit), [[1, 2, 0, 4]], at=1e-7)
    close(TokenSampling("x", 0.5, floor=0.2).probability(credit, rollouts), [[0.92, 0.44, 0.32, 0.32]])


def test_token_sampling_where_there_is_nothing_to_tell_tokens_apart_or_too_little():
    """No credit; no score; fewer tokens with a score than the budget holds: those are certain, the others have 2.8 − 1
    between them.
    """
    rollouts = make([1], [[0] * 4], x=[[3, 0, 0, 0]], uniform=[[0.5] * 4], zero=[[0] * 4])
    credit = torch.ones(1, 4, dtype=torch.float64)
    assert not run(TokenSampling("x"), rollouts).any()
    close(TokenSampling("zero", 0.3).probability(credit, rollouts), [[0.3] * 4])
    close(TokenSampling("x", 0.7, floor=0.1).probability(credit, rollouts), [[1, 0.6, 0.6, 0.6]])
    only = torch.tensor(
        [[2.0, 0, -2.0, 0]], dtype=torch.float64
    )  # tokens without credit are not drawn and take nothing of the budget
    close(TokenSampling(fraction=0.5, scope="row").probability(only, rollouts), [[0.5, 0, 0.5, 0]])


@pytest.mark.parametrize("settings", SAMPLINGS, ids=str)
@given(rollouts=rollouts_strategy(("x", "uniform")), seed=st.integers(0, 999))
def test_token_sampling_is_unbiased_and_keeps_its_budget(settings, rollouts, seed):
    """The mean over u, by a grid of n points, is the credit to within |c|/(n q); Σ q is the budget."""
    credit, n = torch.where(rollouts.mask, credit_like(rollouts, seed), 0), 100
    sampling = TokenSampling(**settings)
    q = sampling.probability(credit, rollouts)
    total = torch.zeros_like(credit)
    for k in range(n):
        u = torch.full_like(credit, (k + 0.5) / n)
        total += run(sampling, replace(rollouts, scores={**rollouts.scores, "uniform": u}), credit)
    assert ((total / n - credit).abs() <= credit.abs() / (n * q.clamp(min=sampling.floor)) + 1e-9).all()
    assert (q[credit != 0] >= sampling.floor).all() and (q <= 1).all()
    assert float(q.sum()) == pytest.approx(sampling.fraction * int((credit != 0).sum()), abs=0.02)


def test_token_sampling_by_gradient_norm_has_the_least_variance():
    """Var = Σ c²‖g‖² (1/q − 1). With x = ‖g‖ no shift of probability between two tokens lowers it; any other power has
    more.
    """
    random = torch.Generator().manual_seed(0)
    norm = torch.rand(1, 30, generator=random, dtype=torch.float64).square() + 0.01
    credit = torch.randn(1, 30, generator=random, dtype=torch.float64)
    rollouts = make([1], [[0] * 30], x=norm.tolist(), uniform=[[0.5] * 30])
    square = (credit * norm).square()
    variance = lambda q: float((square * (1 / q - 1)).sum())  # noqa: E731
    q = {
        power: TokenSampling("x", 0.3, power, floor=1e-9).probability(credit, rollouts)
        for power in (0.0, 0.5, 1.0, 2.0)
    }
    assert all(float(p.sum()) == pytest.approx(9) for p in q.values())
    assert all(variance(q[1.0]) < 0.95 * variance(q[power]) for power in (0.0, 0.5, 2.0))
    for i in range(30):
        for j in range(30):
            moved = q[1.0].clone()
            step = min(1e-3, float(1 - moved[0, i]), float(moved[0, j]) / 2)
            moved[0, i], moved[0, j] = moved[0, i] + step, moved[0, j] - step
            assert i == j or variance(moved) >= variance(q[1.0]) - 1e-9


@given(rollouts=rollouts_strategy(("x",)))
def test_a_rows_scope_is_a_group_per_row(rollouts):
    apart = Rollouts(rollouts.reward, torch.arange(len(rollouts)), rollouts.mask, rollouts.scores)
    assert torch.equal(TopFraction("x", 0.3, "row").select(rollouts), TopFraction("x", 0.3, "group").select(apart))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_degenerate_groups_of_the_parts_per_token(dtype):
    """An empty rollout, a group of one, equal credit and equal scores."""
    mask = [[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]]
    third = [[0.1, 0.7, 0.3]] * 4
    rollouts = make([1, 0, 0, 1], [[1] * 3] * 4, mask=mask, group=[0, 0, 0, 5], logprob=[[-0.5] * 3] * 4, x=third)
    rollouts = Rollouts(
        rollouts.reward.to(dtype),
        rollouts.group,
        rollouts.mask,
        {name: x.to(dtype) for name, x in rollouts.scores.items()},
    )
    equal = torch.full((4, 3), 0.1, dtype=dtype)
    for part in (TokenLeaveOneOut(), ColumnCenter()):
        assert not run(part, rollouts, equal).any()  # exactly: a whitening after it has nothing to blow up
    assert not run(ColumnCenter(), rollouts, rollouts.score("x")).any()  # equal in every column
    assert not run(TokenLeaveOneOut(), rollouts, rollouts.score("x"))[3].any()  # alone
    kept = torch.where(rollouts.mask, equal, 0)
    nothing = Rollouts(rollouts.reward, rollouts.group, rollouts.mask, {"x": torch.zeros(4, 3)})
    assert torch.equal(run(Redistribute("x"), nothing, equal), kept)
    assert torch.equal(run(GroupWeight("entropy"), rollouts, equal), kept)
    assert torch.equal(run(BoundCredit(), rollouts, equal), kept)
    # No success, or no failure, in the group: no bonus; the empty rollout is in no mean.
    assert torch.equal(run(ConfidenceBonus(), rollouts, equal)[3], kept[3])
    level = run(ConfidenceBonus(prompt="group_mean"), rollouts, equal)
    torch.testing.assert_close(level, kept)


def test_bad_settings_are_refused_by_name():
    for build, message in (
        (lambda: ProxyWeight("x", "rank", "group"), r"ProxyWeight ranks within rollouts only"),
        (lambda: Tilt("x", 1.0, 0.0), r"Tilt needs low <= high, got low=1.0, high=0.0"),
        (lambda: ToGo("x", clip=0.0), r"ToGo.clip must be positive or None, got 0.0"),
        (lambda: ToGo("x", gamma=1.1), r"ToGo.gamma must be in \[0, 1\], got 1.1"),
        (lambda: Returns(-0.1), r"Returns.gamma must be in \[0, 1\], got -0.1"),
        (lambda: Redistribute("x", 1.5), r"Redistribute.share must be in \[0, 1\], got 1.5"),
        (lambda: GroupWeight("x", 0.9), r"GroupWeight.high must be at least 1"),
        (lambda: BoundCredit(0.0), r"BoundCredit.k must be positive"),
        (lambda: ConfidenceBonus(prompt="mean"), r"ConfidenceBonus.prompt must be one of 'none', 'group_mean'"),
        (lambda: ConfidenceBonus(fraction=0.0), r"ConfidenceBonus.fraction must be in \(0, 1\], got 0.0"),
        (lambda: EntropyGradient(rate="past"), r"EntropyGradient.rate must be one of 'group', 'past_pass_rate', got"),
        (lambda: EntropyGradient(difficulty=0.0), r"EntropyGradient.difficulty must be positive or None"),
        (lambda: Overlong(10, 2, -1.0), r"Overlong.penalty must not be negative"),
        (lambda: GroupCenter(scale="rows"), r"GroupCenter.scale must be one of 'group', 'batch', 'none', got 'rows'"),
        (lambda: EntropyReward(compare="col"), r"EntropyReward.compare must be one of 'column'"),
        (lambda: PolarityCenter(population="zeros"), r"PolarityCenter.population must be one of 'all'"),
        (lambda: ProxyWeight("x", "softmax"), r"ProxyWeight.normalise must be one of"),
        (lambda: TopFraction("x", 0.0), r"TopFraction.fraction must be in \(0, 1\], got 0.0"),
        (lambda: TopFraction("x", scope="prompt"), r"TopFraction.scope must be one of"),
        (lambda: OptimalTokenBaseline("tail"), r"OptimalTokenBaseline.alone must be one of 'zero', 'own', got 'tail'"),
        (lambda: TokenSampling(scope="token"), r"TokenSampling.scope must be one of"),
        (
            lambda: TokenSampling(fraction=0.1, floor=0.2),
            r"TokenSampling needs 0 < floor <= fraction <= 1, got floor=0.2, fraction=0.1",
        ),
        (lambda: TokenSampling(power=-1), r"TokenSampling.power must not be negative"),
        (lambda: EntropyBonus(kappa=1.0), r"EntropyBonus.kappa must exceed 1"),
        (lambda: EntropyBonus(alpha=-0.1), r"EntropyBonus.alpha must not be negative"),
        (lambda: Overlong(10, 11), r"Overlong needs 0 < cache <= max_length, got cache=11, max_length=10"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_laws_follow_the_settings():
    assert "group_local" in EntropyReward().laws and "group_local" not in EntropyReward(scope="batch").laws
    assert "group_local" in PolarityCenter().laws and "group_local" not in PolarityCenter(scope="batch").laws
    assert "keeps_sign" in Weight("x").laws and "keeps_sign" not in Weight("x", -1.0).laws
    assert "keeps_sign" in Amplify("x").laws and "keeps_sign" not in Amplify("x", floor=-1.0).laws
    assert EntropyGradient().laws == {"row_local", "group_local"} and EntropyGradient(target=1.0).laws == frozenset()
    assert EntropyGradient(difficulty=0.5).laws == {"group_local"}
    remembered = EntropyGradient(difficulty=0.5, rate="past_pass_rate")
    assert remembered.laws == {"row_local", "group_local"}
    assert remembered.needs == {"entropy", "logprob", "past_pass_rate"}
    with pytest.raises(ValueError, match="is of difficulty, which is None"):
        EntropyGradient(rate="past_pass_rate")
    assert Sum(Outcome(), GroupCenter()).laws == {"group_local"} and "keeps_sign" in Sum(Weight("x")).laws
    assert Chain(Outcome(), GroupCenter()).laws == {"group_local"}
    assert Chain(ProxyWeight("x", "rank"), TopFraction("x", scope="row")).laws == {
        "keeps_sign",
        "row_local",
        "group_local",
    }


def test_a_transform_needs_an_apply_and_the_right_shape():
    rollouts = make([1.0], [[1, 2]])
    with pytest.raises(TypeError, match=r"Transform does not define apply\(self, credit, rollouts\)"):
        run(Transform(), rollouts)
    with pytest.raises(ValueError, match=r"credit must be \[B, T\] = \[1, 2\], got shape \[1, 3\]"):
        Chain()(torch.zeros(1, 3), rollouts)
    with pytest.raises(KeyError, match=r'needs the score "x"; these rollouts have: entropy'):
        run(Score("x"), rollouts)
