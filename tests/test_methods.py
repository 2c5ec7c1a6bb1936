"""METHODS against the slow reference; needs, replace, within, parse; a method is data."""

import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tokencredit import METHODS, Chain, Method, Rollouts, Transform
from tokencredit.credit import (
    EntropyGradient,
    EntropyReward,
    GroupCenter,
    Outcome,
    Overlong,
    PolarityCenter,
    Sum,
    TopFraction,
)
from tokencredit.methods import parse
from tokencredit.objective import CISPO, Clip, ClipCov, SelectedMean, SequenceClip, SequenceSum, TokenMean
from tokencredit.testing import logprobs_like, rollouts_strategy

NAMES = (
    "token_reward",
    "entropy",
    "exact_value",
    "learned_credit",
    "fisher_trace",
    "gradient_norm",
    "perturbation_variance",
    "attention",
    "uniform",
    "oracle_positions",
    "logprob",
    "sum_p2",
    "head_norm",
    "step_gain",
    "implicit_reward",
    "self_reward",
    "js_divergence",
    "planning",
)
SIGNED = ("exact_value", "learned_credit", "logprob", "step_gain", "implicit_reward", "self_reward")
DTYPES = st.sampled_from((torch.float64, torch.float32))


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data(), dtype=DTYPES, seed=st.integers(0, 9999))
def test_published_methods_are_their_papers(name, data, dtype, seed):
    """Credit, loss and gradient of every entry, against loops written from the papers."""
    method = METHODS[name]
    rollouts = data.draw(rollouts_strategy(NAMES, signed=SIGNED, dtype=dtype))
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    batch, (logprob, old) = reference.batch_of(rollouts), logprobs_like(rollouts, seed)
    credit = method.credit(rollouts)
    assert credit.dtype == dtype
    expected = torch.tensor(reference.CREDIT[name](batch), dtype=torch.float64).view(credit.shape)
    torch.testing.assert_close(credit.double(), expected, **tolerance)
    leaf = logprob.clone().requires_grad_()
    plan = method.plan(logprob=leaf, old_logprob=old, credit=credit, rollouts=rollouts)
    loss, _ = method.loss(logprob=leaf, old_logprob=old, credit=credit, rollouts=rollouts, plan=plan)
    loss.backward()
    chosen = reference.planned(plan)
    slow = reference.method_loss(name, batch, *(x.double().tolist() for x in (logprob, old, credit)), chosen)
    torch.testing.assert_close(loss.detach().double(), torch.tensor(slow[0], dtype=torch.float64), **tolerance)
    torch.testing.assert_close(
        leaf.grad.double(), torch.tensor(slow[1], dtype=torch.float64).view(credit.shape), **tolerance
    )


def test_the_reference_covers_every_method():
    assert set(reference.CREDIT) == set(reference.LOSS) == set(METHODS)


@given(rollouts=rollouts_strategy(("entropy",)), max_length=st.integers(1, 8))
def test_dapo_within_a_budget_punishes_length(rollouts, max_length):
    batch = reference.batch_of(rollouts)
    expected = batch.rows(reference.group_center(batch, reference.overlong(batch, batch.reward, max_length)))
    credit = METHODS["dapo"].within(max_length).credit(rollouts)
    torch.testing.assert_close(credit, torch.tensor(expected, dtype=torch.float64).view(credit.shape))


@given(rollouts=rollouts_strategy(("entropy",)), seed=st.integers(0, 9999))
def test_dapo_with_equal_clips_is_grpo_up_to_aggregation(rollouts, seed):
    logprob, old = logprobs_like(rollouts, seed)
    dapo, grpo = METHODS["dapo"].replace(high=0.2), METHODS["grpo"].replace(aggregate=TokenMean())
    assert torch.equal(dapo.credit(rollouts), grpo.credit(rollouts))
    losses = [
        m.loss(logprob=logprob, old_logprob=old, credit=m.credit(rollouts), rollouts=rollouts)[0] for m in (dapo, grpo)
    ]
    assert torch.equal(*losses)


# otb keeps the return where no sibling is alive; vineppo, spo_chain and exact_value compare with values of their own;
# the others have a source of credit besides the outcome, or share out the batch's.
RELATIVE = set(METHODS) - {
    "reinforce",
    "reinforce_pp_baseline",
    "otb",
    "vineppo",
    "spo_chain",
    "exact_value",
    "learned_credit",
}
RELATIVE -= {"grpo_process", "rto_group", "spro", "abc", "prime_offline", "entropy_bonus", "entropy_bonus_adaptive"}


@pytest.mark.parametrize("name", sorted(RELATIVE))
@given(rollouts=rollouts_strategy(NAMES, dtype=torch.float32))
def test_groups_of_equal_rewards_teach_nothing(name, rollouts):
    assert (METHODS[name].credit(rollouts)[~rollouts.informative] == 0).all()


def test_needs_are_the_scores_that_are_read():
    assert METHODS["grpo"].needs == frozenset()
    assert METHODS["gtpo"].needs == METHODS["forking_tokens"].needs == {"entropy"}
    assert METHODS["exact_value"].needs == {"exact_value"}
    assert METHODS["gtpo"].replace(score="surprisal").needs == {"surprisal"}
    # A score read by the aggregate alone is needed as well.
    assert Method("m", Chain(), Clip(), SelectedMean(TopFraction("x"))).needs == {"x"}


def test_a_missing_score_is_named_before_anything_runs():
    rollouts = Rollouts(torch.ones(1), torch.zeros(1).long(), torch.ones(1, 2).bool(), {"surprisal": torch.ones(1, 2)})
    with pytest.raises(KeyError, match="gtpo needs the scores entropy; these rollouts have: surprisal"):
        METHODS["gtpo"].credit(rollouts)


def test_an_unknown_method_gets_a_suggestion():
    with pytest.raises(KeyError, match=r'no method "gtpp"\. Did you mean "gtpo"\? There are: reinforce, grpo'):
        METHODS["gtpp"]
    with pytest.raises(KeyError, match=r'no method "zzzzzz"\. There are: reinforce'):
        METHODS["zzzzzz"]


# replace and within ---------------------------------------------------------------------------------------------------


def test_replace_sets_a_field_wherever_it_is():
    gtpo = METHODS["gtpo"].replace(alpha=(1, 0.2), scope="batch", name="mine")
    assert gtpo.name == "mine" and gtpo.surrogate == METHODS["gtpo"].surrogate
    assert gtpo.chain == Chain(EntropyReward(alpha=(1, 0.2), scope="batch"), PolarityCenter(scope="batch"))
    assert METHODS["gtpo"].chain.parts[0].scope == "group"  # the table is left alone
    assert METHODS["gtpo"].replace() == METHODS["gtpo"]


def test_replace_by_part():
    both = METHODS["grpo_s"].replace(mean="geometric")
    assert both.chain.parts[0].mean == both.surrogate.mean == "geometric"
    one = METHODS["grpo_s"].replace(**{"SequenceClip.mean": "geometric"})
    assert one.chain == METHODS["grpo_s"].chain and one.surrogate.mean == "geometric"


def test_replace_reaches_the_selection_of_the_aggregate():
    method = METHODS["forking_tokens"].replace(fraction=0.5)
    assert method.chain.parts[-1] == method.aggregate.selection == TopFraction("entropy", 0.5)
    method = METHODS["forking_tokens"].replace(**{"TopFraction.fraction": 0.3})
    assert method.chain.parts[-1] == method.aggregate.selection == TopFraction("entropy", 0.3)


def test_replace_of_a_whole_part_then_of_its_fields():
    method = METHODS["grpo"].replace(surrogate=SequenceClip(), low=0.1)
    assert method.surrogate == SequenceClip(low=0.1)


def test_replace_names_the_fields_there_are():
    with pytest.raises(
        ValueError, match=r"grpo has no field clip_high; it has: Clip\.dual, Clip\.high, Clip\.low, GroupCenter\.ddof"
    ):
        METHODS["grpo"].replace(clip_high=0.3)
    with pytest.raises(ValueError, match=r"grpo has no field Clop\.high"):
        METHODS["grpo"].replace(**{"Clop.high": 0.3, "low": 0.1})
    with pytest.raises(ValueError, match=r"GroupCenter\.scale must be one of"):
        METHODS["grpo"].replace(scale="wide")


def test_within_fills_open_budgets_only():
    assert METHODS["dapo"].within(100).chain.parts[1] == Overlong(100)
    assert METHODS["dr_grpo"].within(100).aggregate == SequenceSum(100)
    assert METHODS["reinforce"].within(100) == METHODS["reinforce"]  # its sum is not divided by a length
    assert METHODS["dapo"].replace(max_length=7).within(100).chain.parts[1] == Overlong(7)
    assert METHODS["grpo"].within(100) == METHODS["grpo"]


def test_hyperparameters_are_named_by_part():
    assert METHODS["rloo"].hyperparameters() == {"SequenceSum.max_length": 1}
    assert METHODS["forking_tokens"].hyperparameters()["TopFraction.fraction"] == 0.2


# Steered --------------------------------------------------------------------------------------------------------------


def sampled(*entropies):
    """A batch of one group whose tokens have these entropies."""
    entropy = torch.tensor([entropies], dtype=torch.float64)
    scores = {"entropy": entropy, "logprob": -entropy}
    return Rollouts(torch.ones(1), torch.zeros(1).long(), torch.ones(1, len(entropies)).bool(), scores)


def test_the_controller_follows_the_target_and_its_state_brings_it_back():
    """Skywork-OR1: up by 0.005 where the mean entropy is at most 0.2, down where it is above, between the bounds."""
    start = now = METHODS["entropy_bonus_adaptive"]
    seen = []
    for mean in (0.1, 0.2, 0.3, 0.3, 0.3, 0.1):
        now = now.after(sampled(mean - 0.1, mean + 0.1))
        seen.append(now.chain.parts[-1].coef)
    assert seen == pytest.approx([0.005, 0.010, 0.005, 0.0, 0.0, 0.005])
    assert now.state(start) == {"EntropyGradient.coef": now.chain.parts[-1].coef}
    assert start.replace(**now.state(start)) == now
    capped = start.replace(coef=0.998).after(sampled(0.1))
    assert capped.chain.parts[-1].coef == 1.0 and start.chain.parts[-1].coef == 0.0
    empty = Rollouts(torch.ones(1), torch.zeros(1).long(), torch.zeros(1, 2).bool(), {})
    assert METHODS["grpo"].after(empty) is METHODS["grpo"] and METHODS["grpo"].state(METHODS["grpo"]) == {}


def test_parts_inside_a_sum_are_reached():
    """replace, within and after go through Sum as they go through Chain."""
    steered = Sum(Chain(Outcome(), Overlong()), EntropyGradient(0.0, target=1.0))
    method = METHODS["dr_grpo"].replace(chain=Chain(steered, GroupCenter(scale="none")))
    assert method.within(9).chain.parts[0].parts[0].parts[1] == Overlong(9)
    assert method.replace(target=2.0).chain.parts[0].parts[1] == EntropyGradient(0.0, target=2.0)
    assert method.after(sampled(0.5)).chain.parts[0].parts[1] == EntropyGradient(0.005, target=1.0)
    assert method.needs == {"entropy", "logprob"} and parse(repr(method)) == method


# Written down ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Half(Transform):
    strength: float = 0.5
    laws: ClassVar = frozenset({"keeps_sign", "row_local", "group_local"})

    def apply(self, credit, rollouts):
        return credit * self.strength


@pytest.mark.parametrize("name", METHODS)
def test_methods_round_trip(name):
    assert parse(repr(METHODS[name])) == METHODS[name]
    assert pickle.loads(pickle.dumps(METHODS[name])) == METHODS[name]
    assert hash(METHODS[name]) == hash(parse(repr(METHODS[name])))


def test_parse_reads_nested_negative_infinite_and_own_parts():
    chain = Chain(Outcome(), Chain(Half(-0.25)), GroupCenter())
    method = Method(
        "mine", chain, ClipCov(band=(-float("inf"), float("inf"))), TokenMean(), summary='a "quoted" line\nand another'
    )
    assert parse(repr(method), Half=Half) == method
    with pytest.raises(ValueError, match=r"unknown part Half: give its class, parse\(text, Half=Half\)"):
        parse(repr(method))
    assert parse(repr(METHODS["cispo"].replace(cap=float("inf")))).surrogate == CISPO(float("inf"))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "Method('m', Chain(), __import__('os').system('x'), TokenMean())",
        "Method('m', Chain(), Clip(open('x')), TokenMean())",
        "Method('m', Chain(), Clip(low=(lambda: 0)()), TokenMean())",
        "Method('m', Chain(), Clip(**{'low': 0.1}), TokenMean())",
        "Method('m', Chain(*[Outcome()]), Clip(), TokenMean())",
        "Method('m', Chain(), Clip().__class__(), TokenMean())",
        "Method('m', Chain(), Clip(0.1 if True else 0.2), TokenMean())",
        "Method('m', Chain(), Clip(f'{1}'), TokenMean())",
        "Method('m', Chain(), Clip(low=x), TokenMean())",
        "Method('m', Chain(), Clip(wrong=1), TokenMean())",
        "Method('m', Chain(), Clip(), covariance(1, 2, 3))",
        "[x for x in (1,)]",
        "Clip()",
        "1",
        "Method('m', Chain(), Clip(",
        "",
        "import os",
        "(" * 5000,
    ],
)
def test_parse_refuses_anything_but_constructors_and_literals(text):
    with pytest.raises(ValueError):
        parse(text)


def test_every_method_says_where_it_comes_from():
    for name, method in METHODS.items():
        assert (
            method.name == name
            and method.summary
            and method.source
            and method.fidelity in ("paper", "code", "reconstructed")
        )
        assert method.mixed_groups_only == (name in ("dapo", "forking_tokens", "random_tokens", "oracle_positions"))


def test_a_method_of_your_own_is_one_dataclass_and_one_line():
    mine = METHODS["grpo"].replace(name="mine", chain=Chain(*METHODS["grpo"].chain.parts, Half(0.5)))
    rollouts = Rollouts(torch.tensor([1.0, 0.0]), torch.zeros(2).long(), torch.ones(2, 3).bool())
    assert torch.equal(mine.credit(rollouts), 0.5 * METHODS["grpo"].credit(rollouts))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (3, 2)], ids=str)
def test_batches_without_a_token_have_no_loss(name, shape):
    """No rows, no width, or only empty rows; rewards may be integers."""
    mask = torch.zeros(shape, dtype=torch.bool)
    rollouts = Rollouts(
        torch.arange(shape[0]) % 2, torch.zeros(shape[0]).long(), mask, {n: torch.full(shape, torch.nan) for n in NAMES}
    )
    leaf = torch.full(shape, torch.nan, requires_grad=True)
    credit = METHODS[name].credit(rollouts)
    loss, stats = METHODS[name].loss(logprob=leaf, old_logprob=leaf.detach(), credit=credit, rollouts=rollouts)
    loss.backward()
    assert loss == 0 and credit.shape == shape and (credit == 0).all() and (leaf.grad == 0).all()
    assert all(torch.isfinite(x) for x in stats.values())


def test_the_engine_fills_in_open_budgets_alone():
    """Of two punishments in one chain, the one that names its length keeps it."""
    dapo = METHODS["dapo"]
    twice = dapo.replace(chain=Chain(*dapo.chain.parts[:1], Overlong(100), Overlong(), *dapo.chain.parts[2:]))
    assert [part.max_length for part in twice.within(48).chain.parts[1:3]] == [100, 48]
