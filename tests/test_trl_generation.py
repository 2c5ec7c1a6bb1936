"""Scores heard while transformers generates: the credit and the weights of a pass over the rollouts, without the
pass.
"""

import warnings

import pytest
import torch
from peft import LoraConfig

from tokencredit import METHODS
from tokencredit.engines import trl_generation
from tokencredit.engines.trl import CreditTrainer
from trl_tiny import CHAT, build, sums, tiny_tokenizer, weights

ACCUMULATED = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
CASES = {
    "gtpo": (METHODS["gtpo"], {"mask_truncated_completions": True, "num_generations": 16}),
    "gtpo, micro-batches": (METHODS["gtpo"].replace(scope="batch"), ACCUMULATED | {"temperature": 0.6}),
    "grpo_s": (METHODS["grpo_s"], {"num_generations": 8}),
    "forking_tokens": (METHODS["forking_tokens"], {}),
    "ptw_entropy": (METHODS["ptw_entropy"], {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3}),
    "entropy_advantage": (METHODS["entropy_advantage"], {"pad_to_multiple_of": 16}),
    "entropy_bonus": (METHODS["entropy_bonus"].replace(coef=0.3), {"num_generations": 8}),
    "kl_cov": (METHODS["kl_cov"].replace(fraction=0.2), {"cache_implementation": "static"}),
}


class Kept(CreditTrainer):
    """Counts its passes over rollouts for their scores alone, and keeps what it trains on."""

    passes = 0

    def _policy_scores(self, out):
        self.passes += 1
        return super()._policy_scores(out)

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        self.kept = [*getattr(self, "kept", []), out]
        return out


def parity(completions, **_):
    """Differs within nearly every group, at any temperature."""
    return [float(sum(map(ord, str(each))) % 2) for each in completions]


def trained(folder, method, changes, cls=Kept, heard=True, **keywords):
    trainer = build(cls, folder, changes, method=method, max_rounds=3, reward_funcs=parity, **keywords)
    if not heard:
        trainer._listener._agrees = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamic sampling used up")
        trainer.train()
    return trainer


def check_equal(heard, plain):
    assert len(heard.kept) == len(plain.kept) > 0
    for one, other in zip(heard.kept, plain.kept):
        assert torch.equal(one["completion_ids"], other["completion_ids"])
        for name in ("advantages", "token_weight", "coefficient"):
            if name in one:
                assert torch.allclose(one[name], other[name], rtol=0, atol=2e-5), name
    assert sum(float(out["advantages"].abs().sum()) for out in heard.kept) > 0
    assert (weights(heard) - weights(plain)).abs().max() < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_credit_and_weights_are_those_of_a_pass(tmp_path, case):
    method, changes = CASES[case]
    heard, plain = (trained(tmp_path, method, changes, heard=heard) for heard in (True, False))
    assert heard.passes == 1 < plain.passes  # the first batch is measured both ways
    check_equal(heard, plain)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_adapters_and_prompts_of_one_token(tmp_path, chat):
    def run(heard):
        tokenizer, data = tiny_tokenizer(), sums().map(lambda row: {"prompt": row["prompt"][0]})
        if chat:
            tokenizer.chat_template = CHAT
            data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
        torch.manual_seed(0)
        adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        keywords = {"processing_class": tokenizer, "train_dataset": data, "peft_config": adapter}
        return trained(tmp_path, "gtpo", {}, heard=heard, **keywords)

    heard, plain = run(True), run(False)
    assert heard.passes == 1 < plain.passes
    check_equal(heard, plain)


@pytest.mark.parametrize("rows, parts", [(5, 4), (8, 2), (16, 1)])
def test_rows_are_written_in_parts_where_there_is_no_room_for_all(tmp_path, monkeypatch, rows, parts):
    """The likeliest tokens do not depend on who is beside them; what is heard is put together again."""
    changes = {"top_k": 1, "num_generations": 8}
    whole = trained(tmp_path, "gtpo", changes)
    sizes, generate = [], type(whole.model).generate

    def counted(self, *args, **given):
        sizes.append(len(given["input_ids"]))
        return generate(self, *args, **given)

    monkeypatch.setattr(type(whole.model), "generate", counted)
    split = trained(tmp_path, "gtpo", changes, generation_rows=rows)
    assert sizes == [16 // parts] * parts * len(split.kept) and split.passes == whole.passes == 1
    assert "generate" not in vars(split.model)
    for one, other in zip(split.kept, whole.kept):
        assert torch.equal(one["completion_ids"], other["completion_ids"])
        assert torch.allclose(one["advantages"], other["advantages"], rtol=0, atol=2e-5)


def test_no_row_at_a_time_is_refused(tmp_path):
    with pytest.raises(ValueError, match="generation_rows must be at least 1, got 0"):
        build(Kept, tmp_path, {}, method="gtpo", reward_funcs=parity, generation_rows=0)


class Rewritten(Kept):
    """The tokens that are trained on are not all those that were sampled, as where tools write some."""

    def _generate_single_turn(self, *args, **kwargs):
        completions, *rest = super()._generate_single_turn(*args, **kwargs)
        return [[*ids[:1], 5, *ids[2:]] for ids in completions], *rest


class Longer(Kept):
    def _generate_single_turn(self, *args, **kwargs):
        completions, *rest = super()._generate_single_turn(*args, **kwargs)
        return [[*ids, 5, 6] for ids in completions], *rest


@pytest.mark.parametrize("cls", [Rewritten, Longer])
def test_tokens_that_were_not_sampled_so_are_measured(tmp_path, cls):
    trainer = trained(tmp_path, "gtpo", {}, cls)
    assert trainer.passes == len(trainer.kept) == 2 and trainer._listener._agrees is None


def test_what_generation_says_is_held_against_a_pass(tmp_path, monkeypatch):
    """As where a model's cache or its left padding makes another distribution of it than a pass over the rollouts."""
    true = trl_generation.distribution

    def bent(logits, temperature):
        log_p, entropy = true(logits, temperature)
        return log_p, entropy + 0.002

    monkeypatch.setattr(trl_generation, "distribution", bent)
    with pytest.warns(UserWarning, match=r"is 0\.002 nats in the mean from a forward pass over them"):
        off = trained(tmp_path, "gtpo", {})
    monkeypatch.undo()
    assert off.passes == 2
    check_equal(off, trained(tmp_path, "gtpo", {}, heard=False))


def test_evaluation_hears_too(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    trainer = trained(tmp_path, "gtpo", changes, eval_dataset=sums(4))
    logged = [record["eval_entropy"] for record in trainer.state.log_history if "eval_entropy" in record]
    assert trainer.passes == 1 and len(logged) == 2 and all(0 < x < 3 for x in logged)
