"""Rewards of tokens and turns in training, tokens of tools among them, and the table of completions that keeps both."""

import math

import pytest
import torch

from tokencredit import METHODS, Rollouts, logs
from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_rewards import check_token_rewards
from trl_tiny import EOS, FixedCredit, build, tiny_tokenizer, train, written

NONE = math.nan


def two_turns(prompts, trainer):
    """Completions of two turns with a tool's output of two tokens between them."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    first = [written(prompt, place % 4, trainer.state.global_step)[:2] for place, prompt in enumerate(ids)]
    completions = [[*turn, 3, 4, 5, EOS] for turn in first]
    mask = [[1] * len(turn) + [0, 0, 1, 1] for turn in first]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": mask}


def of_turns(prompts, completions, completion_ids, index, **_):
    """The first turn of every other completion is praised, and the last turn has no reward of its own."""
    assert len(prompts) == len(completions) == len(completion_ids) == len(index)
    return [[float(i % 2), None] for i in range(len(completions))]


def quiet(**more):
    return {"log_completions": True, "num_completions_to_print": 0, "max_steps": 2} | more


def trained_on_turns(folder, monkeypatch, method):
    """(trainer, what it recorded of every step): two turns with a tool between them, each turn with its own reward."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    seen = []
    own = {"rollout_func": two_turns, "token_rewards": of_turns}
    trainer = train(CreditTrainer, folder, quiet(), method=method, record=seen.append, record_every=1, **own)
    return trainer, seen


def test_rewards_of_turns_become_credit_and_tools_get_none(tmp_path, monkeypatch):
    _, seen = trained_on_turns(tmp_path, monkeypatch, "grpo_process")
    batch = seen[0]
    mask, credit, rewards = batch["mask"], batch["credit"], batch["scores"]["token_reward"]
    assert not credit[~mask].any() and (~mask).any()
    for i, (own, given) in enumerate(zip(mask, rewards)):
        end_of_first = int((~own).nonzero()[0]) - 1  # a turn's reward stands at its last token
        assert given[end_of_first] == i % 2 and given[own].isnan().sum() == own.sum() - 1
    group = torch.tensor(batch["group"])
    rollouts = Rollouts(torch.tensor(batch["reward"]), group, mask, {"token_reward": rewards})
    assert torch.allclose(METHODS["grpo_process"].credit(rollouts), credit, atol=1e-6)
    # The second turn has the outcome's credit alone, the first one that and its own.
    outcome = METHODS["grpo"].credit(rollouts)
    extra = (credit - outcome).abs() > 1e-3
    assert extra[:, 0].all() and not extra[mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))].any()


def test_the_table_keeps_what_a_rollout_was_trained_on_and_is_read_back(tmp_path, monkeypatch):
    trainer, seen = trained_on_turns(tmp_path, monkeypatch, "gtpo")
    found = list(logs.read(tmp_path / "completions"))
    assert [each.step for each in found] == [1] * 16 + [2] * 16
    encoded = logs.encode(found, tiny_tokenizer())
    assert encoded.notes == () and trainer.state.global_step == 2
    for step, batch in enumerate(seen, start=1):
        some = encoded.at(step)
        width = max(map(len, some.completion_ids))
        mask = batch["mask"][:, :width]
        assert torch.equal(some.padded(some.mask, False), mask)
        for i, ids in enumerate(some.completion_ids):
            assert ids == batch["completion_ids"][i][: len(ids)].tolist()
        rollouts = some.rollouts()
        assert torch.allclose(some.credit(), batch["credit"][:, :width], atol=1e-6)
        assert torch.allclose(rollouts.score("entropy"), batch["scores"]["entropy"][:, :width] * mask, atol=1e-6)
        same = rollouts.token_reward.nan_to_num(nan=-1.0) == batch["scores"]["token_reward"][:, :width].masked_fill(
            ~mask, NONE
        ).nan_to_num(nan=-1.0)
        assert same.all() and rollouts.reward.tolist() == batch["reward"]
        assert len(set(zip(batch["group"], some.group))) == len(set(batch["group"]))


def test_rewards_may_be_given_for_every_token(tmp_path):
    per_token = lambda completion_ids, **_: [[0.5 * k for k in range(len(ids))] for ids in completion_ids]  # noqa: E731
    seen = []
    train(
        FixedCredit,
        tmp_path,
        {"max_steps": 1},
        method="grpo_process",
        token_rewards=per_token,
        record=seen.append,
        record_every=1,
    )
    (batch,) = seen
    for own, given in zip(batch["mask"], batch["scores"]["token_reward"]):
        assert given[own].tolist() == [0.5 * k for k in range(int(own.sum()))]


def test_a_method_without_the_rewards_it_needs_says_how_to_give_them(tmp_path):
    with pytest.raises(ValueError, match=r"needs the scores token_reward.*token_rewards=function\(prompts, completion"):
        build(CreditTrainer, tmp_path, method="grpo_process")


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([[1.0, 2.0, 3.0]], r"f returned 3 rewards for completion 0, which has 4 tokens and 2 turns"),
        ([[1.0, 2.0, 3.0, 4.0]], r"f gave completion 0 a reward at token 1, which the policy did not write"),
        ([["good", None]], r"f returned 'good' for completion 0"),
        ([[math.inf, None]], r"f returned inf for completion 0"),
        ([None, None], r"f must return a list with an entry for each of the 1 completions"),
        (1.0, r"f must return a list with an entry for each of the 1 completions"),
    ],
)
def test_token_rewards_are_checked(rewards, message):
    mask = torch.tensor([[True, False, True, True, False]])
    with pytest.raises((ValueError, TypeError), match=message):
        check_token_rewards(rewards, [[5, 6, 7, 8]], mask, "f")


def test_none_is_not_zero():
    mask = torch.tensor([[True, False, True, True, False]])
    found = check_token_rewards([[0.0, None]], [[5, 6, 7, 8]], mask, "f")
    assert found[0, 0] == 0.0 and found[0, 1:].isnan().all()
    assert check_token_rewards([None], [[5, 6, 7, 8]], mask, "f").isnan().all()
    assert check_token_rewards([[1.0, None, None, 2.0]], [[5, 6, 7, 8]], mask, "f")[0, 3] == 2.0
