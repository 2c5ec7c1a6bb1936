"""The laws hold for every transform and method, and every law catches the bug that is planted for it, by name."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings

from tokencredit import METHODS, Chain, Rollouts, Transform
from tokencredit.credit import (
    LAWS,
    Above,
    Amplify,
    BatchWhiten,
    Below,
    BoundCredit,
    ColumnCenter,
    ConfidenceBonus,
    EntropyBonus,
    EntropyGradient,
    EntropyReward,
    GroupCenter,
    GroupRelativeOverlong,
    GroupWeight,
    LeaveOneOut,
    LengthMean,
    OptimalTokenBaseline,
    Outcome,
    Overlong,
    PolarityCenter,
    ProxyWeight,
    Redistribute,
    Returns,
    Score,
    Sum,
    Tilt,
    ToGo,
    TokenLeaveOneOut,
    TokenReward,
    TokenSampling,
    TopFraction,
    Weight,
)
from tokencredit.objective import GPPO, ClipCov, HybridClip, KLCov, LowEntropyKL
from tokencredit.testing import (
    METHOD_LAWS,
    PLANTED,
    UNIVERSAL,
    check_laws,
    check_method,
    planted_method,
    rollouts_strategy,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    WITHIN = PolarityCenter(population="within_polarity")

TRANSFORMS = [
    Outcome(),
    *(GroupCenter(scale=scale) for scale in ("group", "batch", "none")),
    GroupCenter(eps=0.0, ddof=0),
    LeaveOneOut(),
    TokenLeaveOneOut(),
    ColumnCenter(),
    OptimalTokenBaseline(),
    OptimalTokenBaseline("own"),
    BatchWhiten(),
    *(PolarityCenter(scope=scope, level=level) for scope in ("group", "batch") for level in ("token", "sequence")),
    *(PolarityCenter(population="joint", level=level) for level in ("token", "sequence")),
    WITHIN,
    *(
        EntropyReward(compare=compare, mean=mean, scope=scope)
        for compare in ("column", "row", "matrix")
        for mean in ("arithmetic", "geometric")
        for scope in ("group", "batch")
    ),
    *(
        EntropyReward(level="sequence", mean=mean, scope=scope)
        for mean in ("arithmetic", "geometric")
        for scope in ("group", "batch")
    ),
    EntropyReward(failures=False, entropy_clip=(0.2, 0.28), reward_clip=(1.0, 1.2)),
    Overlong(),
    Overlong(max_length=5, cache=2),
    GroupRelativeOverlong(),
    GroupRelativeOverlong(easy=0.6, punish_failures=True),
    Score("x"),
    Weight("x", 0.5),
    Weight("x", -3.0),
    *(ProxyWeight("x", normalise=how) for how in ("raw", "min_max", "mean_one", "rank")),
    *(TopFraction("x", 0.4, scope=scope) for scope in ("batch", "group", "row")),
    TopFraction("x", 1.0),
    Above("x", 0.7),
    Below("x", 0.7),
    *(TokenSampling("x", 0.4, power, scope=scope) for power, scope in ((1.0, "batch"), (0.5, "group"), (2.0, "row"))),
    TokenSampling(floor=0.2, by_credit=False),
    TokenSampling("x", 1.0, floor=1.0),
    EntropyBonus(),
    *(ConfidenceBonus(prompt=prompt) for prompt in ("none", "group_mean", "prompt_confidence")),
    ConfidenceBonus(0.9, 0.5, all_correct=True),
    EntropyGradient(0.3),
    EntropyGradient(0.3, target=0.8),
    EntropyGradient(0.3, difficulty=0.5),
    EntropyGradient(0.3, difficulty=0.5, rate="past_pass_rate"),
    ToGo("x", 0.5, 0.4, 0.9),
    ToGo("x", -2.0, past=True),
    TokenReward(),
    TokenReward("x", -0.5, "center", 0.9),
    Returns(),
    Returns(0.7),
    Redistribute("x"),
    Redistribute("x", 1.0),
    Amplify("x"),
    Amplify("x", 2.0, 0.5, floor=-float("inf")),
    GroupWeight("x"),
    *(ProxyWeight("x", how, "group") for how in ("raw", "min_max", "mean_one")),
    TopFraction("x", 0.3, "row", by_outcome=True),
    Tilt("x"),
    LengthMean(),
    BoundCredit(0.8),
    Chain(),
    Sum(),
    Sum(Chain(Outcome(), GroupCenter()), ToGo("x")),
    Sum(Weight("x"), Amplify("entropy")),
    Chain(Outcome(), Overlong(4), GroupCenter(), Weight("x"), TopFraction("x", 0.5, "row")),
    Chain(Weight("x"), Chain(ProxyWeight("entropy"), EntropyBonus())),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
def test_transforms_keep_their_laws(transform):
    check_laws(transform, examples=10)


def test_every_transform_is_in_the_list():
    from tokencredit import credit

    public = {c for c in (getattr(credit, name) for name in credit.__all__) if isinstance(c, type)} - {Transform}
    assert {type(t) for t in TRANSFORMS} == public


VARIANTS = {
    "clip_cov, many": METHODS["clip_cov"].replace(surrogate=ClipCov(0.3, (0.0, 5.0), 0.2, 0.2)),
    "kl_cov, many": METHODS["kl_cov"].replace(surrogate=KLCov(0.3)),
    "ce_gppo, dual": METHODS["ce_gppo"].replace(surrogate=GPPO(dual=1.5)),
    "dhpo, by entropy": METHODS["dhpo"].replace(mix="entropy", outer="mix_of_mins", seq_low=0.1, seq_high=0.2),
    "dhpo, stiff": METHODS["dhpo"].replace(surrogate=HybridClip(mix=0.3, outer="mix_of_clips", entropy_to="sequence")),
    "sent, many": METHODS["sent"].replace(surrogate=LowEntropyKL(0.6, 0.3, (0.2, 0.1, 0.05), 0.2, 0.2)),
    "entropy_bonus, hard prompts": METHODS["entropy_bonus_adaptive"].replace(coef=0.2, target=0.7, difficulty=0.5),
    "grpo, dual": METHODS["grpo"].replace(dual=1.5),
    "dapo, 4 tokens": METHODS["dapo"].within(4),
    "dr_grpo, 6 tokens": METHODS["dr_grpo"].within(6),
    "gtpo, batch": METHODS["gtpo"].replace(scope="batch"),
    "gtpo under GSPO-token": METHODS["gtpo"].replace(surrogate=METHODS["gspo_token"].surrogate),
}


@pytest.mark.parametrize("method", [*METHODS.values(), *VARIANTS.values()], ids=[*METHODS, *VARIANTS])
def test_methods_keep_their_laws(method):
    check_method(method, examples=10)


def test_there_is_a_planted_bug_for_every_law():
    assert set(PLANTED) == set(UNIVERSAL) | set(LAWS) | set(METHOD_LAWS)


@pytest.mark.parametrize("law", [*UNIVERSAL, *LAWS])
def test_each_law_of_transforms_catches_its_planted_bug_and_no_other_law_does(law):
    bug = PLANTED[law]
    others = (set(UNIVERSAL) | bug.laws) - {law}
    with pytest.raises(AssertionError, match=f"^{law}: "):
        check_laws(bug, laws={law})
    check_laws(bug, laws=others, examples=6)


@pytest.mark.parametrize("law", METHOD_LAWS)
def test_each_law_of_methods_catches_its_planted_bug_and_no_other_law_does(law):
    bug = planted_method(law)
    with pytest.raises(AssertionError, match=f"^{law}: "):
        check_method(bug, laws={law})
    check_method(bug, laws=set(METHOD_LAWS) - {law}, examples=6)


@pytest.mark.parametrize("law", [*UNIVERSAL, *LAWS])
def test_each_law_of_transforms_passes_on_an_honest_part(law):
    check_laws(Chain(), laws={law}, examples=6)  # the identity keeps every law


def test_a_full_check_names_the_law_too():
    with pytest.raises(AssertionError, match=r"^idle_rows: "):
        check_method(planted_method("idle_rows"))


def test_a_method_whose_chain_breaks_a_law_is_caught():
    with pytest.raises(AssertionError, match=r"^group_names: "):
        check_method(
            METHODS["grpo"].replace(
                chain=Chain(Outcome(), PLANTED["group_names"], GroupCenter(), PLANTED["group_names"])
            )
        )


def test_a_surrogate_that_plans_in_silence_is_caught():
    class Silent(KLCov):
        plans = False

    with pytest.raises(AssertionError, match=r"^needs: Silent plans coefficients but does not declare"):
        check_method(METHODS["kl_cov"].replace(surrogate=Silent()), laws={"needs"})


def test_a_promise_that_is_no_law_is_refused():
    @dataclass(frozen=True)
    class Boast(Transform):
        laws: ClassVar = frozenset({"keeps_faith"})

        def apply(self, credit, rollouts):
            return credit

    with pytest.raises(ValueError, match=r"keeps_faith.*keeps_total"):
        check_laws(Boast())


def test_the_batches_reach_the_degenerate_and_the_ordinary_cases():
    seen = set()

    # Hypothesis draws constants from the source it is run on: the examples change with it, so there are many of them.
    @settings(max_examples=300)
    @given(rollouts_strategy(("a", "b"), signed=("b",)))
    def look(rollouts):
        empty = ~rollouts.mask.any(1)
        sizes = torch.bincount(rollouts.group_index)
        seen.update(
            name
            for name, there in {
                "no rows": not len(rollouts),
                "no width": not rollouts.mask.shape[1],
                "empty row among others": bool(empty.any() and not empty.all()),
                "group of one": bool((sizes == 1).any()),
                "groups apart": len(rollouts) > 2
                and not torch.equal(rollouts.group_index, rollouts.group_index.sort().values),
                "both outcomes": bool(rollouts.mixed.any()),
                "uninformative group": not bool(rollouts.informative.all()),
                "fractions": bool((rollouts.reward % 1 != 0).any()),
                "holes": bool((rollouts.mask[:, 1:] & ~rollouts.mask[:, :-1]).any()),
                "signed": bool((rollouts.scores["b"] < 0).any()),
                "zero scores": bool(((rollouts.scores["a"] == 0) & rollouts.mask).any()),
            }.items()
            if there
        )
        assert (rollouts.scores["a"] >= 0).all() and isinstance(rollouts, Rollouts)

    look()
    assert len(seen) == 11, seen
