"""Importance proxies against slow, obvious computations on models small enough for them."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tokencredit.lm import importance, score
from tokencredit.lm.directions import Directions, Moved, select_parameters
from tokencredit.lm.exact import fisher_traces, gradient_norms2
from tokencredit.lm.local import fixed_layers, local_part
from tokencredit.lm.readout import find_readout, sequences
from tokencredit.lm.sketch import sketch

V = 11
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def llama(tied=False, **options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"tie_word_embeddings": tied} | options)).double().eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double().eval()


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 8, "tie_word_embeddings": True})).double().eval()


MODELS = {"llama": llama, "tied": lambda: llama(True), "gpt2": gpt2, "qwen3": qwen3}


def batch(lengths=(9, 6), prompt=3, seed=0, width=None):
    """Ragged rows padded on the right; everything behind the prompt counts."""
    width = width or max(lengths)
    ids = torch.randint(1, V, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    at = torch.arange(width)
    there = at < torch.tensor(lengths)[:, None]
    ids = torch.nn.functional.pad(ids, (0, width - ids.shape[1])) * there
    return ids, there.long(), (there & (at >= prompt)).long()


def slow_gradients(model, ids, there, wanted, weight=None):
    """{(row, position): gradient of its log-prob as {name: tensor}} by one backward pass each, without any of the
    library.
    """
    found, named = {}, {n: p for n, p in model.named_parameters() if p.requires_grad}
    for row, position in wanted.nonzero().tolist():
        length = int(there[row].sum())
        logits = model(input_ids=ids[row : row + 1, :length]).logits[0, position - 1].double()
        grads = torch.autograd.grad(logits.log_softmax(0)[ids[row, position]], list(named.values()), allow_unused=True)
        found[row, position] = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads)}
    return found


def prepared(model, masks, parameters="all"):
    rows = sequences(*masks)
    return find_readout(model, rows.ids[0]), select_parameters(model, parameters), rows


def values(result, kind, masks):
    return result[kind].value[masks[2].bool()].double()


@pytest.mark.parametrize("name", MODELS)
def test_exact_norms_are_those_of_a_backward_pass_per_token(name):
    model, masks = MODELS[name](), batch()
    slow = [
        sum(g.square().sum() for g in gradient.values()).sqrt() for gradient in slow_gradients(model, *masks).values()
    ]
    found = importance(model, *masks, kinds=("gradient_norm",), method="exact")
    torch.testing.assert_close(values(found, "gradient_norm", masks), torch.stack(slow), rtol=1e-5, atol=1e-7)
    assert found["gradient_norm"].method == "exact" and not found["gradient_norm"].standard_error.any()
    assert set(found.covered) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
def test_tangents_are_inner_products_with_the_direction(name, method):
    """s of every token is its exact gradient times the direction written out in full (the head's own use of its weight
    apart).
    """
    model, masks = MODELS[name](), batch()
    readout, coverage, rows = prepared(model, masks)
    assert not readout.whole
    found = sketch(readout, coverage, rows, num_directions=3, seed=4, method=method, tokens=64)
    head = next(n for n, p in model.named_parameters() if p is readout.head.weight)
    tied = found.tangents.head_logprob is not None
    assert tied == (name != "llama")
    for k in range(3):
        u = Directions(coverage, 3, 4).dense(k)
        slow = [
            sum((g[n] * u[n]).sum() for n in g if tied or n != head) for g in slow_gradients(model, *masks).values()
        ]
        total = found.tangents.logprob[k] + (found.tangents.head_logprob[k] if tied else 0)
        close = 0.01 if method == "finite_difference" else 1e-6
        assert (total - torch.stack(slow)).norm() <= close * torch.stack(slow).norm()
    assert (found.step is None) == (method == "jvp")


@pytest.mark.parametrize("name", MODELS)
def test_sketches_are_unbiased(name):
    """Means over 300 directions lie within 4 standard errors of the exact values for every token, and near them
    overall.
    """
    model, masks = MODELS[name](), batch(lengths=(7, 5))
    readout, coverage, rows = prepared(model, masks)
    found = sketch(readout, coverage, rows, num_directions=300, seed=1, method="finite_difference", tokens=64)
    exact = gradient_norms2(readout, coverage, rows), fisher_traces(readout, coverage, rows)
    for samples, truth in zip((found.norm2(), found.fisher()), exact):
        error = samples.std(0) / 300**0.5
        assert ((samples.mean(0) - truth).abs() <= 4 * error + 1e-6 * truth).all()
        assert abs(samples.mean() / truth.mean() - 1) < 0.15


def test_the_fisher_trace_is_the_mean_of_squared_norms_over_the_vocabulary():
    model, masks = llama(True), batch(lengths=(4,))
    slow = []
    for row, position in masks[2].nonzero().tolist():
        logits = model(input_ids=masks[0][row : row + 1]).logits[0, position - 1]
        total = 0.0
        for v in range(V):
            grads = torch.autograd.grad(
                logits.log_softmax(0)[v], list(model.parameters()), retain_graph=True, allow_unused=True
            )
            total += logits.softmax(0)[v].item() * sum(g.square().sum().item() for g in grads if g is not None)
        slow.append(total)
    found = importance(model, *masks, kinds=("fisher_trace",), method="exact")
    torch.testing.assert_close(
        values(found, "fisher_trace", masks), torch.tensor(slow, dtype=torch.float64), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_local_part_is_exact(name):
    """With keys and values detached by hand, a backward pass per token gives the local norm and its product with each
    direction.
    """
    model, masks = MODELS[name](), batch(lengths=(6,))
    readout, coverage, rows = prepared(model, masks)
    moved = Moved(readout.body, coverage, input_ids=rows.ids, attention_mask=rows.attention)
    directions = Directions(coverage, 2, 0)
    norm2, along = local_part(readout, moved, directions, rows)
    fixed = fixed_layers(readout.body)
    handles = [m.register_forward_hook(lambda m, args, out: out.detach()) for m in fixed]
    slow = slow_gradients(model, *masks)
    for handle in handles:
        handle.remove()
    linear = {
        f"{n}.weight"
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and m not in fixed and n != "lm_head"
    }
    expected = torch.stack([sum(g[n].square().sum() for n in linear) for g in slow.values()])
    torch.testing.assert_close(norm2.double(), expected, rtol=1e-4, atol=1e-6)
    for k in range(2):
        u = directions.dense(k)
        expected = torch.stack([sum((g[n] * u[n]).sum() for n in linear) for g in slow.values()])
        torch.testing.assert_close(along[k].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_last_block_norm_is_exact(name):
    model, masks = MODELS[name](), batch(lengths=(6, 5))
    last, fixed = model.model.layers[-1], fixed_layers(model.model)
    handles = [m.register_forward_hook(lambda m, args, out: out.detach()) for m in fixed]
    handles.append(last.register_forward_pre_hook(lambda m, args: (args[0].detach(), *args[1:])))
    slow = slow_gradients(model, *masks)
    # A tied weight's use in the embedding is cut off with the block's input; what is left is the head's.
    for handle in handles:
        handle.remove()
    found = importance(model, *masks, kinds=("last_block_norm",))
    expected = torch.stack([sum(x.square().sum() for x in g.values()) for g in slow.values()]).sqrt()
    torch.testing.assert_close(values(found, "last_block_norm", masks), expected, rtol=1e-5, atol=1e-6)


def test_the_head_norm_is_the_gradient_over_the_head():
    model, masks = llama(), batch()
    slow = [g["lm_head.weight"].norm() for g in slow_gradients(model, *masks).values()]
    found = importance(model, *masks, kinds=("head_norm",))
    torch.testing.assert_close(values(found, "head_norm", masks), torch.stack(slow), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_head_fisher_sums_the_diagonal_over_the_head(name):
    """Σ_k E_{v~p} (∂ log p_v / ∂ W_k)², over the vocabulary one by one; for the head as a parameter of its own."""
    model, masks = MODELS[name](), batch(lengths=(5,))
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    found = importance(model, *masks, kinds=("head_fisher", "head_norm"))
    log_p = model(input_ids=masks[0], attention_mask=masks[1]).logits.log_softmax(-1)
    for position in masks[2][0].nonzero()[:, 0].tolist():
        rows = [torch.autograd.grad(x, head.weight, retain_graph=True)[0] for x in log_p[0, position - 1]]
        diagonal = sum(x.exp() * g.square() for x, g in zip(log_p[0, position - 1].detach(), rows))
        assert found["head_fisher"].value[0, position].item() == pytest.approx(diagonal.sum().item(), rel=1e-5)
        written = rows[int(masks[0][0, position])].norm().item()
        assert found["head_norm"].value[0, position].item() == pytest.approx(written, rel=1e-5)


def test_attention_received_by_hand():
    model, masks = llama(), batch()
    model.set_attn_implementation("eager")
    layers = model(input_ids=masks[0], attention_mask=masks[1], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    found = importance(model, *masks, kinds=("attention",))["attention"].value
    assert model.config._attn_implementation == "sdpa"
    for row, length in enumerate((9, 6)):
        for j in range(3, length):
            later = [sum(a[row, :, i, j].sum().item() for a in layers) / len(layers) for i in range(j + 1, length)]
            assert found[row, j].item() == pytest.approx(sum(later) / max(len(later), 1), abs=1e-6)


def test_first_order_variance_is_that_of_small_perturbations():
    model, masks = llama(), batch(lengths=(7,))
    first = importance(model, *masks, kinds=("perturbation_variance", "gradient_norm", "surprisal"), method="exact")
    expected = (-2 * values(first, "surprisal", masks)).exp() * values(first, "gradient_norm", masks) ** 2
    torch.testing.assert_close(values(first, "perturbation_variance", masks), expected, rtol=1e-5, atol=0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    options = {"kinds": ("perturbation_variance",), "num_directions": 200, "seed": 3}
    drawn = importance(model, *masks, perturbation="gaussian", scale=1e-4, **options)["perturbation_variance"]
    on = masks[2].bool()
    assert ((drawn.value - first["perturbation_variance"].value).abs() <= 4 * drawn.standard_error)[on].all()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    dropped = importance(model, *masks, perturbation="dropout", scale=0.2, **options)["perturbation_variance"]
    assert (dropped.value[on] > 0).all() and (dropped.value <= 1).all()
    for kind, scale, told in (
        ("noise", None, "first_order, gaussian, dropout"),
        ("first_order", 0.1, "it takes no scale; gaussian, dropout do"),
        ("gaussian", 0.0, "a scale above 0, not 0"),
        ("dropout", 1.0, "above 0 and below 1, not 1"),
    ):
        with pytest.raises(ValueError, match=told):
            importance(model, *masks, kinds=("perturbation_variance",), perturbation=kind, scale=scale)


# What must not matter, and what must ----------------------------------------------------------------------------------

KINDS = ("entropy", "surprisal", "gradient_norm", "fisher_trace", "attention", "last_block_norm")


@pytest.mark.parametrize("method", ["exact", "jvp", "finite_difference"])
def test_padding_and_company_do_not_matter(method):
    model, (ids, there, wanted) = llama(), batch()
    kinds = KINDS if method != "exact" else KINDS[:3]
    options = {"kinds": kinds, "method": method}
    whole = importance(model, ids, there, wanted, **options)
    # A finite difference's step is calibrated on a row of the batch.
    close = {"rtol": 0.02 if method == "finite_difference" else 2e-4, "atol": 1e-5}
    pad = lambda x, left, right: torch.nn.functional.pad(x, (left, right))  # noqa: E731
    padded = importance(model, *(pad(x, 2, 3) for x in (ids, there, wanted)), **options)
    alone = importance(model, *(x[1:, :6] for x in (ids, there, wanted)), **options)
    for kind in kinds:
        torch.testing.assert_close(padded[kind].value[:, 2:-3], whole[kind].value, **close)
        assert not padded[kind].value[:, :2].any() and not whole[kind].value[~wanted.bool()].any()
        torch.testing.assert_close(alone[kind].value, whole[kind].value[1:, :6], **close)
    few = importance(model, ids, there, wanted, max_tokens=1, **options)
    torch.testing.assert_close(few[kinds[2]].value, whole[kinds[2]].value, **close)


def test_the_seed_decides_and_is_reported():
    model, masks = llama(), batch()
    run = lambda seed: importance(model, *masks, method="finite_difference", seed=seed)  # noqa: E731
    first, again, other = run(3), run(3), run(4)
    assert torch.equal(first["gradient_norm"].value, again["gradient_norm"].value)
    assert not torch.equal(first["gradient_norm"].value, other["gradient_norm"].value)
    assert (first.seed, first.num_directions, first.selection) == (3, 8, "all") and first.step.error < 0.05
    coverage = select_parameters(model)
    few, many = Directions(coverage, 2, 5), Directions(coverage, 4, 5)
    assert all(torch.equal(x, many.factors[n][f][:2]) for n, fs in few.factors.items() for f, x in fs.items())


def test_training_mode_and_gradients_are_left_alone():
    model, masks = llama(attention_dropout=0.5), batch()
    model.train()
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    importance(model, *masks, kinds=KINDS)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    assert all(p.requires_grad for p in model.model.layers[1].parameters())


def test_parameters_can_be_chosen():
    model, masks = llama(), batch()
    chosen = importance(model, *masks, kinds=("gradient_norm",), parameters=("*.mlp.*", "*norm*"), method="exact")
    assert chosen.covered and all("mlp" in n or "norm" in n for n in chosen.covered)
    slow = [sum(g[n].square().sum() for n in chosen.covered).sqrt() for g in slow_gradients(model, *masks).values()]
    torch.testing.assert_close(values(chosen, "gradient_norm", masks), torch.stack(slow), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="no parameter that can be moved matches 'lora' \\(is it a PEFT model\\?\\)"):
        importance(model, *masks, parameters="lora")


def test_lora_adapters():
    peft = pytest.importorskip("peft")
    model, masks = llama(), batch()
    adapted = (
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        .double()
        .eval()
    )
    found = importance(adapted, *masks, kinds=("gradient_norm",), parameters="lora")
    assert found["gradient_norm"].method == "exact" and all("lora_" in n for n in found.covered)
    trainable = importance(adapted, *masks, kinds=("gradient_norm",), parameters="trainable")
    assert trainable.covered == found.covered  # an adapter's training moves nothing else
    torch.testing.assert_close(trainable["gradient_norm"].value, found["gradient_norm"].value, rtol=0, atol=0)
    slow = slow_gradients(adapted, *masks)
    expected = torch.stack([sum(x.square().sum() for n, x in g.items() if "lora_" in n) for g in slow.values()])
    torch.testing.assert_close(values(found, "gradient_norm", masks) ** 2, expected, rtol=1e-5, atol=1e-7)
    readout, coverage, rows = prepared(adapted.get_base_model(), masks, "lora")
    samples = sketch(readout, coverage, rows, num_directions=300, seed=0, method="finite_difference", tokens=64).norm2()
    assert ((samples.mean(0) - expected).abs() <= 4 * samples.std(0) / 300**0.5).all()


def test_auto_is_exact_for_short_rows_and_sketches_long_ones():
    model = llama(max_position_embeddings=128)
    short = importance(model, *batch(lengths=(20,)), kinds=("gradient_norm",))
    long = importance(model, *batch(lengths=(80,)), kinds=("gradient_norm",))
    assert (short["gradient_norm"].method, long["gradient_norm"].method) == ("exact", "finite_difference")


def test_a_sketch_goes_over_to_forward_mode_where_no_finite_difference_agrees(monkeypatch):
    """As may happen on some step of a long training, which must not end there."""
    from tokencredit.lm import sketch as module

    monkeypatch.setattr(module, "AGREES", 0.0)
    model, rows = llama(max_position_embeddings=128), batch(lengths=(20,))
    with pytest.raises(ValueError, match="use method='jvp'"):
        importance(model, *rows, kinds=("gradient_norm",), method="finite_difference")
    found, forward = (
        importance(model, *rows, ("gradient_norm",), method=way)["gradient_norm"] for way in ("sketch", "jvp")
    )
    assert found.method == "jvp" and torch.equal(found.value, forward.value)


# Models and inputs that cannot be served as they are ------------------------------------------------------------------


class OneWay(torch.autograd.Function):
    """A kernel without forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Kernel(nn.Module):
    def forward(self, x):
        return OneWay.apply(x)


def test_a_model_without_forward_mode():
    model, masks = llama(), batch()
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), Kernel())
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM has no forward-mode derivative .*use method='finite_difference' or 'exact'"
    ):
        importance(model, *masks, method="jvp")
    found = importance(model, *masks, kinds=("fisher_trace",))
    assert found["fisher_trace"].method == "finite_difference" and found.step.against == "twice the step"


def test_custom_layers_are_covered_by_replacing_their_weight():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, masks = llama(), batch()
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Scaled(16, 24, bias=False).double()
    model.model.layers[0].mlp.up_proj.weight.data.copy_(old.weight)
    readout, coverage, rows = prepared(model, masks)
    found = sketch(readout, coverage, rows, num_directions=1, seed=0, method="jvp", tokens=64)
    u = Directions(coverage, 1, 0).dense(0)
    slow = [
        sum((g[n] * u[n]).sum() for n in g if n != "lm_head.weight") for g in slow_gradients(model, *masks).values()
    ]
    torch.testing.assert_close(found.tangents.logprob[0], torch.stack(slow), rtol=1e-5, atol=1e-6)


def test_quantised_weights_are_refused_by_name():
    class Packed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            scale = linear.weight.abs().max() / 127
            self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
            self.register_buffer("scale", scale)

        def forward(self, x):
            return x @ (self.weight.to(x.dtype) * self.scale).t()

    model, masks = llama(), batch()
    model.model.layers[1].mlp.up_proj = Packed(model.model.layers[1].mlp.up_proj)
    with pytest.raises(
        ValueError, match=r"cannot be moved: model\.layers\.1\.mlp\.up_proj\.weight \(stored as torch\.int8"
    ):
        importance(model, *masks)
    found = importance(model, *masks, uncovered="report", method="jvp")
    assert set(found.uncovered) == {"model.layers.1.mlp.up_proj.weight"} and not set(found.uncovered) & set(
        found.covered
    )
    assert importance(model, *masks, parameters="*layers.0*").uncovered == {}


def test_weights_that_are_nan():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        importance(model, *batch())


def test_bad_requests_are_named():
    model, (ids, there, wanted) = llama(), batch()
    with pytest.raises(ValueError, match="no kind is called 'gradient'"):
        importance(model, ids, there, wanted, kinds=("gradient",))
    with pytest.raises(ValueError, match="kl_to_ref needs ref_model"):
        importance(model, ids, there, wanted, kinds=("kl_to_ref",))
    with pytest.raises(ValueError, match="num_directions must be at least 2"):
        importance(model, ids, there, wanted, num_directions=1)
    with pytest.raises(ValueError, match=r"must be \[B, L\] alike"):
        importance(model, ids, there[:, :-1], wanted)
    with pytest.raises(ValueError, match="row 1: completion_mask marks tokens"):
        importance(model, ids, there, torch.ones_like(wanted) * (torch.arange(9) > 0))
    with pytest.raises(ValueError, match="row 0: the first token has nothing before it"):
        importance(model, ids, there, there)
    with pytest.raises(ValueError, match="row 0 has 40 tokens, more than the model's context of 32"):
        importance(model, *batch(lengths=(40,)))
    with pytest.raises(KeyError, match='"entropy" was not asked for'):
        importance(model, ids, there, wanted * 0)["entropy"]


def test_kl_to_itself_is_zero_and_to_another_model_is_not():
    model, masks = llama(), batch()
    torch.manual_seed(1)
    other = LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()
    assert not importance(model, *masks, kinds=("kl_to_ref",), ref_model=model)["kl_to_ref"].value.any()
    found = importance(model, *masks, kinds=("kl_to_ref",), ref_model=other)["kl_to_ref"].value
    p, q = (m(input_ids=masks[0], attention_mask=masks[1]).logits.log_softmax(-1) for m in (model, other))
    expected = (p.exp() * (p - q)).sum(-1)[:, :-1].detach()
    torch.testing.assert_close(found[:, 1:].double(), expected * masks[2][:, 1:], rtol=1e-5, atol=1e-7)


def test_kinds_of_one_forward_pass_are_scores():
    model, (ids, there, wanted) = llama(), batch()
    kinds = ("entropy", "varentropy", "margin", "sum_p2")
    found = importance(model, ids, there, wanted, kinds=kinds)
    own = [
        [row[(attended & ~counts).bool()].tolist(), row[counts.bool()].tolist()]
        for row, attended, counts in zip(ids, there, wanted)
    ]
    expected = score(model, *zip(*own), names=kinds)
    for kind in kinds:
        torch.testing.assert_close(found[kind].value[wanted.bool()], torch.cat(expected[kind]), rtol=1e-5, atol=1e-6)


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_models_logits(name):
    model = MODELS[name]()
    prompts, completions = [[1, 2, 3], [4, 5], [6]], [[7, 8], [], [9, 10, 1, 2]]
    found = score(model, prompts, completions, temperature=0.8, names=("logprob", "entropy", "margin", "sum_p2"))
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1] / 0.8
        log_p = logits.log_softmax(-1)[: len(completion)].detach()
        top = log_p.exp().topk(2).values
        expected = {
            "logprob": log_p.gather(1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0],
            "entropy": -(log_p.exp() * log_p).sum(1),
            "margin": top[:, 0] - top[:, 1],
            "sum_p2": (2 * log_p).exp().sum(1),
        }
        for key, value in expected.items():
            torch.testing.assert_close(found[key][i], value.float(), rtol=1e-5, atol=1e-5)


def test_score_names_what_is_wrong():
    model = llama()
    with pytest.raises(ValueError, match="row 1 has 33 tokens, more than the model's context of 32"):
        score(model, [[1], [1] * 30], [[2], [2] * 3])
    with pytest.raises(ValueError, match="row 0 has an empty prompt"):
        score(model, [[]], [[2]])
    with pytest.raises(ValueError, match="no score is called surprise"):
        score(model, [[1]], [[2]], names=("surprise",))
    with pytest.raises(ValueError, match="temperature must be positive"):
        score(model, [[1]], [[2]], temperature=0.0)


def test_a_head_that_bends_its_logits_is_found_out():
    """A model that changes its logits in a way its config does not tell is read whole, with the same results."""
    model, masks = llama(), batch()
    plain = importance(model, *masks, kinds=("entropy",))["entropy"].value

    class Bent(LlamaForCausalLM):
        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            out.logits = out.logits * 0.5
            return out

    model.__class__ = Bent
    assert find_readout(model, masks[0][0]).whole
    bent = importance(model, *masks, kinds=("entropy", "gradient_norm"), method="jvp")
    hot = importance(llama(), *masks, kinds=("entropy", "gradient_norm"), temperature=2.0, method="exact")
    assert not torch.allclose(bent["entropy"].value, plain)
    torch.testing.assert_close(bent["entropy"].value, hot["entropy"].value)
    many = importance(model, *masks, kinds=("gradient_norm",), method="jvp", num_directions=400)["gradient_norm"]
    assert ((many.value - hot["gradient_norm"].value).abs() <= 4 * many.standard_error + 1e-6).all()


@pytest.mark.parametrize("method", ["finite_difference", "jvp", "auto"])
def test_rows_are_measured_as_parts_of_their_batch(method):
    """As processes share a batch: the step is chosen on all of it, and a row is what it is among the others."""
    model, masks = MODELS["llama"]().float(), batch((12, 5, 9, 7))
    options = {"kinds": ("gradient_norm", "fisher_trace", "attention"), "num_directions": None}
    options |= {"method": method, "max_tokens": 24}
    together = importance(model, *masks, **options)
    parts = [importance(model, *masks, rows=rows, **options) for rows in (slice(0, 2), slice(2, 4))]
    for part in parts:
        assert part.step == together.step
    for kind, proxy in together.items():
        assert proxy.value.any()
        assert torch.allclose(sum(part[kind].value for part in parts), proxy.value, rtol=1e-5, atol=0)
        assert not parts[0][kind].value[2:].any() and not parts[1][kind].value[:2].any()
    none = importance(model, *masks, rows=slice(4, 4), **options)
    assert not any(proxy.value.any() for proxy in none.values())
