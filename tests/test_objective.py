"""Surrogates and aggregates against the slow reference and its hand-derived gradients, identities, and the selections
over a batch.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tokencredit import METHODS, Chain, Method, Plan, Rollouts
from tokencredit.credit import GroupCenter, Outcome, TopFraction
from tokencredit.objective import (
    CISPO,
    GPPO,
    SAPO,
    Aggregate,
    Clip,
    ClipCov,
    HybridClip,
    KLCov,
    LogProb,
    LowEntropyKL,
    SelectedMean,
    SequenceClip,
    SequenceMean,
    SequenceSum,
    Surrogate,
    TokenMean,
    covariance,
)
from tokencredit.testing import credit_like, logprobs_like, rollouts_strategy

SEEDS = st.integers(0, 9999)
WEIGHTS = {
    "token": TokenMean(),
    "sequence": SequenceMean(),
    "sum": SequenceSum(),
    "selected": SelectedMean(TopFraction("entropy", 0.2)),
}
TOKEN_RULES = {
    LogProb(): (reference.log_prob, {}),
    Clip(): (reference.clip, {}),
    Clip(0.1, 0.5): (reference.clip, {"low": 0.1, "high": 0.5}),
    Clip(dual=1.5): (reference.clip, {"dual": 1.5}),
    CISPO(): (reference.cispo, {}),
    CISPO(1.2, 0.9): (reference.cispo, {"cap": 1.2, "floor": 0.9}),
    SAPO(): (reference.sapo, {}),
    SAPO(2.0, 0.5): (reference.sapo, {"positive": 2.0, "negative": 0.5}),
    GPPO(): (reference.ce_gppo, {}),
    GPPO((0.75, 0.9), 0.1, 0.3, dual=1.5): (
        reference.ce_gppo,
        {"beta": (0.75, 0.9), "low": 0.1, "high": 0.3, "dual": 1.5},
    ),
    ClipCov(0.3, (0.0, 9.0), 0.2, 0.2): (reference.clip_cov, {"low": 0.2, "high": 0.2}),
    KLCov(0.3, 0.7): (reference.kl_cov, {"beta": 0.7}),
}
SEQUENCE_RULES = {
    SequenceClip(0.1, 0.2): {},
    SequenceClip(0.1, 0.2, mean="arithmetic"): {"mean_of": "arithmetic"},
    SequenceClip(0.1, 0.2, token=True): {"token": True},
    SequenceClip(0.1, 0.2, mean="arithmetic", token=True): {"mean_of": "arithmetic", "token": True},
}


WITH_ENTROPY = {
    LowEntropyKL(0.6, 0.3, (0.7, 0.2, 0.4)): (reference.low_entropy_kl, {}),
    LowEntropyKL(1.0, 0.1, (0.7, 0.0, 0.4), 0.2, 0.2): (reference.low_entropy_kl, {"low": 0.2, "high": 0.2}),
}
RANGES = {"seq_low": 0.1, "seq_high": 0.2}
HYBRIDS = {
    HybridClip(): {},
    HybridClip(mix="entropy"): {"mix": "entropy"},
    **{
        HybridClip(mix=mix, outer=outer, **RANGES): RANGES | {"mix": mix, "outer": outer}
        for mix in (0.0, 0.3, 1.0, "entropy")
        for outer in ("min_of_mixes", "mix_of_mins", "mix_of_clips")
    },
}


def method(surrogate, aggregate=None):
    return Method("test", Chain(Outcome(), GroupCenter()), surrogate, aggregate or TokenMean())


def loss_and_gradient(one, rollouts, credit, logprob, old, plan=None):
    leaf = logprob.clone().requires_grad_()
    loss, stats = one.loss(logprob=leaf, old_logprob=old, credit=credit, rollouts=rollouts, plan=plan)
    loss.backward()
    return loss.detach(), leaf.grad, stats


def close(got, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64).view(got.shape)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def plain(*tensors):
    return [x.double().tolist() for x in tensors]


def one_group(mask, **scores):
    """Rollouts of one group around a mask; rewards do not matter to a loss."""
    return Rollouts(torch.zeros(len(mask), dtype=torch.float64), torch.zeros(len(mask), dtype=torch.long), mask, scores)


# Against the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("surrogate", [*TOKEN_RULES, *WITH_ENTROPY], ids=repr)
@given(data=st.data(), seed=SEEDS, how=st.sampled_from(sorted(WEIGHTS)))
def test_token_surrogates(surrogate, dtype, data, seed, how):
    rollouts = data.draw(rollouts_strategy(("entropy",), dtype=dtype))
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    one = method(surrogate, WEIGHTS[how])
    plan = one.plan(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts)
    chosen = reference.planned(plan)
    rule, constants = (TOKEN_RULES | WITH_ENTROPY)[surrogate]
    batch = reference.batch_of(rollouts)
    expected = reference.token_losses(
        batch, rule, *plain(logprob, old, credit), reference.aggregate(batch, how), chosen, **constants
    )
    loss, gradient, _ = loss_and_gradient(one, rollouts, credit, logprob, old, plan)
    close(loss, expected[0], 1e-10 if dtype == torch.float64 else 1e-5)
    close(gradient, expected[1], 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("surrogate", SEQUENCE_RULES, ids=repr)
@given(data=st.data(), seed=SEEDS, how=st.sampled_from(sorted(WEIGHTS)))
def test_sequence_surrogates(surrogate, dtype, data, seed, how):
    rollouts = data.draw(rollouts_strategy(("entropy",), dtype=dtype))
    credit, (logprob, old) = credit_like(rollouts, seed, constant=not surrogate.token), logprobs_like(rollouts, seed)
    one, batch = method(surrogate, WEIGHTS[how]), reference.batch_of(rollouts)
    weights = reference.aggregate(batch, how)
    expected = reference.sequence_losses(
        batch, *plain(logprob, old, credit), weights, 0.1, 0.2, **SEQUENCE_RULES[surrogate]
    )
    loss, gradient, _ = loss_and_gradient(one, rollouts, credit, logprob, old)
    close(loss, expected[0], 1e-10 if dtype == torch.float64 else 1e-5)
    close(gradient, expected[1], 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("surrogate", HYBRIDS, ids=repr)
@given(data=st.data(), seed=SEEDS, how=st.sampled_from(sorted(WEIGHTS)))
def test_hybrid_surrogates(surrogate, dtype, data, seed, how):
    rollouts = data.draw(rollouts_strategy(("entropy",), dtype=dtype))
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    one, batch = method(surrogate, WEIGHTS[how]), reference.batch_of(rollouts)
    plan = one.plan(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts)
    weights, chosen = reference.aggregate(batch, how), reference.planned(plan)
    expected = reference.hybrid_losses(batch, *plain(logprob, old, credit), weights, chosen, **HYBRIDS[surrogate])
    loss, gradient, _ = loss_and_gradient(one, rollouts, credit, logprob, old, plan)
    close(loss, expected[0], 1e-10 if dtype == torch.float64 else 1e-5)
    close(gradient, expected[1], 1e-10 if dtype == torch.float64 else 1e-5)


def test_the_reference_gradients_are_those_of_its_losses():
    """The slow gradients are derived by hand; central differences of the slow losses agree (no stop-gradient among
    these).
    """
    rollouts = one_group(torch.tensor([[1, 1, 1], [1, 1, 0]]).bool())
    batch = reference.batch_of(rollouts)
    credit, (logprob, old) = credit_like(rollouts, 3, constant=True), logprobs_like(rollouts, 5)
    weights = reference.aggregate(batch, "sequence")
    rules = [(reference.token_losses, (rule,), {}) for rule in (reference.clip, reference.sapo, reference.kl_cov)]
    rules += [
        (reference.sequence_losses, (), {"low": 0.5, "high": 0.5, "mean_of": m}) for m in ("geometric", "arithmetic")
    ]
    for function, first, constants in rules:
        at = logprob.nan_to_num().tolist()
        exact = function(batch, *first, at, *plain(old, credit), weights, **constants)[1]
        for i, t in batch.everything():
            ends = []
            for step in (1e-6, -1e-6):
                moved = [row[:] for row in at]
                moved[i][t] += step
                ends.append(function(batch, *first, moved, *plain(old, credit), weights, **constants)[0])
            assert math.isclose((ends[0] - ends[1]) / 2e-6, exact[i][t], abs_tol=1e-8)


@pytest.mark.parametrize("how", WEIGHTS)
@given(rollouts=rollouts_strategy(("entropy",)))
def test_aggregates(how, rollouts):
    close(WEIGHTS[how].weights(rollouts), reference.aggregate(reference.batch_of(rollouts), how))
    if how == "sum":
        close(SequenceSum(9).weights(rollouts), reference.aggregate(reference.batch_of(rollouts), how, 9))


# Identities -----------------------------------------------------------------------------------------------------------


@given(rollouts=rollouts_strategy(()), seed=SEEDS)
def test_gspo_token_has_the_loss_and_gradient_of_gspo_for_constant_credit(rollouts, seed):
    credit, (logprob, old) = credit_like(rollouts, seed, constant=True), logprobs_like(rollouts, seed)
    pair = [method(SequenceClip(0.1, 0.2, token=token), SequenceMean()) for token in (False, True)]
    both = [loss_and_gradient(one, rollouts, credit, logprob, old) for one in pair]
    close(both[0][0], both[1][0])
    close(both[0][1], both[1][1])


@pytest.mark.parametrize("outer", ("min_of_mixes", "mix_of_mins"))
@given(rollouts=rollouts_strategy(()), seed=SEEDS)
def test_one_branch_of_a_hybrid_is_grpos_clip_or_gspo_token_to_the_bit(outer, rollouts, seed):
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    for mix, same in ((1.0, Clip()), (0.0, SequenceClip(token=True))):
        pair = [
            loss_and_gradient(method(s, SequenceMean()), rollouts, credit, logprob, old)
            for s in (HybridClip(mix=mix, outer=outer), same)
        ]
        assert torch.equal(pair[0][0], pair[1][0]) and torch.equal(pair[0][1], pair[1][1])


@given(rollouts=rollouts_strategy(("entropy",)), seed=SEEDS)
def test_a_penalty_of_nothing_leaves_the_clip(rollouts, seed):
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    for low, high in ((0.2, 0.2), (1.0, math.inf)):
        none = LowEntropyKL(beta=(0.0, 0.0, 0.0), low=low, high=high)
        pair = [loss_and_gradient(method(s), rollouts, credit, logprob, old) for s in (none, Clip(low, high))]
        assert torch.equal(pair[0][0], pair[1][0]) and torch.equal(pair[0][1], pair[1][1])


@given(rollouts=rollouts_strategy(()), seed=SEEDS)
def test_ce_gppo_without_beta_has_the_gradient_of_ppo(rollouts, seed):
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    for dual in (None, 1.5):
        pair = [
            loss_and_gradient(method(s), rollouts, credit, logprob, old)[1]
            for s in (GPPO((0.0, 0.0), dual=dual), Clip(dual=dual))
        ]
        close(*pair)


@given(rollouts=rollouts_strategy(("entropy",)), seed=SEEDS)
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(rollouts, seed):
    """At w = 1 no clip holds, SAPO's gate has weight 4 · ½ · ½ = 1, and the penalties of KL-Cov and of low entropy have
    no gradient.
    """
    credit, (logprob, _) = credit_like(rollouts, seed, constant=True), logprobs_like(rollouts, seed)
    expected = loss_and_gradient(method(LogProb(), SequenceMean()), rollouts, credit, logprob, logprob)[1]
    for surrogate in (*TOKEN_RULES, *SEQUENCE_RULES, *WITH_ENTROPY, *HYBRIDS):
        if not isinstance(surrogate, ClipCov):
            close(loss_and_gradient(method(surrogate, SequenceMean()), rollouts, credit, logprob, logprob)[1], expected)


@given(rollouts=rollouts_strategy(()), seed=SEEDS)
def test_clips_that_never_bind_agree(rollouts, seed):
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    open_clip = loss_and_gradient(method(Clip(1.0, 1e9)), rollouts, credit, logprob, old)
    for same in (GPPO(low=1.0, high=1e9), KLCov(beta=0.0), Clip(1.0, 1e9, dual=1e9)):
        close(loss_and_gradient(method(same), rollouts, credit, logprob, old)[0], open_clip[0])
        close(loss_and_gradient(method(same), rollouts, credit, logprob, old)[1], open_clip[1])
    # CISPO's value differs, its gradient is that of an unclipped ratio as long as the cap does not hold.
    close(loss_and_gradient(method(CISPO(cap=1e9)), rollouts, credit, logprob, old)[1], open_clip[1])


# By hand --------------------------------------------------------------------------------------------------------------

CASES = [  # surrogate, w, c -> ℓ, dℓ/dlog π
    (Clip(0.2, 0.28), 1.5, 1.0, -1.28, 0.0),  # clipped from above
    (Clip(0.2, 0.28), 1.5, -1.0, 1.5, 1.5),  # never clipped there
    (Clip(0.2, 0.28), 0.5, -1.0, 0.8, 0.0),  # clipped from below
    (Clip(0.2, 0.28), 0.5, 1.0, -0.5, -0.5),
    (Clip(dual=3.0), 4.0, -2.0, 6.0, 0.0),  # −3 · −2 instead of 8
    (GPPO((0.5, 1.0)), 0.5, -1.0, 0.4, 0.4),  # β₁ (1 − 0.2)
    (GPPO((0.5, 1.0)), 2.0, 1.0, -1.2, -1.2),  # β₂ (1 + 0.2)
    (SAPO(), 1.0, 1.0, -2.0, -1.0),  # 4/1 · ½
    (SAPO(), 1.0, -1.0, 2 / 1.05, 1.0),  # 4/1.05 · ½
    (CISPO(5.0), 8.0, 1.0, -5 * math.log(0.4), -5.0),  # log π = log(8 · 0.05)
    (KLCov(1.0), 2.0, 1.0, -2 + math.log(2), -2 + 1.0),  # the only token is selected
]


@pytest.mark.parametrize("surrogate, w, c, loss, slope", CASES, ids=str)
def test_one_token_by_hand(surrogate, w, c, loss, slope):
    old = torch.tensor([[0.05]], dtype=torch.float64).log()
    got = loss_and_gradient(
        method(surrogate), one_group(torch.ones(1, 1).bool()), torch.tensor([[c]]).double(), old + math.log(w), old
    )
    close(got[0], loss)
    close(got[1], [[slope]])


def test_sequence_ratios_by_hand():
    # Ratios 4 and 1: geometric mean 2, arithmetic mean 2.5. Credit −1 is not clipped from above: ℓ = s at both tokens,
    # weights ½.
    old = torch.zeros(1, 2, dtype=torch.float64)
    logprob = torch.tensor([[4.0, 1.0]], dtype=torch.float64).log()
    for mean, loss, gradient in (("geometric", 2.0, [[1.0, 1.0]]), ("arithmetic", 2.5, [[2.0, 0.5]])):
        one = method(SequenceClip(mean=mean), SequenceMean())
        got = loss_and_gradient(one, one_group(torch.ones(1, 2).bool()), -torch.ones_like(old), logprob, old)
        close(got[0], loss)
        close(got[1], gradient)  # geometric: s/|o| each; arithmetic: wₜ/|o|


def test_hybrid_readings_by_hand():
    """Ratios 1.5 and 0.9: s = √1.35 = 1.161895, clipped 1.0004; both clipped from above for credit 1, at 1.2 and 1.0004
    the first token, the second from one side only. For credit −1 nothing is clipped: −(1.5 + s)/2, −(0.9 + s)/2.
    """
    old = torch.zeros(1, 2, dtype=torch.float64)
    logprob = torch.tensor([[1.5, 0.9]], dtype=torch.float64).log()
    for outer in ("min_of_mixes", "mix_of_mins"):
        for c, expected in ((1.0, [-1.1002, -0.9502]), (-1.0, [1.330948, 1.030948])):
            surrogate = HybridClip(outer=outer)
            loss, stats = surrogate(logprob, old, torch.full_like(old, c), torch.ones(1, 2).bool())
            close(loss, [expected], 1e-6)
        assert stats["clip_low"] == stats["sequence_clip_low"] == 0
    # Where the branches are clipped in opposite directions the readings part: 30 tokens, the first at w = 0.5, the
    # others such that s = 1.2.
    rest = (30 * math.log(1.2) - math.log(0.5)) / 29
    wide = torch.full((1, 30), rest, dtype=torch.float64)
    wide[0, 0] = math.log(0.5)
    mask, one = torch.ones(1, 30).bool(), torch.ones(1, 30, dtype=torch.float64)
    for outer, value in (("min_of_mixes", 0.85), ("mix_of_mins", 0.7502), ("mix_of_clips", 0.9002)):
        close(HybridClip(outer=outer)(wide, 0 * wide, one, mask)[0][0, 0], -value)


def test_the_mix_by_entropy_by_hand():
    rollouts = one_group(torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool())
    entropy = torch.tensor([[1.0, 3.0, 2.0], [0.7, 0.7, 9.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    rollouts = Rollouts(rollouts.reward, rollouts.group, rollouts.mask, {"entropy": entropy})
    credit = torch.tensor([[1.0] * 3, [0.5] * 3, [0.0] * 3], dtype=torch.float64)
    zero = 0 * credit
    asked = {"logprob": zero, "old_logprob": zero, "credit": credit, "rollouts": rollouts}
    # Equal entropies share alike; a row without credit asks for nothing.
    close(method(HybridClip(mix="entropy")).plan(**asked).coefficient, [[0, 1, 0.5], [0.5, 0.5, 0], [0, 0, 0]])
    turned = HybridClip(mix="entropy", entropy_to="sequence")
    close(method(turned).plan(**asked).coefficient, [[1, 0, 0.5], [0.5, 0.5, 0], [0, 0, 0]])
    assert HybridClip().needs == frozenset() and turned.needs == {"entropy"} and turned.plans and not HybridClip().plans
    with pytest.raises(ValueError, match=r"HybridClip.mix must be in \[0, 1\] or 'entropy', got 2"):
        HybridClip(mix=2)
    with pytest.raises(ValueError, match=r"share and fraction must be in \(0, 1\], got share=0.0, fraction=0.1"):
        LowEntropyKL(0.0, 0.1)
    with pytest.raises(ValueError, match=r"HybridClip.outer must be one of 'min_of_mixes'"):
        HybridClip(outer="min")


def test_low_entropy_penalty_by_hand():
    """The four lowest of five entropies; means of log π −0.4875 and of credit 0 over them: covariances 0.4375,
    −0.1125, −0.3875, 0.7125. Top 0.2, bottom 0.05.
    """
    scores = {"entropy": torch.tensor([[0.1, 0.2, 0.3, 0.4, 2.0]], dtype=torch.float64)}
    rollouts = one_group(torch.ones(1, 5).bool(), **scores)
    logprob = torch.tensor([[-0.05, -0.6, -0.1, -1.2, -2.0]], dtype=torch.float64)
    credit = torch.tensor([[1, 1, -1, -1, 1]], dtype=torch.float64)
    asked = {"logprob": logprob, "old_logprob": logprob, "credit": credit, "rollouts": rollouts}
    close(method(LowEntropyKL()).plan(**asked).coefficient, [[0, 0, 0.05, 0.2, 0]])
    close(method(LowEntropyKL(beta=(0.2, 0.1, 0.05))).plan(**asked).coefficient, [[0.1, 0.1, 0.05, 0.2, 0]])
    # Log ratios 0.1, −0.2, 0.05: −e^0.1 + 0.2 · 0.1, −e^−0.2 + 0.05 · 0.2, e^0.05.
    gap = torch.tensor([[0.1, -0.2, 0.05]], dtype=torch.float64)
    kappa = torch.tensor([[0.2, 0.05, 0.0]], dtype=torch.float64)
    loss, stats = LowEntropyKL()(gap, 0 * gap, torch.tensor([[1.0, 1.0, -1.0]]), torch.ones(1, 3).bool(), kappa)
    close(loss, [[-1.085171, -0.808731, 1.051271]], 1e-6)
    assert stats["selected"] == pytest.approx(2 / 3)


def test_clip_stats_by_hand():
    old = torch.zeros(1, 4, dtype=torch.float64)
    logprob = torch.tensor([[1.5, 1.5, 0.5, 0.5]], dtype=torch.float64).log()
    credit = torch.tensor([[1.0, -1.0, -1.0, 0.0]], dtype=torch.float64)
    stats = loss_and_gradient(method(Clip()), one_group(torch.ones(1, 4).bool()), credit, logprob, old)[2]
    assert stats["clip_high"] == 0.25 and stats["clip_low"] == 0.25
    close(torch.stack([stats["ratio_mean"], stats["ratio_max"], stats["ratio_min"]]).double(), [1.0, 1.5, 0.5], 1e-6)
    close(
        stats["kl_old"].double(), (2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))) / 4, 1e-6
    )  # mean of w − 1 − log w


def test_a_huge_ratio_does_not_overflow():
    old, logprob = torch.full((1, 2), -200.0), torch.full((1, 2), -1e-3)
    for surrogate in (*TOKEN_RULES, *SEQUENCE_RULES, HybridClip()):
        loss, gradient, stats = loss_and_gradient(
            method(surrogate), one_group(torch.ones(1, 2).bool()), -torch.ones(1, 2), logprob, old
        )
        assert (
            torch.isfinite(loss) and torch.isfinite(gradient).all() and all(torch.isfinite(x) for x in stats.values())
        )


@pytest.mark.parametrize("surrogate", (*TOKEN_RULES, *SEQUENCE_RULES, HybridClip()), ids=repr)
def test_half_precision_logprobs_are_widened(surrogate):
    """A bfloat16 ratio has 8 bits: the loss is that of the same numbers in float32, and its gradient is cast back."""
    rollouts = one_group(torch.ones(3, 4).bool())
    credit, (logprob, old) = credit_like(rollouts, 1, constant=True).float(), logprobs_like(rollouts, 2)
    logprob, old = logprob.bfloat16(), old.bfloat16()
    half = loss_and_gradient(method(surrogate), rollouts, credit, logprob, old)
    full = loss_and_gradient(method(surrogate), rollouts, credit, logprob.float(), old.float())
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1].bfloat16())


# Selections -----------------------------------------------------------------------------------------------------------


def select(surrogate, rollouts, logprob, old, credit):
    return method(surrogate).plan(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts).coefficient.bool()


@given(rollouts=rollouts_strategy(()), seed=SEEDS, fraction=st.sampled_from((1e-4, 0.1, 0.29, 0.5)))
def test_covariance_selections(rollouts, seed, fraction):
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    batch, tokens = reference.batch_of(rollouts), int(rollouts.mask.sum())
    expected = reference.covariances(batch, *plain(logprob, credit))
    got = covariance(logprob, credit, rollouts.mask)
    for (i, t), value in expected.items():
        assert math.isclose(got[i, t].item(), value, abs_tol=1e-12)
    assert (got[~rollouts.mask] == 0).all()
    wanted = min(max(math.floor(round(fraction * tokens, 9)), 1), tokens)
    chosen = select(KLCov(fraction), rollouts, logprob, old, credit)
    assert chosen.sum() == wanted and not (chosen & ~rollouts.mask).any()
    assert sorted(got[chosen].tolist()) == pytest.approx(sorted(expected.values())[tokens - wanted :], abs=1e-12)
    # Clip-Cov: inside the band, and not where the ratio clip already stops the gradient.
    surrogate = ClipCov(fraction, (0.05, 0.6), 0.2, 0.2)
    chosen = select(surrogate, rollouts, logprob, old, credit)
    candidates = set()
    for (i, t), value in expected.items():
        w, c = math.exp(logprob[i, t] - old[i, t]), credit[i, t].item()
        if 0.05 < value < 0.6 and not (w < 0.8 and c < 0) and not (w > 1.2 and c > 0):
            candidates.add((i, t))
    drawn = set(map(tuple, torch.nonzero(chosen).tolist()))
    assert drawn <= candidates and len(drawn) == min(max(math.floor(round(fraction * tokens, 9)), 1), len(candidates))
    assert torch.equal(chosen, select(surrogate, rollouts, logprob, old, credit))  # the same batch, the same draw


@given(
    rollouts=rollouts_strategy(()),
    seed=SEEDS,
    share=st.sampled_from((0.01, 0.29, 0.8, 1.0)),
    fraction=st.sampled_from((1e-4, 0.1, 0.29, 0.5)),
)
def test_low_entropy_selection(rollouts, seed, share, fraction):
    """Against sorting in plain Python; of two tokens the covariances are equal, so what is compared is their values."""
    entropy = torch.rand(rollouts.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rollouts = Rollouts(rollouts.reward, rollouts.group, rollouts.mask, {"entropy": entropy})
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    one = method(LowEntropyKL(share, fraction, beta := (0.7, 0.2, 0.4)))
    found = reference.planned(one.plan(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts))
    cov = reference.low_entropy_covariances(reference.batch_of(rollouts), *plain(logprob, credit), share)
    expected = reference.low_entropy_coefficients(cov, fraction, beta)
    assert set(found) == set(expected) == set(cov)
    for level in beta:
        ours, theirs = (sorted(cov[place] for place, k in kappa.items() if k == level) for kappa in (found, expected))
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_clip_cov_draws_uniformly_and_by_seed():
    rollouts = one_group(torch.ones(10, 20).bool())
    credit, (logprob, old) = credit_like(rollouts, 0), logprobs_like(rollouts, 0)
    counts = torch.zeros(10, 20)
    for seed in range(300):
        chosen = select(ClipCov(0.1, (0.0, 99.0), 1.0, 1e9, seed), rollouts, logprob, old, credit)
        assert chosen.sum() == 20
        counts += chosen
    inside = covariance(logprob, credit, rollouts.mask) > 0
    share = 20 / inside.sum().item()  # every candidate is drawn with this probability: 4 standard errors around it
    assert (counts[~inside] == 0).all()
    assert ((counts[inside] / 300 - share).abs() < 4.5 * math.sqrt(share * (1 - share) / 300)).all()


def test_kl_cov_breaks_ties_the_same_way_whatever_the_padding():
    mask = torch.ones(3, 4).bool()
    for width in (4, 9):
        wide = torch.cat([mask, torch.zeros(3, width - 4).bool()], 1)
        zero = torch.zeros(3, width, dtype=torch.float64)
        chosen = select(KLCov(0.5), one_group(wide), zero, zero, zero)
        assert chosen[:, :4].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]] and not chosen[:, 4:].any()


@pytest.mark.parametrize("name", ("clip_cov", "kl_cov", "forking_tokens"))
def test_selections_run_over_the_batch_not_over_its_slices(name):
    one = METHODS[name].replace(**({"fraction": 0.2, "band": (0.0, 9.0)} if name == "clip_cov" else {"fraction": 0.2}))
    scores = {"entropy": torch.arange(24).view(4, 6) / 10}
    rollouts = Rollouts(torch.tensor([1.0, 0, 1, 0]), torch.zeros(4).long(), torch.ones(4, 6).bool(), scores)
    credit, (logprob, old) = one.credit(rollouts), logprobs_like(rollouts, 1)
    plan = one.plan(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts)
    whole = loss_and_gradient(one, rollouts, credit, logprob, old)
    sliced = alone = 0.0
    for row in range(4):
        keep = torch.tensor([row])
        part = (rollouts.rows(keep), credit[keep], logprob[keep], old[keep])
        sliced = sliced + loss_and_gradient(one, *part, plan.rows(keep))[0]
        alone = alone + loss_and_gradient(one, *part)[0] / 4
    close(sliced, whole[0].double(), 1e-6)
    assert not torch.isclose(alone, whole[0], rtol=1e-3)  # what per-slice statistics would give is another number


def test_selected_mean_divides_by_the_selected_tokens():
    rollouts = Rollouts(
        torch.tensor([1.0]), torch.tensor([0]), torch.ones(1, 10).bool(), {"entropy": torch.arange(10.0)[None]}
    )
    weights = SelectedMean(TopFraction("entropy", 0.2)).weights(rollouts)
    assert weights.tolist() == [[0.0] * 8 + [0.5] * 2]
    assert SelectedMean(TopFraction("entropy", 0.2)).needs == {"entropy"}


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_sequence_ratio_refuses_credit_that_varies_within_a_rollout():
    rollouts = one_group(torch.tensor([[1, 1, 1], [1, 1, 0]]).bool())
    zero = torch.zeros(2, 3, dtype=torch.float64)
    credit = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 7.0]], dtype=torch.float64)
    loss_and_gradient(method(SequenceClip()), rollouts, credit, zero, zero)  # the 7 is padding
    credit[1, 1] = 2.1
    with pytest.raises(ValueError, match=r"credit of row 1 varies.*gspo_token"):
        loss_and_gradient(method(SequenceClip()), rollouts, credit, zero, zero)
    loss_and_gradient(method(SequenceClip(token=True)), rollouts, credit, zero, zero)
    with pytest.raises(ValueError, match=r"SequenceClip.mean must be one of 'geometric', 'arithmetic'"):
        SequenceClip(mean="harmonic")


def test_shapes_and_plans_are_checked():
    rollouts, zero = one_group(torch.ones(2, 3).bool()), torch.zeros(2, 3)
    given_tensors = {"logprob": zero, "old_logprob": zero, "credit": zero, "rollouts": rollouts}
    for name in ("logprob", "old_logprob", "credit"):
        with pytest.raises(ValueError, match=rf"^{name} must be \[B, T\] = \[2, 3\], got shape \[2\]"):
            method(Clip()).loss(**given_tensors | {name: torch.zeros(2)})
    plan = method(Clip()).plan(**given_tensors)
    with pytest.raises(ValueError, match=r"plan is for \[1, 3\], the rollouts are \[2, 3\]: slice both"):
        method(Clip()).loss(**given_tensors, plan=plan.rows(torch.tensor([0])))
    assert isinstance(plan, Plan) and plan.coefficient is None
    for surrogate in (KLCov(), ClipCov()):
        with pytest.raises(ValueError, match=r"planned over the whole batch: pass `coefficient` \(Plan.coefficient\)"):
            surrogate(zero, zero, zero, rollouts.mask)
    with pytest.raises(TypeError, match="Surrogate does not define token_loss"):
        method(Surrogate()).loss(**given_tensors)
    with pytest.raises(TypeError, match="Aggregate does not define weights"):
        method(Clip(), Aggregate()).loss(**given_tensors)
