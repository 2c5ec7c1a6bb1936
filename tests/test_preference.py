"""PREFERENCES and their loss: against slow loops, by hand, and the laws of a loss over pairs."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tokencredit import Chain
from tokencredit.credit import Outcome, ProxyWeight
from tokencredit.preference import (
    PREFERENCES,
    Hinge,
    Link,
    Logistic,
    Pairs,
    PreferenceMethod,
    Squared,
    behind_common_prefix,
)
from tokencredit.testing import check_laws, logprobs_like, rollouts_strategy

SEEDS = st.integers(0, 9999)
SCORES = ("entropy", "implicit_reward", "contrast", "before_after")
LINKS = {
    Logistic(): (reference.logistic, {}),
    Logistic(0.7, 0.1): (reference.logistic, {"gamma": 0.7, "smoothing": 0.1}),
    Squared(): (reference.squared, {}),
    Hinge(): (reference.hinge, {}),
}


@st.composite
def pairs_strategy(draw, dtype=torch.float64):
    """Ragged pairs, empty completions and weights of 0 among them."""
    rollouts = draw(rollouts_strategy(SCORES, signed=SCORES[1:], dtype=dtype))
    num = len(rollouts) // 2
    keep = torch.arange(2 * num)
    weight = torch.tensor(draw(st.lists(st.sampled_from((0.0, 0.5, 1.0, 2.0)), min_size=num, max_size=num)))
    scores = {name: score[keep] for name, score in rollouts.scores.items()}
    return Pairs(rollouts.mask[keep], scores, weight.to(dtype))


def close(got, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64).view(got.shape)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def loss_and_gradient(method, pairs, credit, logprob, ref, total=None):
    leaf = logprob.detach().clone().requires_grad_()
    loss, stats = method.loss(logprob=leaf, ref_logprob=ref, credit=credit, pairs=pairs, total=total)
    loss.backward()
    return loss.detach(), leaf.grad, stats


# Against the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREFERENCES)
@given(data=st.data(), dtype=st.sampled_from((torch.float64, torch.float32)), seed=SEEDS)
def test_preferences_are_what_they_say(name, data, dtype, seed):
    pairs, method = data.draw(pairs_strategy(dtype)), PREFERENCES[name]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    batch, (logprob, ref) = reference.batch_of(pairs.rollouts), logprobs_like(pairs.rollouts, seed)
    credit = method.credit(pairs)
    expected = torch.tensor(reference.PREFERENCE_CREDIT[name](batch), dtype=torch.float64).view(credit.shape)
    torch.testing.assert_close(credit.double(), expected, rtol=tolerance, atol=tolerance)
    gamma = method.link.gamma
    plain = [x.double().tolist() for x in (logprob, ref, credit)]
    slow = reference.preference_loss(
        batch,
        *plain,
        pairs.weight.double().tolist(),
        method.beta,
        lambda m: reference.logistic(m, gamma),
        method.reference_free,
    )
    loss, gradient, _ = loss_and_gradient(method, pairs, credit, logprob, ref)
    close(loss, slow[0], tolerance)
    close(gradient, slow[1], tolerance)


def test_the_reference_covers_every_preference():
    assert set(reference.PREFERENCE_CREDIT) == set(PREFERENCES)


@pytest.mark.parametrize("link", LINKS, ids=repr)
@given(pairs=pairs_strategy(), seed=SEEDS, beta=st.sampled_from((0.1, 2.0)))
def test_links(link, pairs, seed, beta):
    method = PREFERENCES["dpo"].replace(link=link, beta=beta)
    batch, (logprob, ref) = reference.batch_of(pairs.rollouts), logprobs_like(pairs.rollouts, seed)
    credit, (rule, constants) = method.credit(pairs), LINKS[link]
    plain = [x.double().tolist() for x in (logprob, ref, credit)]
    weight = pairs.weight.tolist()
    slow = reference.preference_loss(batch, *plain, weight, beta, lambda m: rule(m, **constants))
    loss, gradient, stats = loss_and_gradient(method, pairs, credit, logprob, ref)
    close(loss, slow[0])
    close(gradient, slow[1])
    if sum(weight):
        share = math.fsum(w * (m > 0) for w, m in zip(weight, slow[2])) / sum(weight)
        assert stats["accuracy"].item() == pytest.approx(share)
        mean = math.fsum(w * m for w, m in zip(weight, slow[2])) / sum(weight)
        assert stats["margin"].item() == pytest.approx(mean)


# Laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_chains_keep_the_laws_of_transforms(name):
    check_laws(PREFERENCES[name].chain, examples=10)


@pytest.mark.parametrize("name", PREFERENCES)
@given(pairs=pairs_strategy(), seed=SEEDS)
def test_the_losses_of_micro_batches_add_up(name, pairs, seed):
    method, (logprob, ref) = PREFERENCES[name], logprobs_like(pairs.rollouts, seed)
    credit = method.credit(pairs)
    whole, gradient, _ = loss_and_gradient(method, pairs, credit, logprob, ref)
    part = torch.randint(0, 3, (len(pairs),), generator=torch.Generator().manual_seed(seed))
    total, pieces = torch.zeros_like(whole), torch.zeros_like(gradient)
    for keep in (part == k for k in range(3)):
        rows = keep.repeat(2)
        some = (pairs.pairs(keep), credit[rows], logprob[rows], ref[rows])
        loss, pieces[rows], _ = loss_and_gradient(method, *some, total=pairs.weight.sum())
        close(method.credit(some[0]), credit[rows])
        total = total + loss
    close(total, whole)
    close(pieces, gradient)


@pytest.mark.parametrize("name", PREFERENCES)
@given(pairs=pairs_strategy(), seed=SEEDS)
def test_padding_says_nothing_and_the_gradient_reaches_the_policy_alone(name, pairs, seed):
    method, (logprob, ref) = PREFERENCES[name], logprobs_like(pairs.rollouts, seed)
    wide = [torch.cat([x, torch.full((len(x), 2), torch.nan, dtype=x.dtype)], 1) for x in (logprob, ref)]
    scores = {
        name: torch.cat([x.masked_fill(~pairs.mask, torch.nan), x.new_full((len(x), 2), torch.nan)], 1)
        for name, x in pairs.scores.items()
    }
    more = Pairs(torch.cat([pairs.mask, pairs.mask.new_zeros(len(pairs.mask), 2)], 1), scores, pairs.weight)
    narrow = loss_and_gradient(method, pairs, method.credit(pairs), logprob, ref)
    padded = loss_and_gradient(method, more, method.credit(more), *wide)
    close(padded[0], narrow[0])
    close(padded[1][:, : logprob.shape[1]], narrow[1])
    assert not padded[1][~more.mask].any() and all(
        torch.isfinite(x) and not x.requires_grad for x in narrow[2].values()
    )
    leaf, other = logprob.clone().requires_grad_(), ref.clone().requires_grad_()
    credit = method.credit(pairs).requires_grad_()
    loss, _ = method.loss(logprob=leaf, ref_logprob=other, credit=credit, pairs=pairs)
    reached = torch.autograd.grad(loss, [other, credit], allow_unused=True)
    assert all(x is None or not x.any() for x in reached)


@given(pairs=pairs_strategy(), seed=SEEDS)
def test_identities(pairs, seed):
    logprob, ref = logprobs_like(pairs.rollouts, seed)
    dpo = PREFERENCES["dpo"]
    credit = dpo.credit(pairs)
    m = dpo.margin(logprob=logprob, ref_logprob=ref, credit=credit, pairs=pairs)
    # At the reference every margin is 0; chosen and rejected exchanged, it changes its sign.
    assert not dpo.margin(logprob=ref, ref_logprob=ref, credit=credit, pairs=pairs).any()
    swap = torch.arange(len(pairs.mask)).roll(len(pairs))
    turned = Pairs(pairs.mask[swap], {}, pairs.weight)
    close(dpo.margin(logprob=logprob[swap], ref_logprob=ref[swap], credit=dpo.credit(turned), pairs=turned), -m)
    # Equal scores, and strength 0, are DPO.
    level = Pairs(pairs.mask, {name: torch.full_like(x, 0.5) for name, x in pairs.scores.items()}, pairs.weight)
    assert torch.equal(PREFERENCES["dpo_entropy"].credit(level), credit)
    assert torch.equal(PREFERENCES["dpo_forking"].credit(level), credit)
    assert torch.equal(PREFERENCES["tgdpo"].replace(up=0.0, down=0.0).credit(pairs), credit)
    assert torch.equal(PREFERENCES["tis_dpo"].replace(low=0.0, high=0.0).credit(pairs), credit)


# By hand --------------------------------------------------------------------------------------------------------------

POLICY, REFERENCE = [[0.1, 0.4], [-0.1, -0.5]], [[0.0, 0.0], [0.0, 0.0]]


def one_pair(**scores):
    return Pairs(torch.ones(2, 2).bool(), {name: torch.tensor(x, dtype=torch.float64) for name, x in scores.items()})


@pytest.mark.parametrize(
    ("name", "scores", "margin", "loss"),
    [
        # 0.1 · (0.1 + 0.4 + 0.1 + 0.5)
        ("dpo", {"x": [[0, 0], [0, 0]]}, 0.110, 0.639659),
        # Mean entropy 1 over the pair: 0.1 · (0.5 · 0.1 + 1.5 · 0.4 + 0.2 · 0.1 + 1.8 · 0.5)
        ("dpo_entropy", {"entropy": [[0.5, 1.5], [0.2, 1.8]]}, 0.157, 0.617725),
        # Log-ratios 0.2, 0.5 | −0.3, −0.9: weights 1.01, 1.025 | 1.015, 1.045
        ("tgdpo", {"implicit_reward": [[0.2, 0.5], [-0.3, -0.9]]}, 0.1135, 0.638007),
        # exp 0.5, exp −0.2 | exp −0.5, exp 0.2
        (
            "tis_dpo",
            {"contrast": [[0.5, -0.2], [0.5, -0.2]]},
            0.1 * (0.1 * math.exp(0.5) + 0.4 * math.exp(-0.2) + 0.1 * math.exp(-0.5) + 0.5 * math.exp(0.2)),
            None,
        ),
        # Where the effect agrees with the side: 0.4 on the second chosen token, 0.3 on the first rejected one.
        ("dpo_pivotal", {"before_after": [[-0.2, 0.4], [-0.3, 0.1]]}, 0.1 * (0.4 * 0.4 + 0.3 * 0.1), None),
        # The mean of a completion: 2 · (0.25 + 0.3), and γ = 1.
        ("simpo", {"x": [[0, 0], [0, 0]]}, 1.1, math.log1p(math.exp(-0.1))),
    ],
)
def test_one_pair_by_hand(name, scores, margin, loss):
    pairs, method = one_pair(**scores), PREFERENCES[name]
    logprob, ref = torch.tensor(POLICY, dtype=torch.float64), torch.tensor(REFERENCE, dtype=torch.float64)
    credit = method.credit(pairs)
    close(method.margin(logprob=logprob, ref_logprob=ref, credit=credit, pairs=pairs), [margin], 1e-9)
    got, gradient, stats = loss_and_gradient(method, pairs, credit, logprob, ref)
    close(got, math.log1p(math.exp(-margin)) if loss is None else loss, 1e-6)
    assert stats["accuracy"] == 1 and stats["margin"].item() == pytest.approx(margin)
    if name == "dpo":
        close(gradient, [[-0.047253] * 2, [0.047253] * 2], 1e-6)  # ∓0.1 σ(−0.11)


def test_min_max_weights_would_change_what_beta_means():
    """0, 1 | 0, 1 in place of 0.5, 1.5 | 0.2, 1.8: the margin 0.157 becomes 0.1 · (0.4 + 0.5)."""
    pairs = one_pair(entropy=[[0.5, 1.5], [0.2, 1.8]])
    method = PREFERENCES["dpo_entropy"].replace(normalise="min_max", scope="row")
    close(method.credit(pairs), [[0, 1], [0, -1]])
    assert method.chain == Chain(Outcome(), ProxyWeight("entropy", "min_max", "row"))


def test_weights_by_row_train_the_common_prefix_and_weights_of_the_pair_do_not():
    """Both begin with the same token of entropy 1. Mean one by row: 1/2 and 2/3 of a mean, so the prefix has weights
    2/3 and 1/2; over the pair it has the same on both sides, and cancels.
    """
    pairs = one_pair(entropy=[[1.0, 2.0], [1.0, 3.0]])
    own = PREFERENCES["dpo_entropy"].replace(scope="row").credit(pairs)
    close(own[:, 0], [2 / 3, -1 / 2])
    close(PREFERENCES["dpo_entropy"].credit(pairs)[:, 0], [4 / 7, -4 / 7])
    ids = torch.tensor([[5, 6, 7], [5, 8, 7]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    assert behind_common_prefix(ids, mask).tolist() == [[False, True, True], [False, True, False]]
    assert not behind_common_prefix(ids[:1].repeat(2, 1), mask[1:].repeat(2, 1)).any()


def test_selected_preference_by_hand():
    """SePO: one of three tokens on either side, the highest of the chosen and the lowest of the rejected."""
    pairs = Pairs(torch.ones(2, 3).bool(), {"implicit_reward": torch.tensor([[0.1, 0.9, 0.5], [0.1, -0.9, 0.5]])})
    assert PREFERENCES["sepo"].credit(pairs).tolist() == [[0, 1, 0], [0, -1, 0]]


# Edges ----------------------------------------------------------------------------------------------------------------


def test_pairs_of_nothing_and_pairs_without_weight_have_no_loss():
    for pairs in (Pairs(torch.ones(0, 3).bool()), Pairs(torch.ones(4, 3).bool(), {}, torch.zeros(2))):
        zero = torch.zeros(pairs.mask.shape)
        loss, gradient, stats = loss_and_gradient(
            PREFERENCES["dpo"], pairs, PREFERENCES["dpo"].credit(pairs), zero, zero
        )
        assert loss == 0 and not gradient.any() and all(x == 0 for x in stats.values())
    empty = Pairs(torch.tensor([[0, 0], [1, 1]]).bool())
    assert PREFERENCES["simpo"].credit(empty).tolist() == [[0, 0], [-0.5, -0.5]]


def test_what_is_wrong_is_named():
    zero = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"mask must be \[2P, T\], chosen rows before rejected ones; got \[3, 2\]"):
        Pairs(torch.ones(3, 2).bool())
    with pytest.raises(ValueError, match=r"weight must be \[P\] = \[1\], got shape \[2\]"):
        Pairs(torch.ones(2, 2).bool(), {}, torch.ones(2))
    with pytest.raises(ValueError, match="weight must be finite and not negative"):
        Pairs(torch.ones(2, 2).bool(), {}, -torch.ones(1))
    pairs = Pairs(torch.ones(2, 3).bool())
    with pytest.raises(KeyError, match="dpo_entropy needs the scores entropy; these pairs have: none"):
        PREFERENCES["dpo_entropy"].credit(pairs)
    with pytest.raises(ValueError, match=r"dpo compares with a reference: give ref_logprob \[2P, T\]"):
        PREFERENCES["dpo"].loss(logprob=zero, credit=zero, pairs=pairs)
    with pytest.raises(ValueError, match=r"logprob must be \[2P, T\] = \[2, 3\], got shape \[2\]"):
        PREFERENCES["dpo"].loss(logprob=torch.zeros(2), ref_logprob=zero, credit=zero, pairs=pairs)
    with pytest.raises(ValueError, match=r"dpo has no field gama; it has: Logistic.gamma, Logistic.smoothing, beta"):
        PREFERENCES["dpo"].replace(gama=1.0)
    with pytest.raises(ValueError, match="beta must be positive"):
        PREFERENCES["dpo"].replace(beta=0.0)
    with pytest.raises(ValueError, match=r"Logistic.smoothing must be in \[0, 0.5\), got 0.5"):
        Logistic(smoothing=0.5)
    with pytest.raises(TypeError, match=r"Link does not define loss\(self, margin\)"):
        Link().loss(torch.zeros(1))


def test_every_preference_says_where_it_comes_from():
    for name, method in PREFERENCES.items():
        assert method.name == name and method.summary and method.source
        assert method.fidelity in ("paper", "code", "reconstructed")
        assert pickle.loads(pickle.dumps(method)) == method and hash(method)
    mine = PreferenceMethod("mine", Chain(Outcome()), Hinge())
    assert mine.replace(beta=0.5).beta == 0.5 and mine.needs == frozenset()
