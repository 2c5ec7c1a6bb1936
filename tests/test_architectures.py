"""Per-token quantities on many architectures, against plain transformers and autograd: right, or refused by name."""

import contextlib
import copy
import functools
import re
import warnings

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, VOCAB, tiny
from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_scoring import checked_scoring, without_dropout
from tokencredit.lm import importance
from tokencredit.lm.directions import select_parameters
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.readout import find_readout, sequences
from tokencredit.lm.sampling import Request, Trace
from tokencredit.lm.sketch import sketch
from trl_tiny import build

LENGTHS, PROMPT = (14, 9, 11), 4
NO_KEYS = "no separate k_proj and v_proj to hold fixed"
ROUTER = "does not turn one tensor into another"
NO_HEAD = "its LM head does not read what its body returns"
REFUSED = {
    "head_norm": {"minicpm3": NO_HEAD},
    "last_block_norm": {
        **dict.fromkeys(("gpt2", "gpt2+lora", "gpt_bigcode"), f"{NO_KEYS}; they are made by attn.c_attn"),
        **dict.fromkeys(("phi3",), f"{NO_KEYS}; they are made by self_attn.qkv_proj"),
        **dict.fromkeys(("gpt_neox",), f"{NO_KEYS}; they are made by attention.query_key_value"),
        **dict.fromkeys(
            ("bloom", "falcon", "falcon_alibi"), f"{NO_KEYS}; they are made by self_attention.query_key_value"
        ),
        **dict.fromkeys(("mpt", "codegen", "deepseek_v3", "mamba", "recurrent_gemma"), NO_KEYS),
        **dict.fromkeys(
            ("mixtral", "olmoe", "olmoe+lora", "qwen2_moe", "qwen3_moe"), rf"model\.layers\.1\.mlp\.gate .*{ROUTER}"
        ),
        "phimoe": rf"model\.layers\.1\.mlp\.router .*{ROUTER}",
        "granitemoe": rf"model\.layers\.1\.block_sparse_moe\.router .*{ROUTER}",
        "gpt_oss": rf"model\.layers\.1\.self_attn .*{ROUTER}",
        "falcon_h1": r"model\.layers\.1\.mamba .* is neither linear nor elementwise",
        "minicpm3": NO_HEAD,
        "llama+dora": r"its layer model\.layers\.1\.self_attn\.q_proj\.lora_",
    },
    "attention": {
        "falcon": "of its reported attention to later tokens",
        "mamba": "reports no attention weights",
    },
    "sampler": dict.fromkeys(("mamba", "recurrent_gemma", "falcon_h1"), "a state that cannot be cut back to a prefix"),
    "trainer": {},
}
MOVED = {"gpt2", "gpt2+lora", "gpt_neo", "gpt_bigcode", "biogpt"}
"""Positions count padding where none are given: TRL's scores are mended by moving rows to the left."""
PLAIN = {"recurrent_gemma"}
"""Logits are bent in a way that TRL's fused head does not know: mended by the model's own logits."""


def refused(what, name):
    """A context in which the call must raise with the expected words, or one in which it must not."""
    expected = REFUSED[what].get(name)
    return pytest.raises(ValueError, match=expected) if expected else contextlib.nullcontext()


@functools.cache
def batch():
    """Ragged rows, padded on either side."""
    width = max(LENGTHS)
    ids = torch.randint(2, VOCAB, (3, width), generator=torch.Generator().manual_seed(0))
    there = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    wanted = there & (torch.arange(width) >= PROMPT)
    turned = [torch.stack([x[0], x[1].roll(width - LENGTHS[1]), x[2]]) for x in (ids, there, wanted)]
    return tuple(x.long() for x in turned)


def rows():
    """(row, its tokens, where its completion begins)."""
    ids, there, _ = batch()
    return [(i, ids[i][there[i].bool()][None]) for i in range(len(ids))]


@functools.cache
def model(name):
    return tiny(name)


@functools.cache
def distributions(name):
    """Per row, the log-probs [tokens, V] that predict its completion: the plain model on the row alone."""
    with torch.no_grad():
        return [
            model(name)(input_ids=own, use_cache=False).logits[0, PROMPT - 1 : -1].log_softmax(-1) for _, own in rows()
        ]


def truth(name):
    """(log-probs, entropies) of all completion tokens."""
    chosen = [log_p.gather(1, own[0, PROMPT:, None])[:, 0] for log_p, (_, own) in zip(distributions(name), rows())]
    return torch.cat(chosen), torch.cat([-(log_p.exp() * log_p).sum(1) for log_p in distributions(name)])


def proxy(name, kind, **options):
    found = importance(model(name), *batch(), kinds=(kind,), **options)[kind]
    return found.value[batch()[2].bool()]


def gradients(net, parameters):
    """Squared norms [N] by one backward pass per token."""
    found = []
    for _, own in rows():
        log_p = net(input_ids=own, use_cache=False).logits[0, PROMPT - 1 : -1].log_softmax(-1)
        for value in log_p.gather(1, own[0, PROMPT:, None])[:, 0]:
            grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            found.append(sum(g.double().square().sum() for g in grads if g is not None))
    return torch.stack(found).float()


@functools.cache
def norms2(name):
    net = model(name)
    for p in net.parameters():
        p.requires_grad_(True)
    return gradients(net, list(net.parameters()))


def untied(name):
    """A copy of the model without its adapters' wrapper, whose head has a weight of its own."""
    net = copy.deepcopy(model(name))
    net = net.get_base_model() if hasattr(net, "get_base_model") else net
    head = net.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    for p in net.parameters():
        p.requires_grad_(True)
    return net


NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


def test_the_table_is_wide():
    """At least 25 architectures, and no expected refusal of one that is not there."""
    assert len({kind for kind, _ in ARCHITECTURES.values()}) >= 25
    assert {name for table in REFUSED.values() for name in table} | MOVED | PLAIN | GENERATED <= set(ARCHITECTURES)


@NAMES
def test_scores(name):
    logprob, entropy = truth(name)
    torch.testing.assert_close(proxy(name, "surprisal"), -logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(proxy(name, "entropy"), entropy, rtol=1e-5, atol=1e-5)


@NAMES
def test_scores_in_half_precision(name):
    """bfloat16 rounds each logit by 1/256 of its size: nothing else may come on top, such as a soft-cap left out."""
    net = copy.deepcopy(model(name)).bfloat16()
    _, own = rows()[0]
    readout = find_readout(net, own[0])
    with torch.no_grad():
        logits = net(input_ids=own, use_cache=False).logits[0].float()
        found = readout.head.logits(readout.hidden(own, torch.ones_like(own))[0].float())
    room = 4 * logits.abs().amax() / 256
    assert (found.log_softmax(-1) - logits.log_softmax(-1)).abs().max() <= room
    # Roundings have either sign and cancel; a bend of the logits does not.
    slope = ((found - logits) * logits).sum() / logits.square().sum()
    assert slope.abs() < 2e-3


@NAMES
def test_head_norm(name):
    with refused("head_norm", name):
        found = proxy(name, "head_norm")
        net = untied(name)
        torch.testing.assert_close(
            found, gradients(net, list(net.get_output_embeddings().parameters())).sqrt(), rtol=1e-3, atol=1e-5
        )


@NAMES
def test_last_block_norm(name):
    """With the last block's input, keys and values cut off by hand, every parameter's gradient counts."""
    with refused("last_block_norm", name):
        found = proxy(name, "last_block_norm")
        net = untied(name)
        blocks = next(m for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
        blocks[-1].register_forward_pre_hook(lambda m, args, kw: (_cut(args), _cut(kw)), with_kwargs=True)
        for at, m in blocks[-1].named_modules():
            if re.search(r"\b(k_proj|v_proj|k_norm|k_layernorm)$", at):
                m.register_forward_hook(lambda m, args, out: out.detach())
        torch.testing.assert_close(found, gradients(net, list(net.parameters())).sqrt(), rtol=1e-3, atol=1e-5)


def _cut(values):
    off = lambda x: x.detach() if torch.is_tensor(x) and x.is_floating_point() else x  # noqa: E731
    return {k: off(v) for k, v in values.items()} if isinstance(values, dict) else tuple(map(off, values))


@NAMES
def test_exact_norms(name):
    torch.testing.assert_close(proxy(name, "gradient_norm", method="exact"), norms2(name).sqrt(), rtol=1e-3, atol=1e-5)


DIRECTIONS = 48


@NAMES
def test_sketched_norms(name):
    """Finite differences of a fixed seed: the mean over tokens within 5 standard errors; no token far off.

    A mean of 48 squares has relative deviation √(2/48) = 20 %, so 3 times too large or too small is beyond 5
    deviations; a step across a routing border made single tokens 40 to 1,700 times too large.
    """
    net = model(name)
    inner = net.get_base_model() if hasattr(net, "get_base_model") else net
    parts = sequences(*batch())
    readout, coverage = find_readout(inner, parts.ids[0]), select_parameters(inner)
    drawn = sketch(readout, coverage, parts, num_directions=DIRECTIONS, seed=1, method="finite_difference", tokens=4096)
    order = torch.cat([(parts.row == i).nonzero()[:, 0] for i in range(3)])
    samples, exact = drawn.norm2()[:, order].double(), norms2(name).double()
    share = samples.sum(1) / exact.sum()
    assert (share.mean() - 1).abs() <= 5 * share.std() / DIRECTIONS**0.5
    ratio = samples.mean(0) / exact
    assert ratio.max() < 3 and ratio.min() > 1 / 3


@NAMES
def test_attention(name):
    """Weights of a model that was made with eager attention, on each row alone."""
    with refused("attention", name):
        found = proxy(name, "attention")
        expected, net = [], tiny(name, attn_implementation="eager")
        for _, own in rows():
            with torch.no_grad():
                layers = net(input_ids=own, use_cache=False, output_attentions=True).attentions
            total = torch.stack([a[0].sum(0) for a in layers if a is not None]).mean(0).tril(-1).sum(0)
            later = torch.arange(len(total) - 1, -1, -1).clamp(min=1)
            expected.append((total / later)[PROMPT:])
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@NAMES
def test_prefix_sampler(name):
    """What it reads and what it writes, with shared prefixes of several lengths in one batch."""
    net = model(name)
    draw = torch.Generator().manual_seed(0)
    tokens = lambda n: tuple(torch.randint(2, VOCAB, (n,), generator=draw).tolist())  # noqa: E731
    traces = [Trace(tokens(prompt), tokens(completion)) for prompt, completion in ((5, 6), (3, 9), (8, 4))]
    asked = ((0, 0, None), (0, 5, 7), (1, 3, None), (1, 9, 4), (2, 2, 5), (2, 4, None))
    requests = [Request(trace=t, prefix=p, token=token, seed=9 * t + p, budget=6) for t, p, token in asked]
    with refused("sampler", name):
        sampler = PrefixSampler(net, ends=(1,), batch=4)
        for trace, found in zip(traces, sampler.distributions(traces)):
            expected = _log_probs(net, trace.prompt, trace.completion)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        rollouts = dict(sampler.continue_(traces, requests))
        assert sum(len(rollout.ids) for rollout in rollouts.values()) > 12
        for i, rollout in rollouts.items():
            trace, request = traces[requests[i].trace], requests[i]
            head = (
                *trace.prompt,
                *trace.completion[: request.prefix],
                *(() if request.token is None else (request.token,)),
            )
            log_p = _log_probs(net, head, rollout.ids)
            chosen = log_p.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprob), chosen, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _log_probs(net, head, more):
    logits = net(input_ids=torch.tensor([[*head, *more]]), use_cache=False).logits[0]
    return logits[len(head) - 1 : len(head) - 1 + len(more)].log_softmax(-1)


SCORED = 5


def padded():
    """(ids, attention) as TRL has them: prompts that end in one column, completions of SCORED tokens behind."""
    width = max(LENGTHS)
    ids, there = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for i, own in rows():
        ids[i, width - own.shape[1] :], there[i, width - own.shape[1] :] = own[0], 1
    return ids, there


GENERATED = {"recurrent_gemma"}
"""Padding on the left reaches its local attention: transformers' generate is up to 0.02 nats off there."""


@NAMES
def test_transformers_samples_from_the_model_that_is_scored(name):
    """Prompts padded on the left, as CreditTrainer generates without vLLM: log-probs of three greedy tokens."""
    ids, there = padded()
    with torch.no_grad():
        out = model(name).generate(
            input_ids=ids,
            attention_mask=there,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=[],
            pad_token_id=0,
        )
    worst = 0.0
    for i, own in rows():
        written = out.sequences[i, ids.shape[1] :].tolist()
        expected = _log_probs(model(name), own[0].tolist(), written)
        found = torch.stack([step[i] for step in out.logits]).log_softmax(-1)
        worst = max(worst, float((found - expected).abs().max()))
    assert worst < (0.02 if name in GENERATED else 1e-4)
    assert worst > 1e-3 or name not in GENERATED


@NAMES
def test_trainers_scores(name, tmp_path):
    """Log-probs, entropies and the gradient that CreditTrainer takes, with the architecture's own dropout on."""
    with warnings.catch_warnings(record=True) as said, refused("trainer", name):
        warnings.simplefilter("always")
        trainer = build(CreditTrainer, tmp_path, method="gtpo", model=tiny(name))
        trainer.model.train()
        trainer._scoring = scoring = checked_scoring(trainer)
    assert (scoring.moved or scoring.plain) == (name in MOVED | PLAIN) and scoring.plain == (name in PLAIN)
    assert any("nats in the mean from those of the model" in str(w.message) for w in said) == (name in MOVED | PLAIN)
    ids, there = padded()
    score = lambda: trainer._get_per_token_logps_and_entropies(  # noqa: E731
        trainer.model, ids, there, SCORED, compute_entropy=True
    )
    with torch.no_grad():
        logprob, entropy, *_ = score()
    last = lambda x: torch.stack([row[-SCORED:] for row in x.split([n - PROMPT for n in LENGTHS])])  # noqa: E731
    expected = [last(x) for x in truth(name)]
    torch.testing.assert_close(logprob, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-4, atol=1e-4)
    with without_dropout(trainer.model):
        score()[0].sum().backward()
    found = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    named = dict(zip(trainer.model.parameters(), model(name).parameters()))
    plain = sum(
        model(name)(input_ids=own).logits[0, -SCORED - 1 : -1].log_softmax(-1).gather(1, own[0, -SCORED:, None]).sum()
        for _, own in rows()
    )
    twins = [named[p] for p in trainer.model.parameters() if p.grad is not None]
    for p in twins:
        p.requires_grad_(True)
    grads = torch.autograd.grad(plain, twins)
    off = sum((a - b).square().sum() for a, b in zip(found, grads))
    assert off <= 1e-6 * sum(g.square().sum() for g in grads)
