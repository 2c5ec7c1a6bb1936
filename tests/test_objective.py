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
    KLCov,
    LogProb,
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
@pytest.mark.parametrize("surrogate", TOKEN_RULES, ids=repr)
@given(data=st.data(), seed=SEEDS, how=st.sampled_from(sorted(WEIGHTS)))
def test_token_surrogates(surrogate, dtype, data, seed, how):
    rollouts = data.draw(rollouts_strategy(("entropy",), dtype=dtype))
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    one = method(surrogate, WEIGHTS[how])
    plan = one.plan(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts)
    chosen = reference.planned(plan)
    rule, constants = TOKEN_RULES[surrogate]
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


@given(rollouts=rollouts_strategy(()), seed=SEEDS)
def test_ce_gppo_without_beta_has_the_gradient_of_ppo(rollouts, seed):
    credit, (logprob, old) = credit_like(rollouts, seed), logprobs_like(rollouts, seed)
    for dual in (None, 1.5):
        pair = [
            loss_and_gradient(method(s), rollouts, credit, logprob, old)[1]
            for s in (GPPO((0.0, 0.0), dual=dual), Clip(dual=dual))
        ]
        close(*pair)


@given(rollouts=rollouts_strategy(()), seed=SEEDS)
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(rollouts, seed):
    """At w = 1 no clip holds, SAPO's gate has weight 4 · ½ · ½ = 1 and KL-Cov's penalty no gradient."""
    credit, (logprob, _) = credit_like(rollouts, seed, constant=True), logprobs_like(rollouts, seed)
    expected = loss_and_gradient(method(LogProb(), SequenceMean()), rollouts, credit, logprob, logprob)[1]
    for surrogate in (*TOKEN_RULES, *SEQUENCE_RULES):
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
    for surrogate in (*TOKEN_RULES, *SEQUENCE_RULES):
        loss, gradient, stats = loss_and_gradient(
            method(surrogate), one_group(torch.ones(1, 2).bool()), -torch.ones(1, 2), logprob, old
        )
        assert (
            torch.isfinite(loss) and torch.isfinite(gradient).all() and all(torch.isfinite(x) for x in stats.values())
        )


@pytest.mark.parametrize("surrogate", (*TOKEN_RULES, *SEQUENCE_RULES), ids=repr)
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
