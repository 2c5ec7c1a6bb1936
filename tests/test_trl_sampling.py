"""The TRL engine at rollout time: dynamic sampling, what is recorded and logged, evaluation, other kinds of prompts and
masks.
"""

import json
import math
import warnings

import pandas
import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM
from trl import GRPOTrainer

from tokencredit import METHODS
from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_figures import rollout_figures, update_figures
from tokencredit.engines.trl_groups import GatheredBatch
from trl_tiny import (
    CHAT,
    EOS,
    PAD,
    VOCAB,
    FixedCredit,
    build,
    reward,
    steps,
    sums,
    tiny_tokenizer,
    train,
    weights,
    written,
)

EVERY_STEP = (
    "loss",
    "grad_norm",
    "reward",
    "pass_rate",
    "entropy",
    "length",
    "truncated",
    "clip_low",
    "clip_high",
    "credit_against_outcome",
    "credited_tokens",
    "credited_share",
    "zero_variance_groups",
    "uncredited_groups",
    "tokens_per_second",
    "seconds_generation",
    "seconds_scoring",
    "seconds_update",
)


def seldom_mixed(prompts, completions, index, log_extra, **_):
    """Both outcomes only in the groups of every third prompt; the others are all right or all wrong."""
    log_extra("index", index)
    return [float(i % 4 < 2) if number % 3 == 0 else float(number % 3 == 1) for i, number in enumerate(index)]


def sample_again(folder, rounds, function=seldom_mixed, **changes):
    """(trainer, recorded batches) of a dapo run on fixed completions."""
    seen = []
    changes = {"log_completions": True, "num_completions_to_print": 0} | changes
    keep = {"record": seen.append, "record_every": 1}
    trainer = train(FixedCredit, folder, changes, method="dapo", max_rounds=rounds, reward_funcs=function, **keep)
    return trainer, seen


def check_alignment(trainer, batch):
    """Every row of a batch belongs together: prompt, dataset row, tokens, text, reward, credit."""
    dataset = {row["index"]: row["prompt"] for row in sums()}
    for i, row in enumerate(batch["rows"]):
        prompt = batch["prompts"][i]
        assert (
            dataset[row["index"]] == prompt == row["prompt"] == batch["rows"][i - i % 4]["prompt"]
            and batch["group"][i] == i // 4
        )
        ids = batch["completion_ids"][i][batch["mask"][i]].tolist()
        assert ids == written([VOCAB.index(word) for word in prompt.split()], i % 4, batch["step"])
        assert batch["texts"][i] == trainer.processing_class.decode(ids, skip_special_tokens=True)
        assert batch["truncated"][i] == (ids[-1] != EOS)
        assert batch["reward"][i] == (float(i % 4 < 2) if row["index"] % 3 == 0 else float(row["index"] % 3 == 1))
    assert (
        batch["credit"].shape
        == batch["mask"].shape
        == batch["completion_ids"].shape
        == batch["scores"]["entropy"].shape
    )
    assert not batch["credit"][~batch["mask"]].any()


def test_dynamic_sampling_collects_groups_with_both_outcomes(tmp_path):
    trainer, seen = sample_again(tmp_path, 10)
    assert len(seen) == 2
    for turn, (batch, record, kept) in enumerate(zip(seen, steps(trainer), trainer.kept[-2:])):
        check_alignment(trainer, batch)
        assert record["dynamic_sampling/rounds"] > 1 and record["dynamic_sampling/filled_groups"] == 0
        assert record["dynamic_sampling/drawn_groups"] == 4 * record["dynamic_sampling/rounds"]
        assert record["sampled_rollouts"] == 4 * record["dynamic_sampling/drawn_groups"]
        assert record["sampled_tokens"] == pytest.approx(record["length"] * record["sampled_rollouts"])
        assert record["dynamic_sampling/dropped_groups"] == record["dynamic_sampling/drawn_groups"] - 4
        assert 4 <= record["dynamic_sampling/mixed_groups"] <= record["dynamic_sampling/drawn_groups"]
        assert all(0 < sum(batch["success"][i : i + 4]) < 4 for i in range(0, 16, 4))
        assert record["zero_variance_groups"] == 0 and batch["credit"].view(4, -1).any(1).all()
        assert torch.allclose(kept["advantages"].float(), batch["credit"])  # trained on what was recorded
        assert (
            trainer.asked[turn] == batch["prompts"]
            and kept["completion_ids"].tolist() == batch["completion_ids"].tolist()
        )
        table = pandas.read_parquet(tmp_path / "completions" / f"completions_{turn + 1:05d}.parquet")
        assert table["prompt"].tolist() == batch["prompts"] and table["completion"].tolist() == batch["texts"]
        assert table["seldom_mixed"].tolist() == batch["reward"] and table["index"].tolist() == [
            row["index"] for row in batch["rows"]
        ]
        means = batch["credit"].sum(1) / batch["mask"].sum(1)
        assert table["advantage"].tolist() == pytest.approx(means.tolist(), abs=1e-6)


def test_rounds_are_bounded_and_the_batch_filled(tmp_path):
    with pytest.warns(UserWarning, match="used up its 2 rounds: 4 groups"):
        trainer, seen = sample_again(tmp_path, 2, lambda completions, **_: [1.0] * len(completions))
    for batch, record in zip(seen, steps(trainer)):
        assert record["dynamic_sampling/rounds"] == 2 and record["dynamic_sampling/filled_groups"] == 4
        assert record["dynamic_sampling/mixed_groups"] == 0 and len(batch["texts"]) == 16 and not batch["credit"].any()
        assert record["pass_rate"] == 1 and record["reward"] == 1 and record["grad_norm"] == 0
    # One-sided groups may differ in length, which the overlong punishment of dapo sees; with plain rewards the method
    # itself gives nothing, and nothing is said.
    plain = METHODS["grpo"].replace(mixed_groups_only=True)
    still = train(
        FixedCredit,
        tmp_path,
        method=plain,
        max_rounds=2,
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
    )
    assert [(s["loss"], s["grad_norm"]) for s in steps(still)] == [(0, 0), (0, 0)]
    trainer, seen = sample_again(tmp_path, 1)
    assert "dynamic_sampling/rounds" not in steps(trainer)[0]
    check_alignment(trainer, seen[0])


def test_figures_describe_all_that_was_sampled(tmp_path):
    trainer, seen = sample_again(tmp_path, 10)
    rates = [s["pass_rate"] for s in steps(trainer)]
    assert all(sum(batch["success"]) == 8 for batch in seen) and all(rate != 0.5 for rate in rates)
    assert rates == pytest.approx([s["reward"] for s in steps(trainer)])  # TRL's mean over the rounds
    assert [s["length"] for s in steps(trainer)] == pytest.approx(
        [s["completions/mean_length"] for s in steps(trainer)]
    )
    assert [s["truncated"] for s in steps(trainer)] == pytest.approx(
        [s["completions/clipped_ratio"] for s in steps(trainer)]
    )


@pytest.mark.parametrize("name", ["grpo", "gtpo", "clip_cov"])
def test_every_step_is_logged_in_full_also_where_rollouts_are_reused(tmp_path, name):
    changes = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 8, "max_steps": 8}
    trainer = train(CreditTrainer, tmp_path, changes, method=name)
    records = steps(trainer)
    assert len(records) == 8
    for record in records:
        assert all(math.isfinite(record[figure]) for figure in EVERY_STEP)
        assert record["tokens_per_second"] > 0 and record["seconds_update"] > 0
    assert [r["pass_rate"] for r in records[:4]] == [records[0]["pass_rate"]] * 4
    assert [r["seconds_generation"] > 0 for r in records] == [True, False, False, False] * 2
    assert "pass_rate" not in trainer.state.log_history[-1]  # the summary of the run
    json.dumps(trainer.state.log_history, allow_nan=False)


@pytest.mark.parametrize("name", ["grpo", "gtpo", "rloo", "kl_cov", "dapo"])
def test_evaluation_with_single_completions(tmp_path, name):
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": 4,
        "logging_steps": 2,
    }
    changes |= {"max_steps": 4, "log_completions": True, "num_completions_to_print": 0}
    trainer = train(CreditTrainer, tmp_path, changes, method=name, eval_dataset=sums(6))
    evaluations = [record for record in trainer.state.log_history if "eval_loss" in record]
    assert len(evaluations) == 4 and len(steps(trainer)) == 2
    for record in evaluations:
        assert math.isfinite(record["eval_loss"]) and 0 <= record["eval_pass_rate"] <= 1 and record["eval_entropy"] > 0
        assert record["eval_zero_variance_groups"] == 1  # a single completion has nothing to be compared with
    assert all(s["tokens_per_second"] > 0 and s["pass_rate"] > 0 for s in steps(trainer))
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_evaluation_has_trls_loss(tmp_path):
    changes = {"loss_type": "grpo", "per_device_eval_batch_size": 8, "num_generations_eval": 4}
    changes |= {"log_completions": True, "num_completions_to_print": 0}
    found = []
    for cls, keywords in ((GRPOTrainer, {}), (CreditTrainer, {"method": METHODS["grpo"].replace(eps=1e-4)})):
        trainer = build(cls, tmp_path, changes, eval_dataset=sums(6), **keywords)
        torch.manual_seed(5)
        found.append(
            trainer.evaluate() | {"table": pandas.read_parquet(tmp_path / "completions" / "completions_00000.parquet")}
        )
    for figure in ("eval_loss", "eval_reward", "eval_entropy"):
        assert found[1][figure] == pytest.approx(found[0][figure], rel=1e-5, abs=1e-6)
    assert not any(trainer._clock.seconds.values())  # evaluation is not training time
    pandas.testing.assert_frame_equal(found[0]["table"], found[1]["table"], rtol=1e-5)


def test_records_come_once_per_window_of_steps(tmp_path):
    seen = []
    changes = {"num_iterations": 2, "max_steps": 14}
    train(CreditTrainer, tmp_path, changes, method="grpo", record=seen.append, record_every=5)
    assert [batch["step"] for batch in seen] == [0, 6, 10]
    assert set(seen[0]) == {
        "step",
        "prompts",
        "texts",
        "rows",
        "group",
        "reward",
        "success",
        "truncated",
        "mask",
        "completion_ids",
        "scores",
        "credit",
    }


def test_conversational_prompts(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1"}], "answer": str(i + 1)} for i in range(9)]
    seen = []
    trainer = train(
        CreditTrainer,
        tmp_path,
        {"log_completions": True, "num_completions_to_print": 0},
        method="gtpo",
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        record=seen.append,
        record_every=1,
    )
    assert len(steps(trainer)) == 2 and sum(s["grad_norm"] for s in steps(trainer)) > 0
    assert seen[0]["prompts"][0][0]["role"] == "user" and seen[0]["texts"][0][0]["role"] == "assistant"
    assert all(row["answer"] in VOCAB for row in seen[0]["rows"])


def with_tools(prompts, trainer):
    """A rollout function whose completions hold tokens that the policy did not write: every other one."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    completions = [written(prompt, place % 4, trainer.state.global_step) for place, prompt in enumerate(ids)]
    mask = [[(i + 1) % 2 for i in range(len(c))] for c in completions]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": mask}


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_tokens_of_tools_carry_no_credit(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    seen = []
    method = METHODS[name].replace(eps=1e-4, mixed_groups_only=False)
    method = method.replace(max_length=1000, cache=1) if name == "dapo" else method
    changes = {"loss_type": name, "epsilon_high": method.surrogate.high, "max_steps": 3}
    stock = train(GRPOTrainer, tmp_path, changes, rollout_func=with_tools)
    ours = train(
        CreditTrainer, tmp_path, changes, rollout_func=with_tools, method=method, record=seen.append, record_every=1
    )
    assert (weights(stock) - weights(ours)).abs().max() < 1e-6
    assert [s["grad_norm"] for s in steps(ours)] == pytest.approx([s["grad_norm"] for s in steps(stock)], rel=1e-5)
    assert [s["length"] for s in steps(ours)] == pytest.approx([s["completions/mean_length"] for s in steps(stock)])
    assert (
        not seen[0]["mask"][:, 1::2].any() and not seen[0]["credit"][:, 1::2].any() and seen[0]["credit"][:, ::2].any()
    )


def test_masked_truncated_completions_keep_their_length(tmp_path):
    """Where all rollouts of the groups with both outcomes are masked, nothing is trained, which is said."""
    changes = {"mask_truncated_completions": True, "max_completion_length": 2, "max_steps": 3}
    for name in ("gtpo", "dapo", "grpo_s", "clip_cov"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="no token has credit under .*have no token that counts")
            trainer = train(CreditTrainer, tmp_path, changes, method=name)
        assert all(math.isfinite(s["loss"]) and s["length"] > 1 and s["truncated"] > 0.5 for s in steps(trainer))


@pytest.mark.parametrize("token", [1, PAD], ids=["ended_at_once", "padding"])
def test_completions_without_content(tmp_path, token):
    class Empty(CreditTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return [[token] for _ in prompt_ids], None

    half = lambda completions, **_: [float(i % 2) for i in range(len(completions))]  # noqa: E731
    for name in ("grpo", "gtpo", "grpo_s", "forking_tokens", "kl_cov"):
        records = steps(train(Empty, tmp_path, method=name, reward_funcs=half))
        assert all(math.isfinite(s["loss"]) and math.isfinite(s["grad_norm"]) and s["length"] == 1 for s in records)


@pytest.mark.parametrize("method", ["grpo", "gtpo", "dr_grpo", "clip_cov", "reinforce_pp_baseline"])
def test_equal_rewards_teach_nothing(tmp_path, method):
    records = steps(
        train(CreditTrainer, tmp_path, method=method, reward_funcs=lambda completions, **_: [1.0] * len(completions))
    )
    assert [(s["loss"], s["grad_norm"], s["zero_variance_groups"]) for s in records] == [(0, 0, 1), (0, 0, 1)]


def test_mixtures_of_experts_keep_their_auxiliary_loss(tmp_path):
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = MixtralConfig(
        vocab_size=len(VOCAB),
        num_local_experts=4,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        **shape,
    )

    def model():
        torch.manual_seed(0)
        return MixtralForCausalLM(config)

    changes = {
        "loss_type": "grpo",
        "router_aux_loss_coef": 0.5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8,
    }
    stock = train(GRPOTrainer, tmp_path, changes, model=model())
    ours = train(CreditTrainer, tmp_path, changes, model=model(), method=METHODS["grpo"].replace(eps=1e-4))
    assert [s["loss"] for s in steps(ours)] == pytest.approx([s["loss"] for s in steps(stock)], rel=1e-5)
    assert [s["aux_loss"] for s in steps(ours)] == pytest.approx([s["aux_loss"] for s in steps(stock)], rel=0.05)
    assert (weights(stock) - weights(ours)).abs().max() < 1e-6


def test_reward_is_never_asked_for_what_it_does_not_get(tmp_path):
    """Columns of the dataset reach reward functions, also for the prompts that dynamic sampling draws."""
    asked = []

    def with_column(completions, index, **columns):
        asked.append(index)
        assert len(index) == len(completions) and "trainer_state" in columns
        return reward(completions)

    train(CreditTrainer, tmp_path, method="dapo", max_rounds=3, reward_funcs=with_column)
    assert all(len(set(index[i : i + 4])) == 1 for index in asked for i in range(0, 16, 4))


def test_figures_of_rollouts_by_hand():
    mask = torch.ones(2, 2, dtype=torch.bool)
    sizes = {"length": torch.tensor([2, 2]), "truncated": torch.tensor([True, False]), "group": torch.tensor([0, 0])}
    batch = GatheredBatch(
        reward=torch.tensor([1.0, 0.0]),
        mask=mask,
        success_above=0.5,
        scores={"entropy": torch.tensor([[1.0, 2], [0, 1]])},
        **sizes,
    )
    figures = rollout_figures(batch, batch.rollouts, torch.tensor([[2.0, -1], [-1, 0]]))
    # One of three credited tokens works against its outcome; (2+1+1)² / (4+1+1); squares 6 around mean 0 over 4 − 1.
    expected = {
        "credit_against_outcome": 1 / 3,
        "credited_tokens": 16 / 6,
        "credit_mean": 0,
        "credit_std": 2**0.5,
        "entropy": 1,
    }
    expected |= {
        "reward": 0.5,
        "pass_rate": 0.5,
        "length": 2,
        "truncated": 0.5,
        "zero_variance_groups": 0,
        "uncredited_groups": 0,
        "sampled_rollouts": 2,
        "sampled_tokens": 4,
    }
    assert figures == pytest.approx(expected)


def test_figures_of_an_update_are_weighted_by_tokens():
    names = ("clip_low", "entropy", "kl_old", "ratio_max", "ratio_min", "in_loss", "credited", "tokens")
    values = torch.tensor([[0.5, 1.0, 1.0, 3.0, 0.5, 2.0, 1.0, 8.0], [0.0, 2.0, 4.0, 2.0, 0.1, 1.0, 0.0, 2.0]])
    gatherer = type("Alone", (), {"gather": staticmethod(lambda x: x)})
    figures = update_figures(gatherer, [dict(zip(names, row)) for row in values])
    # Clips: 0.5 of 2 of the 10 tokens. Entropy: (8·1 + 2·2) / 10. KL over the 3 tokens in the loss: (2·1 + 1·4) / 3.
    expected = {
        "clip_low": 0.1,
        "entropy": 1.2,
        "kl_old": 2,
        "ratio_max": 3,
        "ratio_min": 0.1,
        "credited_share": 0.1,
        "tokens": 10,
    }
    assert figures == pytest.approx(expected)
