"""Samplers: the right distribution, the same rollouts in any batch, shared prefixes that change nothing, and bad
input.
"""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from tokencredit.lm import vllm_sampler
from tokencredit.lm.completions import sample
from tokencredit.lm.distribution import Settings, draw, entropy, log_probs, seed_of, uniforms
from tokencredit.lm.key_values import cached
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.sampling import Request, Trace, end_tokens
from tokencredit.tasks.exact import PROMPTS, PromptedPolicy, encode, modular_world, tiny_model

torch.set_num_threads(1)

END, LIMIT = 9, 6


def gpt2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=10, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
        return GPT2LMHeadModel(config).eval()


def sliding():
    """Attention to the last four tokens only, and shared key-value heads."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=10,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            sliding_window=4,
            initializer_range=0.5,
        )
        return MistralForCausalLM(config).eval()


TRACES = [
    Trace(tuple(encode(PROMPTS[k])), completion)
    for k, completion in ((3, (1, 2, 9)), (40, (0, 5, 7, 2, 1, 9)), (77, (6,)))
]


def all_requests(num=3):
    """From every prefix, with and without a token of its own."""
    return [
        Request(k, i, LIMIT - i - (token is not None), seed_of(k, i, n, str(token)), token)
        for k, trace in enumerate(TRACES)
        for i in range(len(trace.completion))
        for n in range(num)
        for token in (None, n)
    ]


def slowly(model, settings, trace, request):
    """One row, whole prefix read anew at every token, no cache."""
    ids = [*trace.prompt, *trace.completion[: request.prefix], *([] if request.token is None else [request.token])]
    step, found = request.prefix + (request.token is not None), ([], [], [])
    for k in range(request.budget):
        with torch.no_grad():
            log_p = log_probs(model(input_ids=torch.tensor([ids])).logits[:, -1], settings)
        token = int(draw(log_p, uniforms(torch.tensor([request.seed]), torch.tensor([step + k]))))
        ids.append(token)
        for store, value in zip(found, (token, float(log_p[0, token]), float(entropy(log_p)))):
            store.append(value)
        if token == END:
            break
    return found


@pytest.mark.parametrize("make", [tiny_model, gpt2, sliding])
@pytest.mark.parametrize("settings", [Settings(), Settings(0.7, top_k=5, top_p=0.9)], ids=["full", "truncated"])
def test_sharing_prefixes_changes_nothing(make, settings):
    """Every rollout, its log-probs and its entropies are those of a loop without any cache."""
    model, requests = make(), all_requests()
    found = dict(PrefixSampler(model, ends=[END], settings=settings, batch=7).continue_(TRACES, requests))
    assert sorted(found) == list(range(len(requests)))
    for index, request in enumerate(requests):
        ids, logprob, ent = slowly(model, settings, TRACES[request.trace], request)
        rollout = found[index]
        assert list(rollout.ids) == ids and rollout.truncated is (not ids or ids[-1] != END)
        np.testing.assert_allclose(rollout.logprob, logprob, atol=2e-5)
        np.testing.assert_allclose(rollout.entropy, ent, atol=2e-5)


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 5}, {"batch": 500}, {"batch": 8, "prefill_tokens": 1}])
def test_the_same_rollouts_in_any_batch(options):
    """Fixed requests: the borders between tokens are further from the uniforms than rounding, so that equality is
    exact.
    """
    model, requests = tiny_model(1), all_requests(5)
    whole = dict(PrefixSampler(model, ends=[END]).continue_(TRACES, requests))
    other = dict(PrefixSampler(model, ends=[END], **options).continue_(TRACES, requests))
    alone = requests[::17]
    few = dict(PrefixSampler(model, ends=[END]).continue_(TRACES, alone))
    assert {k: (r.ids, r.truncated) for k, r in whole.items()} == {k: (r.ids, r.truncated) for k, r in other.items()}
    assert [whole[17 * k].ids for k in range(len(alone))] == [few[k].ids for k in range(len(alone))]


def test_long_rollouts_outgrow_their_room():
    """Rows that stay while others come and go, past every capacity that was set aside."""
    model = tiny_model(2, scale=0.1)
    traces = [Trace((1, 2)), Trace((1, 2, 3, 4, 5, 6))]
    requests = [Request(k % 2, 0, 50, seed_of(k)) for k in range(40)]
    found = dict(PrefixSampler(model, ends=[END], batch=6).continue_(traces, requests))
    assert max(len(r.ids) for r in found.values()) > 40
    for index in range(0, 40, 7):
        assert list(found[index].ids) == slowly(model, Settings(), traces[index % 2], requests[index])[0]


def test_success_rates_are_those_of_the_exact_world():
    """Continuations of every prefix of length 1 succeed as often as enumeration says, within 4 standard errors."""
    world, model, prompt = modular_world(PROMPTS[40], 3), tiny_model(1), encode(PROMPTS[40])
    with torch.no_grad():
        exact = world.enumerate(PromptedPolicy(model, prompt))
    num, trace = 2000, [Trace(tuple(prompt), (0,))]
    requests = [Request(0, 0, 2, seed_of(token, n), token) for token in range(9) for n in range(num)]
    found = dict(PrefixSampler(model, ends=[END], batch=2048).continue_(trace, requests))
    rewards = [world.verify([requests[k].token, *found[k].ids]) for k in range(len(requests))]
    for token in range(9):
        rate, truth = np.mean(rewards[token * num : (token + 1) * num]), exact.value([token])
        assert abs(rate - truth) <= 4 * math.sqrt(truth * (1 - truth) / num) + 1e-12


def test_distributions_are_the_models_own():
    model, settings = tiny_model(1), Settings(0.8, top_k=4)
    for trace, log_p in zip(TRACES, PrefixSampler(model, ends=[END], settings=settings).distributions(TRACES)):
        for i in range(len(trace.completion)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*trace.prompt, *trace.completion[:i]]])).logits[:, -1]
            torch.testing.assert_close(log_p[i], log_probs(logits, settings)[0], atol=1e-5, rtol=0)
        assert log_p.exp().sum(-1).tolist() == pytest.approx([1.0] * len(log_p), abs=1e-5)


def test_filters_are_those_of_transformers():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 2
    for settings in (
        Settings(0.6),
        Settings(1.3, top_k=7),
        Settings(1.0, top_p=0.8),
        Settings(0.9, top_k=9, top_p=0.7),
    ):
        expected = logits / settings.temperature
        if settings.top_k:
            expected = TopKLogitsWarper(settings.top_k)(None, expected)
        if settings.top_p < 1:
            expected = TopPLogitsWarper(settings.top_p)(None, expected)
        torch.testing.assert_close(log_probs(logits, settings), expected.log_softmax(-1))


def test_uniforms_are_uniform_and_independent():
    seeds = torch.tensor([seed_of("u", k) for k in range(20000)])
    first, second = (uniforms(seeds, torch.tensor(step)) for step in (0, 1))
    for u in (first, second):
        assert float(u.min()) >= 0 and float(u.max()) < 1
        counts = torch.histc(u, 20, 0, 1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # 99.9 % of chi-squared with 19 degrees of freedom
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 4 / math.sqrt(20000)
    assert torch.equal(uniforms(seeds[5:6], torch.tensor([1])), second[5:6])


def test_a_token_without_probability_is_never_drawn():
    log_p = torch.tensor([[-math.inf, math.log(0.5), -math.inf, math.log(0.5), -math.inf]]).expand(5, -1)
    u = torch.tensor([0.0, 0.4999, 0.5, 0.9999999, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(log_p, u).tolist() == [1, 1, 3, 3, 3]


def test_greedy_is_the_argmax_and_a_point_mass():
    model = tiny_model(1)
    tokenizer = SimpleNamespace(eos_token_id=END)
    found = sample(model, tokenizer, [TRACES[0].prompt], 2, max_new_tokens=LIMIT, temperature=0.0)
    ids = list(TRACES[0].prompt)
    for token in found[0][0].ids:
        with torch.no_grad():
            assert token == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert found[0][0] == found[0][1]
    assert entropy(log_probs(torch.randn(3, 5), Settings(0.0))).tolist() == [0, 0, 0]


def test_sample_repeats_and_reports():
    model, heard = tiny_model(1), []
    tokenizer = SimpleNamespace(eos_token_id=END)
    prompts = [trace.prompt for trace in TRACES]
    options = {"max_new_tokens": LIMIT, "seed": 4}
    found = sample(model, tokenizer, prompts, 5, batch=4, progress=lambda *told: heard.append(told), **options)
    assert found == sample(model, tokenizer, prompts, 5, **options) and found != sample(
        model, tokenizer, prompts, 5, max_new_tokens=LIMIT
    )
    rows, tokens = map(sum, zip(*heard))
    assert rows == pytest.approx(15) and tokens == sum(len(c.ids) for group in found for c in group)
    assert [len(group) for group in found] == [5, 5, 5]
    assert all(
        c.truncated == (c.ids[-1] != END) and (len(c.ids) == LIMIT or not c.truncated) for group in found for c in group
    )


def test_requests_that_need_no_model():
    """An end token as the alternative, and no length left."""
    model = tiny_model()
    sampler = PrefixSampler(model, ends=[END])
    model.forward = None
    found = dict(sampler.continue_(TRACES, [Request(0, 1, 4, 0, END), Request(0, 2, 0, 0, 3)]))
    assert found[0].ids == () and found[0].truncated is False and found[1].ids == () and found[1].truncated is True


def test_bad_input():
    model = tiny_model()
    sampler = PrefixSampler(model, ends=[END])
    with pytest.raises(ValueError, match="prompt 0 has 70 tokens, but the context is 64"):
        list(sampler.continue_([Trace((1,) * 70)], [Request(0, 0, 3, 0)]))
    with pytest.raises(ValueError, match="lower max_new_tokens to 4"):
        list(sampler.continue_([Trace((1,) * 60)], [Request(0, 0, 5, 0)]))
    with pytest.raises(ValueError, match="prefix"):
        list(sampler.continue_(TRACES, [Request(0, 4, 1, 0)]))
    with pytest.raises(ValueError, match="at least one token"):
        Trace(())
    with pytest.raises(ValueError, match="top_p"):
        Settings(top_p=0.0)
    with pytest.raises(ValueError, match="end-of-sequence"):
        end_tokens(SimpleNamespace(), SimpleNamespace(eos_token_id=None))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        list(sampler.continue_(TRACES, [Request(0, 0, 3, 0)]))
    with pytest.raises(ValueError, match="NaN"):
        list(sampler.distributions(TRACES))


def test_sampling_leaves_the_model_and_the_gradients_alone():
    model = tiny_model().train()
    rollouts = PrefixSampler(model, ends=[END]).continue_(TRACES, all_requests())
    next(rollouts)
    assert torch.is_grad_enabled()
    list(rollouts)
    assert model.training and torch.is_grad_enabled()


def test_a_state_that_cannot_be_cut_is_refused(monkeypatch):
    class Recurrent:
        pass

    monkeypatch.setattr("tokencredit.lm.key_values.DynamicCache", lambda config: SimpleNamespace(layers=[Recurrent()]))
    with pytest.raises(ValueError, match=r"cannot be cut back to a prefix \(Recurrent\)"):
        PrefixSampler(tiny_model(), ends=[END])


class FakeVllm:
    """The part of vLLM's interface that is used, answering from a transformers model with vLLM's conventions."""

    def __init__(self, model):
        self.model, self.calls = model, []

    class SamplingParams(SimpleNamespace):
        pass

    def generate(self, prompts, params, use_tqdm):
        assert len(prompts) == len(params)
        return [self._one(prompt["prompt_token_ids"], p) for prompt, p in zip(prompts, params)]

    def _one(self, ids, p):
        self.calls.append((tuple(ids), p))
        with torch.no_grad():
            log_p = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        if getattr(p, "prompt_logprobs", None) is not None:
            number = log_p.shape[1] if p.prompt_logprobs == -1 else p.prompt_logprobs
            rows = [
                {
                    int(t): SimpleNamespace(logprob=float(row[t]))
                    for t in {*row.topk(number).indices.tolist(), following}
                }
                for row, following in zip(log_p, ids[1:])
            ]
            return SimpleNamespace(prompt_logprobs=[None, *rows])
        settings, written, known = Settings(p.temperature, p.top_k, p.top_p), [], []
        while len(written) < p.max_tokens and not (written and written[-1] in p.stop_token_ids):
            with torch.no_grad():
                now = log_probs(self.model(input_ids=torch.tensor([[*ids, *written]])).logits[:, -1], settings)
            token = int(draw(now, uniforms(torch.tensor([p.seed]), torch.tensor([len(written)]))))
            written.append(token)
            known.append({token: SimpleNamespace(logprob=float(now[0, token]))})
        reason = "stop" if written[-1] in p.stop_token_ids else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=written, logprobs=known, finish_reason=reason)])


@pytest.mark.parametrize("settings", [Settings(), Settings(0.7, top_k=4)])
def test_vllm_keeps_the_contract(monkeypatch, settings):
    """Same distributions, exact token ids, remaining budgets, requests of one prefix next to each other."""
    model = tiny_model(1)
    fake = FakeVllm(model)
    monkeypatch.setattr(vllm_sampler, "_vllm", lambda: fake)
    sampler = vllm_sampler.VllmSampler(fake, ends=[END], vocab=10, settings=settings)
    for mine, theirs in zip(
        sampler.distributions(TRACES), PrefixSampler(model, ends=[END], settings=settings).distributions(TRACES)
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    fake.calls.clear()
    requests = [*all_requests(), Request(0, 1, 4, 0, END)]
    found = dict(sampler.continue_(TRACES, requests))
    assert sorted(found) == list(range(len(requests))) and found[len(requests) - 1].truncated is False
    for index, request in enumerate(requests[:-1]):
        rollout = found[index]
        assert min(1, request.budget) <= len(rollout.ids) <= request.budget
        assert rollout.truncated is (rollout.ids[-1:] != (END,))
        assert len(rollout.logprob) == len(rollout.ids) and all(math.isnan(h) for h in rollout.entropy)
    prefixes = [ids for ids, _ in fake.calls]
    heads = [next(k for k, t in enumerate(TRACES) if ids[: len(t.prompt)] == t.prompt) for ids in prefixes]
    assert heads == sorted(heads) and {p.seed for _, p in fake.calls} == {r.seed for r in requests[:-1] if r.budget}


def test_vllm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="tokencredit\\[vllm\\]"):
        vllm_sampler.VllmSampler.load("a/model", ends=[END])


def test_a_cache_is_handed_over_by_the_name_that_the_model_has():
    """Newer transformers call it `cache`, and drop `past_key_values` in 5.40."""

    class Older:
        def forward(self, input_ids, past_key_values=None, use_cache=None): ...

    class Newer:
        def forward(self, input_ids, cache=None, use_cache=None): ...

    assert cached(Older(), "kept") == {"past_key_values": "kept", "use_cache": True}
    assert cached(Newer(), "kept") == {"cache": "kept", "use_cache": True}
