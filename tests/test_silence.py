"""Rewards that differ and train nothing are said: why, and what to set; and groups that dynamic sampling leaves."""

import re

import pytest
import torch

from tokencredit import METHODS, Rollouts, why_no_credit
from tokencredit.engines.trl import CreditTrainer
from tokencredit.silence import without_credit
from trl_tiny import EOS, FixedCredit, reward, steps, train, weights

# Correct + 0.5 × (1 for the shortest … 0 for the longest): every reward of both groups is above 0. The first group
# holds two right answers, the second one.
SHAPED = torch.tensor([1.5, 0.2, 1.1, 0.4, 0.3, 1.2, 0.1, 0.5])
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def rollouts(reward=SHAPED, success_above=0.0, mask=None, **scores):
    mask = torch.ones(len(reward), 3, dtype=torch.bool) if mask is None else mask
    entropy = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) + 0.1
    return Rollouts(reward, GROUP[: len(reward)], mask, {"entropy": entropy} | scores, success_above)


@pytest.mark.parametrize("name", ["gtpo", "grpo_s", "gtpo_geometric"])
def test_shaped_rewards_above_the_limit_of_success_are_explained(name):
    method = METHODS[name]
    assert not method.credit(rollouts()).any()
    why = why_no_credit(method, rollouts())
    assert why.startswith(f"no token has credit under {name}") and "differ in 2 of 2 groups" in why
    assert "success_above=0, and here rewards go from 0.1 to 1.5: set success_above" in why
    assert without_credit(method.credit(rollouts()), rollouts()).all()
    better = rollouts(success_above=0.75)  # what the message says to do
    assert why_no_credit(method, better) is None and method.credit(better).any(1).all()
    assert not without_credit(method.credit(better), better).any()


def test_nothing_is_said_where_there_is_credit_or_nothing_to_learn():
    assert why_no_credit(METHODS["grpo"], rollouts()) is None
    assert why_no_credit(METHODS["gtpo"], rollouts(torch.ones(8))) is None
    assert why_no_credit(METHODS["grpo"], rollouts(torch.ones(8))) is None
    half = rollouts(torch.tensor([1.0, 0.0, 1.0, 0.0, 0.3, 1.2, 0.1, 0.5]))  # one group with both outcomes
    assert why_no_credit(METHODS["gtpo"], half) is None
    assert without_credit(METHODS["gtpo"].credit(half), half).tolist() == [False] * 4 + [True] * 4


def test_groups_that_dynamic_sampling_would_drop_are_explained_by_their_outcomes():
    """forking_tokens gives them credit; the trainer leaves none, and asks with what is left."""
    method = METHODS["forking_tokens"]
    assert why_no_credit(method, rollouts()) is None
    left = torch.zeros(8, 3)
    assert "set success_above" in why_no_credit(method, rollouts(), left)


def test_other_reasons_are_named():
    """Rollouts without tokens, scores that are all 0, and a part that takes everything."""
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0])
    empty = rollouts(reward, mask=torch.zeros(4, 3, dtype=torch.bool))
    assert "have no token that counts" in why_no_credit(METHODS["grpo"], empty)
    silent = rollouts(reward, exact_value=torch.zeros(4, 3))
    assert "the scores exact_value, which the method reads, are 0" in why_no_credit(METHODS["exact_value"], silent)
    nowhere = METHODS["oracle_positions"].replace(mixed_groups_only=False)
    some = rollouts(reward, oracle_positions=torch.full((4, 3), 0.2))
    assert re.search(r"none left after Above\(.*oracle_positions", why_no_credit(nowhere.replace(threshold=0.5), some))


def shaped(completion_ids, **_):
    """1 for a 3 or a 7, + 0.5 × (1 − length / 8) + 0.01: always above 0."""
    right = reward(["".join(map(str, (t - 2 for t in ids if t != EOS))) for ids in completion_ids])
    return [r + 0.5 * (1 - len(ids) / 8) + 0.01 for r, ids in zip(right, completion_ids)]


@pytest.mark.parametrize("name", ["gtpo", "grpo_s"])
def test_a_trainer_says_once_that_its_gradient_is_zero(tmp_path, name):
    with pytest.warns(UserWarning, match=rf"no token has credit under {name}.*set success_above") as said:
        trainer = train(FixedCredit, tmp_path, {"max_steps": 3}, method=name, reward_funcs=shaped)
    assert sum("credit" in str(warning.message) for warning in said) == 1
    for step in steps(trainer):
        assert step["grad_norm"] == 0 and step["credited_share"] == 0
        assert step["uncredited_groups"] == 1 and step["zero_variance_groups"] == 0
    better = train(FixedCredit, tmp_path, {"max_steps": 3}, method=name, reward_funcs=shaped, success_above=0.75)
    assert all(step["grad_norm"] > 0 and step["credited_share"] > 0 for step in steps(better))


def test_filler_of_dynamic_sampling_is_not_trained_on(tmp_path):
    """All rollouts are successes: after its rounds nothing is left to train on, whatever the rewards say."""
    before = weights(train(FixedCredit, tmp_path, {"learning_rate": 0.0}, method="grpo"))
    with pytest.warns(UserWarning, match="under forking_tokens.*set success_above"):
        trainer = train(FixedCredit, tmp_path, method="forking_tokens", max_rounds=2, reward_funcs=shaped)
    assert torch.equal(weights(trainer), before)
    assert all(step["dynamic_sampling/filled_groups"] == 4 and step["credited_share"] == 0 for step in steps(trainer))


def test_filler_beside_groups_with_both_outcomes_is_left_out_and_said(tmp_path):
    """Every third prompt has both outcomes. In the other groups rewards differ as well, but all are successes."""

    def seldom(completions, index, **_):
        right = [float(i % 4 < 2) if number % 3 == 0 else 1.0 for i, number in enumerate(index)]
        return [r + 0.1 * (i % 4) * (r > 0) for i, r in enumerate(right)]

    seen = []
    keep = {"record": seen.append, "record_every": 1}
    with pytest.warns(UserWarning, match="used up its 2 rounds: [1-4] groups.*left without credit.*max_rounds") as said:
        trainer = train(FixedCredit, tmp_path, method="dapo", max_rounds=2, reward_funcs=seldom, **keep)
    assert sum("credit" in str(warning.message) for warning in said) == 1
    for batch, step in zip(seen, steps(trainer)):
        won = torch.tensor(batch["success"]).view(-1, 4)
        mixed = won.any(1) & ~won.all(1)
        assert (batch["credit"].view(len(mixed), -1) != 0).any(1).tolist() == mixed.tolist()
        assert 0 < mixed.sum() < 4 and step["dynamic_sampling/filled_groups"] == (~mixed).sum()
        assert step["credited_share"] == pytest.approx(((batch["credit"] != 0).sum() / batch["mask"].sum()).item())
    # One round is no dynamic sampling: every group is trained on.
    plain = train(CreditTrainer, tmp_path, method="dapo", max_rounds=1, reward_funcs=shaped)
    assert all(step["grad_norm"] > 0 for step in steps(plain))
