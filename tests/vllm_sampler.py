"""vLLM, really run on a CPU: `make test-vllm`, in an environment of its own. Not collected with the other tests.

vLLM's attention on CPUs takes heads of 32 and more, so the model is a tiny Llama of this file, with the shipped model's
tokenizer and heads of 64.
"""

import json
import os
import shutil

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tokencredit.cli import main
from tokencredit.lm.load import resolve_model
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.sampling import Request, Trace
from tokencredit.lm.vllm_sampler import VllmSampler

LIMIT = 16
ENGINE = ["--sampler-option", "max_model_len=128", "--sampler-option", "enforce_eager=true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its end token is as likely as any other."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("reckon"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(resolve_model("reckon"), name), folder)
    return str(folder)


def config(model, **options):
    chosen = {"max_model_len": 128, "enforce_eager": True} if options.get("sampler") == "vllm" else {}
    return PolicyConfig(model, task="reckon", max_new_tokens=LIMIT, sampler_options=chosen, **options)


@pytest.fixture(scope="module")
def policies(model):
    """(by transformers, by vLLM)"""
    return config(model).open(), config(model, sampler="vllm").open()


@pytest.fixture(scope="module")
def traces(policies):
    plain, _ = policies
    prompts = plain.encode_rows(plain.task.rows("train", 4, 0))
    return [Trace(tuple(prompt), c.ids) for prompt, [c] in zip(prompts, plain.complete(prompts, 1, seed=0))]


@pytest.mark.parametrize("settings", ({}, {"temperature": 0.7}, {"top_k": 5}))
def test_distributions_are_those_of_transformers(policies, traces, settings):
    from dataclasses import replace

    ours, theirs = (replace(policy, **settings).sampler() for policy in policies)
    assert isinstance(theirs, VllmSampler)
    for mine, other in zip(ours.distributions(traces), theirs.distributions(traces)):
        torch.testing.assert_close(other.exp(), mine.exp(), atol=1e-4, rtol=0)


def test_rollouts_own_their_randomness(policies, traces):
    """The same requests in another order give the same tokens; their log-probs are those of transformers."""
    sampler = policies[1].sampler()
    requests = [Request(k, 0, LIMIT, 1000 * k + n) for k in range(len(traces)) for n in range(16)]
    there = dict(sampler.continue_(traces, requests))
    back = {len(requests) - 1 - i: rollout for i, rollout in sampler.continue_(traces, requests[::-1])}
    assert all(there[i].ids == back[i].ids for i in there) and len({each.ids for each in there.values()}) > 20
    first = [there[16 * k] for k in range(len(traces))]
    wholes = [Trace(trace.prompt, rollout.ids) for trace, rollout in zip(traces, first)]
    for rollout, log_p in zip(first, policies[0].sampler().distributions(wholes)):
        wanted = log_p[torch.arange(len(rollout.ids)), torch.tensor(rollout.ids)]
        np.testing.assert_allclose(rollout.logprob, wanted.numpy(), atol=1e-3)


def test_means_are_those_of_transformers(policies, traces):
    """Lengths of 512 completions of each sampler, within four standard errors of each other."""
    lengths = [[len(c.ids) for c in policy.complete([traces[0].prompt], 512, seed=3)[0]] for policy in policies]
    error = np.sqrt(sum(np.var(each) for each in lengths) / 512)
    assert abs(np.mean(lengths[0]) - np.mean(lengths[1])) < 4 * error + 1e-9


def test_the_commands_sample_with_it(model, tmp_path):
    words = ["--model", model, "--task", "reckon", "--max-new-tokens", str(LIMIT), "--sampler", "vllm", *ENGINE]
    assert main(["evaluate", *words, "--prompts", "4", "--samples", "2", "--out", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["policy"]["sampler"] == "vllm"
    assert main(["score", *words, "--prompts", "4", "--out", str(tmp_path / "s.parquet")]) == 0
    assert parquet.read_table(tmp_path / "s.parquet").num_rows == 4
    run = ["pivotality", "run", "--model", model, "--task", "reckon", "--max-new-tokens", str(LIMIT), "--prompts", "3"]
    run += ["--samples", "1", "--rollouts", "4", "--out", str(tmp_path / "run")]
    assert main([*run, "--sampler", "vllm", *ENGINE]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["identity"]["sampler"]["kind"] == "VllmSampler" and result["figures"]["rollouts"]["value"] > 0
    assert main(run) == 1, "what vLLM sampled is not taken for what transformers would have"


def test_the_study_samples_with_it(model, tmp_path):
    words = [
        "--model",
        model,
        "--task",
        "reckon",
        "--max-new-tokens",
        "8",
        "--sampler",
        "vllm",
        *ENGINE,
        "--exact",
        "no",
    ]
    small = [
        "--prompts",
        "6",
        "--rollouts",
        "8",
        "--bootstraps",
        "20",
        "--condition-prompts",
        "4",
        "--temperatures",
        "1",
    ]
    out = ["--proxies", "entropy", "--out", str(tmp_path / "study")]
    assert main(["study", "correlation", *words, *small, *out]) == 0


def test_an_adapter_is_refused(model, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(model, name), tmp_path)
    with pytest.raises(ValueError, match="is an adapter, which is sampled with transformers"):
        config(str(tmp_path), sampler="vllm").open()
