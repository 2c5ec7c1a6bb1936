"""What the TRL engine refuses, and how it says so."""

import pytest
import torch
from datasets import Dataset

from tokencredit import METHODS
from tokencredit.engines.scorers import importance_scorers
from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_options import check_version, decided, refuse_what_conflicts
from tokencredit.engines.trl_rewards import check, checked
from trl_tiny import build, settings, steps, sums, train


@pytest.mark.parametrize(
    ("method", "option", "value", "alternative"),
    [
        ("grpo", "loss_type", "bnpo", "choose another method"),
        ("dapo", "loss_type", "grpo", "replace(aggregate=...)"),
        ("gtpo", "importance_sampling_level", "sequence", "gspo_token"),
        ("grpo", "epsilon", 0.1, "replace(low=...)"),
        ("rloo", "epsilon", 0.1, "no such clip"),
        ("grpo", "epsilon_high", 0.3, "replace(high=...)"),
        ("cispo", "epsilon_high", 3.0, "replace(cap=...)"),
        ("grpo", "scale_rewards", "batch", "replace(scale="),
        ("gtpo", "scale_rewards", "none", "scales its credit itself"),
        ("grpo", "delta", 4.0, "replace(dual=...)"),
        ("sapo", "delta", 4.0, "grpo"),
        ("sapo", "sapo_temperature_pos", 2.0, "replace(positive=..."),
        ("grpo", "sapo_temperature_neg", 2.0, "sapo"),
        ("grpo", "top_entropy_quantile", 0.2, "forking_tokens"),
        ("grpo", "off_policy_mask_threshold", 0.5, "drop it"),
        ("grpo", "entropy_coef", 0.01, "entropy_bonus"),
        ("grpo", "use_adaptive_entropy", True, "entropy_bonus_adaptive"),
        ("grpo", "multi_objective_aggregation", "normalize_then_sum", "reward_weights"),
    ],
)
def test_options_that_contradict_the_method_are_refused_by_name(tmp_path, method, option, value, alternative):
    with pytest.raises(ValueError) as caught:
        build(CreditTrainer, tmp_path, {option: value}, method=method)
    assert (
        f"{option}={value!r}" in str(caught.value) and method in str(caught.value) and alternative in str(caught.value)
    )


def test_every_contradiction_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)loss_type='bnpo'.*epsilon=0.1.*delta=4.0"):
        refuse_what_conflicts(settings(tmp_path, loss_type="bnpo", epsilon=0.1, delta=4.0), METHODS["grpo"])


@pytest.mark.parametrize("name", METHODS)
def test_trls_defaults_and_the_methods_own_values_are_accepted(tmp_path, name):
    refuse_what_conflicts(settings(tmp_path), METHODS[name])
    own = {
        option: verdict.agrees[0]
        for option, verdict in decided(METHODS[name]).items()
        if verdict.agrees and verdict.agrees[0] is not None
    }
    refuse_what_conflicts(settings(tmp_path, **own), METHODS[name])


def test_unknown_methods_and_missing_scores_are_named_before_the_first_step(tmp_path):
    with pytest.raises(KeyError, match='Did you mean "gtpo"'):
        build(CreditTrainer, tmp_path, method="gtpoo")
    with pytest.raises(
        ValueError, match=r"exact_value.*a forward pass gives entropy, logprob.*scorers=\{'exact_value'"
    ):
        build(CreditTrainer, tmp_path, method="exact_value")
    with pytest.raises(ValueError, match="max_rounds must be at least 1"):
        build(CreditTrainer, tmp_path, method="dapo", max_rounds=0)
    scorers = {"exact_value": lambda trainer, inputs, batch: batch["completion_mask"][:, :1].float()}
    with pytest.raises(ValueError, match=r'scorer of "exact_value" must return \[B, T\]'):
        train(CreditTrainer, tmp_path, method="exact_value", scorers=scorers)


def test_perturbations_may_be_sampled_while_training(tmp_path):
    """The weight of `ptw_perturbation`: Gaussian noise that is small ranks tokens as the first order does; the policy
    that trains is the one that was there before the noise.
    """
    seen, after = {}, {}
    for kind in ("first_order", "gaussian", "dropout"):
        trainer = build(
            CreditTrainer,
            tmp_path,
            {"max_steps": 1, "learning_rate": 0.0},
            method="ptw_perturbation",
            scorers=importance_scorers(perturbation=kind, num_directions=64),
            record_every=1,
            record=lambda batch, kind=kind: seen.setdefault(kind, batch),
        )
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        after[kind] = all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))
    assert all(after.values())
    assert all(torch.equal(seen[kind]["completion_ids"], seen["dropout"]["completion_ids"]) for kind in seen)
    scores = {kind: batch["scores"]["perturbation_variance"][batch["mask"]] for kind, batch in seen.items()}
    assert all((x >= 0).all() and x.std() > 0 for x in scores.values())
    ranks = {kind: x.argsort().argsort().double() for kind, x in scores.items()}
    agree = {kind: torch.corrcoef(torch.stack([ranks["first_order"], x]))[0, 1] for kind, x in ranks.items()}
    assert agree["gaussian"] > 0.9
    with pytest.raises(ValueError, match="dropout perturbs by a scale above 0 and below 1, not 2"):
        importance_scorers(perturbation="dropout", scale=2)


def test_dynamic_sampling_needs_a_dataset_with_a_length(tmp_path):
    stream = Dataset.from_list(list(sums())).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"dynamic sampling.*max_rounds=1"):
        build(CreditTrainer, tmp_path, method="dapo", train_dataset=stream)
    assert len(steps(train(CreditTrainer, tmp_path, method="dapo", train_dataset=stream, max_rounds=1))) == 2


def test_a_group_of_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2 generations"):
        settings(tmp_path, num_generations=1)


def raising(completions, **_):
    raise ZeroDivisionError("no answer in the row")


async def awaited(completions, **_):
    return [float("nan")] * len(completions)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (raising, ZeroDivisionError, "raised by the reward function raising"),
        (lambda completions, **_: [1.0], ValueError, "reward function <lambda> returned 1 rewards for 16 completions"),
        (lambda completions, **_: [0.0] * 15 + [float("inf")], ValueError, "returned inf for completion 15"),
        (lambda completions, **_: [0.0, float("nan")] * 8, ValueError, "returned nan for completion 1"),
        (lambda completions, **_: ["yes"] * 16, TypeError, "returned 'yes' for completion 0.*not a number"),
        (lambda completions, **_: 1.0, TypeError, "returned float, not a list"),
        (
            lambda completions, **_: [1.0] * 15 + [None],
            ValueError,
            r"every reward function \(<lambda>\) returned None for completion 15",
        ),
        (awaited, ValueError, "reward function awaited returned nan for completion 0"),
    ],
)
def test_broken_reward_functions_are_named(tmp_path, function, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        train(CreditTrainer, tmp_path, method="grpo", reward_funcs=function)


def test_rewards_may_be_any_kind_of_number():
    import numpy
    import torch

    for values in (
        [1, 0],
        [True, False],
        numpy.array([1, 0]),
        torch.tensor([1.0, 0.0]),
        (1.0, numpy.float32(0)),
        [torch.tensor(1), 0],
    ):
        assert check(values, ["a", "b"], "f") == [1.0, 0.0]
    assert check([None, 1], ["a", "b"], "f") == [None, 1.0]
    module = torch.nn.Linear(1, 1)
    assert checked(module, "f") is module


@pytest.mark.parametrize("version", ["1.8.2", "1.9.0", "1.17.0", "2.0.0"])
def test_an_unsupported_trl_is_refused_by_its_version(version):
    with pytest.raises(ImportError, match=rf"supports trl>=1.10,<1.17, but trl {version} is installed: pip install"):
        check_version(version)
    check_version("1.10.0"), check_version("1.16.3")
