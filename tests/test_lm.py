"""Sampling, scoring and evaluating a language model, against slow references and the model's own distribution."""

import os
import shutil
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tokencredit.checkpoints import clear_after, seal
from tokencredit.lm.completions import sample
from tokencredit.lm.evaluate import evaluate
from tokencredit.lm.load import load_config, load_model, load_tokenizer, resolve_model
from tokencredit.lm.policy import Policy
from tokencredit.lm.prompts import encode_prompt, encode_prompts
from tokencredit.lm.sampling import end_tokens
from tokencredit.lm.scoring import score
from tokencredit.tasks.reckon import Reckon, model_path
from tokencredit.tasks.world import make_model, make_tokenizer

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}={% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(model_path()))


@pytest.fixture(scope="module")
def shipped():
    return load_model(str(model_path()))


@pytest.fixture
def tiny():
    """An untrained model whose next-token distribution is far from flat."""
    torch.manual_seed(0)
    model = make_model().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def slow_scores(model, prompt, completion, temperature):
    """One row at a time, one position at a time, in float64."""
    model = model.double()
    logprob, entropy = [], []
    for t in range(len(completion)):
        logits = model(torch.tensor([[*prompt, *completion[:t]]])).logits[0, -1] / temperature
        p = torch.softmax(logits, -1)
        logprob.append(p[completion[t]].log().item())
        entropy.append(-(p * p.log()).sum().item())
    model.float()
    return torch.tensor(logprob), torch.tensor(entropy)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_scores_are_the_slow_ones(tiny, temperature):
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (3, 7), (9, 2), (2, 0), (5, 12), (1, 4)]
    prompts, completions = ([rng.integers(3, 26, size=pair[i]).tolist() for pair in lengths] for i in (0, 1))
    found = score(tiny, prompts, completions, temperature=temperature)
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        logprob, entropy = slow_scores(tiny, prompt, completion, temperature)
        assert found["logprob"][i].dtype == torch.float32 and found["logprob"][i].shape == (len(completion),)
        torch.testing.assert_close(found["logprob"][i], logprob.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["entropy"][i], entropy.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_do_not_depend_on_the_company(tiny, batch):
    prompts, completions = [[3, 4], [5] * 9, [6], [7, 8, 9]], [[4] * 6, [5], [9, 9, 2], [10]]
    together = score(tiny, prompts, completions)
    apart = score(tiny, prompts, completions, batch=batch)
    for name in together:
        for a, b in zip(together[name], apart[name]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_scores_name_the_row_that_cannot_be_scored(tiny):
    with pytest.raises(ValueError, match="row 1 has 257 tokens, more than the model's context of 256"):
        score(tiny, [[3], [3] * 250], [[4], [4] * 7])
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        score(tiny, [[3], []], [[4], [4]])
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        score(tiny, [[3], [3]], [[4]])
    with pytest.raises(ValueError, match="temperature must be positive"):
        score(tiny, [[3]], [[4]], temperature=0)


def misled(model):
    """The model with a generation config like those that hub models come with: it must change nothing."""
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, top_p=0.5, repetition_penalty=5.0, min_p=0.3
    )
    return model


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_have_the_models_distribution(tiny, tokenizer, temperature):
    """Chi-square of first tokens, and of second tokens after the most frequent first; n is fixed, four standard errors
    allowed.
    """
    prompt, num = [1, 5, 13, 7, 16], 6000
    got = sample(misled(tiny), tokenizer, [prompt], num, max_new_tokens=2, temperature=temperature, seed=1)[0]
    firsts = [c.ids[0] for c in got]
    common = max(set(firsts) - {tokenizer.eos_token_id}, key=firsts.count)
    for context, tokens in ((prompt, firsts), ([*prompt, common], [c.ids[1] for c in got if c.ids[0] == common])):
        with torch.no_grad():
            p = torch.softmax(tiny(torch.tensor([context])).logits[0, -1].double() / temperature, -1).numpy()
        rare = p * len(tokens) < 5
        counts = np.bincount(tokens, minlength=len(p))
        observed = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(p[~rare], p[rare].sum()) * len(tokens)
        df = len(observed) - 1
        assert df >= 3, "a distribution this narrow shows nothing"
        assert ((observed - expected) ** 2 / expected).sum() < df + 4 * np.sqrt(2 * df)


def test_the_check_of_the_distribution_sees_top_k(tiny, tokenizer):
    p = torch.softmax(tiny(torch.tensor([[1, 5, 13, 7, 16]])).logits[0, -1], -1)
    got = sample(misled(tiny), tokenizer, [[1, 5, 13, 7, 16]], 500, max_new_tokens=1)[0]
    assert p.topk(2).values.sum() < 0.9 and len({c.ids for c in got}) > 4


def test_sampling_is_reproducible_and_leaves_no_trace(shipped, tokenizer):
    prompts = encode_prompts(tokenizer, Reckon().rows("test", 6), shipped.config, 48, chat=None)
    torch.manual_seed(5)
    before, config, shipped.training = torch.get_rng_state(), shipped.generation_config, True
    a, b, other = (sample(shipped, tokenizer, prompts, 3, max_new_tokens=48, seed=seed) for seed in (1, 1, 2))
    assert a == b != other
    assert [len(group) for group in a] == [3] * 6
    assert torch.equal(before, torch.get_rng_state()) and shipped.training and shipped.generation_config is config
    shipped.eval()


def test_completions_end_with_their_end_token_or_are_truncated(shipped, tokenizer):
    eos = tokenizer.eos_token_id
    prompts = encode_prompts(tokenizer, Reckon().rows("test", 40), shipped.config, 12, chat=None)
    heard = []
    options = {"max_new_tokens": 12, "batch": 32, "progress": lambda rows, tokens: heard.append(rows)}
    got = [c for g in sample(shipped, tokenizer, prompts, 2, **options) for c in g]
    assert sum(heard) == pytest.approx(80) and 0 < heard[0] < 32, "heard before the first rows have ended"
    assert {c.truncated for c in got} == {True, False}
    for c in got:
        assert (
            c.ids.count(eos) == (not c.truncated)
            and (c.truncated or c.ids[-1] == eos)
            and (not c.truncated or len(c.ids) == 12)
        )


def test_every_end_token_of_the_generation_config_ends(tiny, tokenizer):
    tiny.generation_config = GenerationConfig(eos_token_id=[4, 5, 6, 7, 8])
    assert set(end_tokens(tiny, tokenizer)) == {tokenizer.eos_token_id, 4, 5, 6, 7, 8}
    got = sample(tiny, tokenizer, [[1, 5, 13]], 50, max_new_tokens=10)[0]
    assert all(not ({4, 5, 6, 7, 8} & set(c.ids[:-1])) for c in got) and any(c.ids[-1] in (4, 5, 6, 7, 8) for c in got)
    tokenizer_without = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer()._tokenizer, pad_token="<pad>")
    tiny.generation_config = GenerationConfig()
    with pytest.raises(ValueError, match="completions could not end"):
        sample(tiny, tokenizer_without, [[1]], 1, max_new_tokens=2)


def test_greedy_takes_the_most_likely_token_whatever_the_padding(tiny, tokenizer):
    prompts = [[1, 5], [1, 5, 13, 7, 13, 8, 16]]
    got = sample(misled(tiny), tokenizer, prompts, 1, max_new_tokens=6, temperature=0.0)
    for prompt, (completion,) in zip(prompts, got):
        ids = list(prompt)
        for token in completion.ids:
            assert token == tiny(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
    with pytest.raises(ValueError, match="temperature is 0"):
        sample(tiny, tokenizer, prompts, 1, max_new_tokens=1, temperature=-1.0)


def test_prompts_are_text_or_messages(tokenizer, shipped):
    assert encode_prompt(tokenizer, "<bos> 7 + 3 =", chat=None) == [
        1,
        *tokenizer.convert_tokens_to_ids(["7", "+", "3", "="]),
    ]
    messages = [{"role": "user", "content": "7 + 3"}]
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tokenizer, messages, chat=None)
    chat = make_tokenizer()
    chat.chat_template = CHAT
    assert encode_prompt(chat, messages, chat=None) == tokenizer.convert_tokens_to_ids(["7", "+", "3", "="])
    with pytest.raises(
        ValueError, match=r"row 1 \(long\): the prompt has 240 tokens and 48 may be written, more .* context of 256"
    ):
        encode_prompts(
            tokenizer, [{"prompt": "7"}, {"prompt": "7 " * 240, "row_id": "long"}], shipped.config, 48, chat=None
        )
    chat.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"row 0 \(a\): the chat template does not take .*: System role not supported"):
        encode_prompts(chat, [{"prompt": messages, "row_id": "a"}], shipped.config, 48, chat=None)
    chat.add_tokens(["<tool>"])
    with pytest.raises(ValueError, match=r"row 0: the prompt has the token '<tool>' .* none of the model's"):
        encode_prompts(chat, [{"prompt": "7 <tool>"}], shipped.config, 48, chat=False)
    with pytest.raises(ValueError, match="row 0: the prompt has no tokens"):
        encode_prompts(tokenizer, [{"prompt": " "}], shipped.config, 48, chat=None)


def test_evaluation_of_the_shipped_model(shipped, tokenizer):
    task, heard = Reckon(), []
    found = evaluate(
        Policy(shipped, tokenizer, task),
        task.rows("test", 256),
        num_samples=4,
        ks=(1, 4),
        progress=lambda rows, tokens: heard.append(rows),
    )
    assert 0.28 <= found["pass@1"]["value"] <= 0.42 and sum(heard) == pytest.approx(256 * 5)
    assert found["pass@1"]["value"] < found["pass@4"]["value"] and found["pass@1"]["num"] == 256
    for name in ("pass@1", "pass@4", "greedy", "truncated", "length", "entropy"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert sum(found["reasons"].values()) == 1024
    assert found["reasons"]["correct"] / 1024 == pytest.approx(found["pass@1"]["value"])
    assert {"fork", "copy", "calc"} <= found["entropy_by_role"].keys()
    assert found["entropy_by_role"]["fork"] > 5 * found["entropy_by_role"]["copy"]


def test_an_empty_completion_is_judged_and_not_a_fault(shipped, tokenizer):
    row = Reckon().rows("test", 1)[0]
    policy = Policy(shipped, tokenizer, Reckon(), max_new_tokens=4)
    assert policy.verdict((tokenizer.eos_token_id,), row, False).reason == "unparsed"
    for wrong, options in ((policy, {"num_samples": 0}), (replace(policy, temperature=0.0), {})):
        with pytest.raises(ValueError, match="an evaluation needs"):
            evaluate(wrong, [row], **options)


def copy_of_shipped(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(model_path() / name, folder)
    return folder


def test_what_cannot_be_loaded_says_why(tmp_path):
    weights = copy_of_shipped(tmp_path / "weights", "model.safetensors", "config.json")
    with pytest.raises(
        ValueError, match="has no tokenizer that can be loaded; save the model's tokenizer beside it"
    ) as caught:
        load_tokenizer(str(weights))
    assert "\n" not in str(caught.value)
    endless = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer()._tokenizer, pad_token="<pad>")
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no end-of-sequence token: completions could not end"):
        load_tokenizer(str(tmp_path / "endless"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a directory without a model"):
        resolve_model(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such model"):
        resolve_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"the model nobody/nothing (cannot be loaded|is not in the cache)"):
        load_config("nobody/nothing")
    assert resolve_model("reckon") == str(model_path()) and resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


def test_tokens_of_a_tokenizer_that_the_model_lacks(tmp_path):
    tokenizer = load_tokenizer(str(copy_of_shipped(tmp_path, "config.json", "tokenizer.json", "tokenizer_config.json")))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    found = load_tokenizer(str(tmp_path))
    assert found.pad_token_id == found.eos_token_id == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the end-of-sequence token of .*'\[END\]' .* is none of the model's"):
        load_tokenizer(str(tmp_path))


def test_a_run_means_its_last_whole_checkpoint(tmp_path):
    (tmp_path / "run.json").write_text('{"model": "reckon"}')
    folder = tmp_path / "checkpoints"
    for step in (8, 10, 12):
        copy_of_shipped(folder / f"checkpoint-{step}", "config.json")
    with pytest.raises(ValueError, match="has no finished checkpoint yet; it starts from reckon"):
        resolve_model(tmp_path)
    for step in (8, 10):
        seal(folder / f"checkpoint-{step}")
    assert resolve_model(tmp_path) == str(folder / "checkpoint-10")
    clear_after(folder, 10)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-10", "checkpoint-8"]
