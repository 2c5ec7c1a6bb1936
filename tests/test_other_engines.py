"""Adapters of engines that are not run here, on their own data layouts: slime, tinker, SkyRL."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from tokencredit import METHODS, Rollouts
from tokencredit.engines import skyrl, slime, tinker

LENGTHS = (3, 1, 2, 4)
REWARDS = (1.0, 0.0, 0.0, 1.0)


def rollouts(group=(0, 0, 1, 1)) -> Rollouts:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    scores = {"entropy": torch.rand(mask.shape, generator=generator)}
    scores["logprob"] = -torch.rand(mask.shape, generator=generator)
    return Rollouts(torch.tensor(REWARDS), torch.tensor(group), mask, scores)


# --- slime ------------------------------------------------------------------------------------------------------------


def slime_args(method="gtpo", **changed) -> Namespace:
    own = {
        "tokencredit": {"method": method},
        "rollout_max_response_len": 4,
        "n_samples_per_prompt": 2,
        "rewards_normalization": False,
        "normalize_advantages": False,
        "kl_coef": 0.0,
        "context_parallel_size": 1,
        "use_rollout_entropy": True,
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "calculate_per_token_loss": True,
    }
    return Namespace(**own | changed)


def slime_data(rows) -> dict:
    """What a data-parallel rank of slime holds: lists per rollout."""
    batch = rollouts()
    return {
        "log_probs": [batch.score("logprob")[k, : LENGTHS[k]] for k in rows],
        "entropy": [batch.score("entropy")[k, : LENGTHS[k]] for k in rows],
        "loss_masks": [[1] * LENGTHS[k] for k in rows],
        "rewards": [REWARDS[k] for k in rows],
        "sample_indices": [10 + k for k in rows],
        "response_lengths": [LENGTHS[k] for k in rows],
    }


def expected_of(name) -> torch.Tensor:
    return METHODS[name].within(4).credit(rollouts())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gtpo", {}),
        ("dapo", {}),
        ("grpo", {"eps_clip_high": 0.2, "calculate_per_token_loss": False}),
        ("reinforce_pp_baseline", {"eps_clip_high": 0.2}),
    ],
)
def test_slime_gets_the_credit_of_the_whole_batch(name, options):
    data = slime_data(range(4))
    slime.credit(slime_args(name, **options), data)
    expected = expected_of(name)
    for k in range(4):
        torch.testing.assert_close(data["advantages"][k], expected[k, : LENGTHS[k]])
        assert torch.equal(data["returns"][k], data["advantages"][k])


def test_slime_groups_that_ranks_have_split_are_gathered():
    """Two ranks with one rollout of each group; the batch's statistics are those of both."""
    parts = [slime_data((0, 3)), slime_data((2, 1))]
    sent = []
    for part in parts:  # the first pass only hears what each rank sends
        with pytest.raises(ValueError, match="has 1 of its 2 rollouts on the ranks that were gathered"):
            slime.credit(slime_args(), part, gather=lambda x: sent.append(x) or [x])
    for part, rows in zip(parts, ((0, 3), (2, 1))):
        slime.credit(slime_args(), part, gather=lambda x: sent)
        for k, row in enumerate(rows):
            torch.testing.assert_close(part["advantages"][k], expected_of("gtpo")[row, : LENGTHS[row]])


@pytest.mark.parametrize(
    ("method", "changed", "words"),
    [
        ("gtpo", {"rewards_normalization": True}, "--disable-rewards-normalization"),
        ("gtpo", {"normalize_advantages": True}, "leave it out"),
        ("gtpo", {"kl_coef": 0.1}, "--kl-coef 0.1"),
        ("gtpo", {"context_parallel_size": 2}, "--context-parallel-size"),
        ("gtpo", {"use_rollout_entropy": False}, "--use-rollout-entropy"),
        ("gtpo", {"eps_clip": 0.1}, "--eps-clip 0.2 --eps-clip-high 0.28"),
        ("gtpo", {"calculate_per_token_loss": False}, "--calculate-per-token-loss"),
        ("grpo", {"eps_clip_high": 0.2}, "leave out --calculate-per-token-loss"),
        ("cispo", {}, "its loss is CISPO"),
        ("rloo", {}, "its loss is LogProb"),
        ("ptw_attention", {"eps_clip_high": 0.2}, "needs the scores attention"),
        ("forking_tokens", {}, "no aggregation like SelectedMean"),
    ],
)
def test_slime_options_that_contradict_the_method_are_named(method, changed, words):
    with pytest.raises(ValueError, match=words):
        slime.credit(slime_args(method, **changed), slime_data(range(4)))


def test_slime_without_a_method():
    with pytest.raises(ValueError, match="--custom-config-path"):
        slime.credit(slime_args(tokencredit=None), slime_data(range(4)))
    with pytest.raises(ValueError, match="unknown key options"):
        slime.credit(slime_args(tokencredit={"method": "gtpo", "options": {}}), slime_data(range(4)))


def test_slime_data_that_cannot_be_read():
    data = slime_data(range(4))
    data["entropy"] = None
    with pytest.raises(ValueError, match="hold no entropy; they hold: entropy, log_probs"):
        slime.credit(slime_args(), data)
    data = slime_data(range(4))
    data["entropy"][2] = data["entropy"][2][:1]
    with pytest.raises(ValueError, match="rollout 2 has 2 response tokens"):
        slime.credit(slime_args(), data)
    stage = slime_data(range(4)) | {"log_probs": None}
    slime.credit(slime_args(), stage)
    assert "advantages" not in stage


# --- tinker -----------------------------------------------------------------------------------------------------------

PROMPTS = [[7, 8], [7, 8], [9], [9]]
COMPLETIONS = [[1, 2, 3], [4], [5, 6], [1, 1, 2, 2]]


def tinker_rows(method):
    batch = rollouts()
    old = [batch.score("logprob")[k, :n].tolist() for k, n in enumerate(LENGTHS)]
    return tinker.datums(method, PROMPTS, COMPLETIONS, old, REWARDS, [0, 0, 1, 1])


def test_tinker_rows_are_aligned_with_what_is_predicted():
    for k, row in enumerate(tinker_rows(METHODS["dapo"].within(4))):
        whole = PROMPTS[k] + COMPLETIONS[k]
        assert row.input == whole[:-1] and row.target_tokens.tolist() == whole[1:]
        before = len(PROMPTS[k]) - 1
        assert not row.advantages[:before].any() and not row.logprobs[:before].any()
        assert torch.allclose(row.logprobs[before:], rollouts().score("logprob")[k, : LENGTHS[k]])
        assert {name: len(x) for name, x in row.inputs().items()} == dict.fromkeys(row.inputs(), len(row.input))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "reinforce_pp_baseline", "cispo"])
def test_tinker_losses_add_up_to_the_methods(name):
    """The documented losses, written again, on the rows: their sum over tokens is Method.loss."""
    method, batch = METHODS[name].within(4), rollouts()
    old = batch.score("logprob")
    new = old + 0.4 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    expected, _ = method.loss(logprob=new, old_logprob=old, credit=method.credit(batch), rollouts=batch)
    loss, settings = tinker.loss_of(method)
    low, high = settings["clip_low_threshold"], settings["clip_high_threshold"]
    total = 0.0
    for k, row in enumerate(tinker_rows(method)):
        target = torch.cat([torch.zeros(len(PROMPTS[k]) - 1), new[k, : LENGTHS[k]]])
        ratio = (target - row.logprobs).exp()
        if loss == "ppo":
            total -= torch.minimum(ratio * row.advantages, ratio.clamp(low, high) * row.advantages).sum()
        else:
            total -= (ratio.clamp(low, high) * row.advantages * target).sum()
    torch.testing.assert_close(total, expected)


def test_tinker_refuses_what_it_cannot_give():
    with pytest.raises(ValueError, match="needs entropy, and tinker samples log-probs alone"):
        tinker_rows(METHODS["gtpo"])
    with pytest.raises(ValueError, match="SAPO is none of tinker's losses"):
        tinker.loss_of(METHODS["sapo"])
    with pytest.raises(ValueError, match="row 0 has 1 prompt tokens, 1 completion tokens and 0 log-probs"):
        tinker.datums(METHODS["grpo"], [[1]], [[2]], [[]], [1.0], [0])


# --- SkyRL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs])
def test_skyrl_estimates_the_methods_credit(name):
    batch, method = rollouts(), METHODS[name].within(4)
    rewards = torch.full(batch.mask.shape, torch.nan)
    rewards[batch.mask] = 0
    rewards[torch.arange(4), torch.tensor(LENGTHS) - 1] = torch.tensor(REWARDS)
    index = np.array(["b", "b", "a", "a"], dtype=object)
    advantages, returns = skyrl.estimator(method)(
        token_level_rewards=rewards, response_mask=batch.mask.long(), index=index, config=None, values=None
    )
    torch.testing.assert_close(advantages, method.credit(batch))
    assert torch.equal(returns, advantages)


def test_skyrl_refuses_methods_with_scores():
    with pytest.raises(ValueError, match="needs the scores entropy, and an estimator of SkyRL"):
        skyrl.estimator(METHODS["gtpo"])
