"""LM-head statistics in tiles, against materialised logits in float64: values, reverse mode, forward mode, tangents,
offsets, dtypes.
"""

import pytest
import torch

from tokencredit.lm.head import Head, chosen_logprob, head_statistics, tiles
from tokencredit.lm.scoring import kl_divergence, token_scores
from tokencredit.lm.tangents import head_tangents, logit_norms

N, D, V, K = 7, 5, 23, 3
HEADS = {"plain": {}, "temperature": {"temperature": 0.7}, "capped": {"softcap": 2.0, "scale": 1.3, "temperature": 0.7}}


def parts(dtype=torch.float64, n=N, d=D, v=V):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((n, d), (v, d), (v,)))
    return hidden, weight, bias, torch.randint(v, (n,), generator=generator)


def slow_logits(hidden, weight, bias, softcap=None, scale=1.0, temperature=1.0):
    z = (hidden @ weight.t() + bias) * scale
    return (softcap * torch.tanh(z / softcap) if softcap else z) / temperature


def slow_statistics(z, targets):
    log_p = z.log_softmax(1)
    p = log_p.exp()
    return log_p.gather(1, targets[:, None])[:, 0], -(p * log_p).sum(1), p.square().sum(1), z.logsumexp(1)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tile", [20, 1 << 18])
def test_statistics_are_those_of_materialised_logits(options, tile):
    hidden, weight, bias, targets = parts()
    found = head_statistics(hidden, Head(weight, bias, **options), targets, tile)
    for name, x, y in zip(found._fields, found, slow_statistics(slow_logits(hidden, weight, bias, **options), targets)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_derivatives_of_both_modes_and_second_order(options):
    hidden, weight, bias, targets = (x.requires_grad_() if x.is_floating_point() else x for x in parts(n=2, d=2, v=5))

    def f(h, w, b):
        return tuple(head_statistics(h, Head(w, b, **options), targets, 4))

    inputs = (hidden, weight, bias)
    assert torch.autograd.gradcheck(
        f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(f, inputs)


def test_under_vmap_and_without_bias():
    hidden, weight, _, targets = parts()
    many = torch.stack([hidden, 2 * hidden, -hidden])
    found = torch.func.vmap(lambda h: head_statistics(h, Head(weight), targets, 20).entropy)(many)
    torch.testing.assert_close(found, torch.stack([head_statistics(h, Head(weight), targets).entropy for h in many]))


def test_a_large_common_offset_costs_no_digits():
    """The same distribution with logits around ±300 in float32: what Σ z e^z would lose."""
    hidden, weight, _, targets = parts(torch.float32)
    truth = slow_statistics(slow_logits(hidden.double(), weight.double(), 0.0), targets)
    for offset in (-300.0, 300.0):
        found = head_statistics(hidden, Head(weight, torch.full((V,), offset)), targets, 20)
        for x, y in list(zip(found, truth))[:3]:
            torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-4)


def test_impossible_tokens_and_half_precision():
    hidden, weight, bias, targets = parts()
    targets = targets.clamp(min=4)
    bias = bias.clone()
    bias[:4] = -torch.inf
    found = head_statistics(hidden, Head(weight, bias), targets, 20)
    kept = slow_statistics(slow_logits(hidden, weight[4:], bias[4:]), targets - 4)
    for x, y in zip(found, kept):
        torch.testing.assert_close(x, y)
    half = head_statistics(hidden.bfloat16(), Head(weight.bfloat16()), targets)
    wide = head_statistics(hidden.bfloat16().float(), Head(weight.bfloat16().float()), targets)
    assert half.entropy.dtype == torch.float32
    torch.testing.assert_close(half.entropy, wide.entropy)


def test_no_tokens():
    found = head_statistics(torch.zeros(0, D), Head(torch.zeros(V, D)), torch.zeros(0, dtype=torch.long))
    assert [x.shape for x in found] == [(0,)] * 4


def test_tiles_cover_every_logit_once():
    for num, vocabulary, size in ((7, 23, 20), (1, 5000, 100), (300, 27, 1 << 18)):
        seen = torch.zeros(num, vocabulary)
        for rows, pieces in tiles(num, vocabulary, size):
            for columns in pieces:
                seen[rows, columns] += 1
        assert (seen == 1).all()


def test_wrong_shapes_and_temperatures_are_named():
    with pytest.raises(ValueError, match=r"hidden must be \[N, D\]"):
        head_statistics(torch.zeros(2, 3, 4), Head(torch.zeros(V, 4)), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature must be positive"):
        Head(torch.zeros(V, D), temperature=0.0)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_tangents_are_derivatives(options):
    """s, q, dH and the tied head's s and covariance, against forward mode through materialised logits."""
    hidden, weight, bias, targets = parts()
    generator = torch.Generator().manual_seed(1)
    dh, r, c = (torch.randn(*shape, generator=generator).double() for shape in ((K, N, D), (K, V), (K, D)))
    found = head_tangents(hidden, dh, Head(weight, bias, **options), targets, (r, c), tile=20)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for k in range(K):
        z, dz = torch.func.jvp(lambda e: slow_logits(hidden + e * dh[k], weight, bias, **options), (zero,), (one,))  # noqa: B023
        dy = torch.func.jvp(
            lambda e, k=k: slow_logits(hidden, weight + e * torch.outer(r[k], c[k]), bias, **options), (zero,), (one,)
        )[1]
        p = z.softmax(1)
        mean, head_mean = (p * dz).sum(1), (p * dy).sum(1)
        expected = {
            "logprob": dz.gather(1, targets[:, None])[:, 0] - mean,
            "variance": (p * dz.square()).sum(1) - mean.square(),
            "entropy": -(p * dz * z.log_softmax(1)).sum(1) + mean * (p * z.log_softmax(1)).sum(1),
            "head_logprob": dy.gather(1, targets[:, None])[:, 0] - head_mean,
            "covariance": (p * dz * dy).sum(1) - mean * head_mean,
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(found, name)[k], value, msg=name)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_logit_norms_by_brute_force(options):
    hidden, weight, bias, targets = parts()
    u = (hidden @ weight.t() + bias).requires_grad_()
    log_p = Head(None, **options).logits(u).log_softmax(1)
    grads = [torch.autograd.grad(log_p[:, v].sum(), u, retain_graph=True)[0] for v in range(V)]
    norms = torch.stack([g.square().sum(1) for g in grads], 1)
    norm2, trace = logit_norms(hidden, Head(weight, bias, **options), targets, tile=20)
    torch.testing.assert_close(norm2, norms.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(trace, (log_p.detach().exp() * norms).sum(1))


def test_near_certain_tokens_keep_their_digits_in_float32():
    """1 − p = 1e-9: the norm and the tangent are that small, and still right to a relative 1e-4."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]])
    hidden, targets = torch.tensor([[20.7, 0.1]]), torch.tensor([0])
    dh = torch.tensor([[[0.3, -1.1]]])
    for dtype in (torch.float32, torch.float64):
        norm2, trace = logit_norms(hidden.to(dtype), Head(weight.to(dtype)), targets)
        tangent = head_tangents(hidden.to(dtype), dh.to(dtype), Head(weight.to(dtype)), targets)
        found = torch.stack([norm2[0], trace[0], tangent.logprob[0, 0], tangent.variance[0, 0]]).double()
        if dtype == torch.float32:
            first = found
    torch.testing.assert_close(first, found, rtol=1e-4, atol=0)
    assert 0 < found[0] < 1e-16


def test_a_head_without_weight_reads_logits():
    hidden, weight, bias, targets = parts()
    logits = hidden @ weight.t() + bias
    both = [
        token_scores(x, h, targets)
        for x, h in ((hidden, Head(weight, bias, 0.7)), (logits, Head(None, temperature=0.7)))
    ]
    for name in both[0]:
        torch.testing.assert_close(both[0][name], both[1][name])
    torch.testing.assert_close(chosen_logprob(logits, Head(None, temperature=0.7), targets), both[0]["logprob"])


def test_token_scores_and_kl_by_hand():
    """p = (1/2, 1/4, 1/4): H = 1.5 ln 2, Σ p² = 3/8, Var(log p) = (ln 2)²/4, margin 1/4; against uniform KL = ln 3 −
    H.
    """
    log2 = 0.6931471805599453
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log() + 5
    found = token_scores(logits, Head(None), torch.tensor([1]))
    expected = {"logprob": -2 * log2, "entropy": 1.5 * log2, "sum_p2": 0.375, "varentropy": log2**2 / 4, "margin": 0.25}
    assert {name: x.item() for name, x in found.items()} == pytest.approx(expected)
    kl = kl_divergence(logits, Head(None), torch.zeros(1, 3, dtype=torch.float64), Head(None))
    assert kl.item() == pytest.approx(1.0986122886681098 - 1.5 * log2)


def test_nan_logits_are_an_error():
    with pytest.raises(ValueError, match="logits are not finite"):
        token_scores(torch.tensor([[0.0, torch.nan]]), Head(None), torch.tensor([0]))
