"""The correlation study on the embedded world, small: its numbers, its validation against prefix trees, resuming, and
bad input.
"""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from cuts import Cut
from tokencredit.cli import make_parser
from tokencredit.distribute import together
from tokencredit.durable import read_json
from tokencredit.lm.policy import PolicyConfig
from tokencredit.runs import RunError
from tokencredit.stages import Stages
from tokencredit.studies.correlation import conditions, measurement, pieces, study
from tokencredit.studies.correlation.question import SMALL, STUDY, CorrelationConfig

CONFIG = CorrelationConfig(
    prompts=10,
    rollouts=16,
    bootstraps=40,
    condition_prompts=6,
    condition_samples=4,
    temperatures=(0.5, 1.0),
    proxies=("entropy", "surprisal", "head_norm"),
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "correlation"
    return out, STUDY.run(CONFIG, out, command="tokencredit study correlation")


@pytest.fixture(scope="module")
def policy():
    return PolicyConfig().open()


def test_every_figure_has_value_interval_unit_seed_and_command(result):
    out, result = result
    stored = read_json(out / "result.json")
    assert stored["figures"].keys() == result["figures"].keys()
    for name, figure in stored["figures"].items():
        assert {"value", "low", "high", "unit", "seed", "command"} <= figure.keys(), name
        if None not in (figure["low"], figure["high"], figure["value"]) and "law" not in name:
            assert figure["low"] <= figure["high"], name
    assert stored["command"] == "tokencredit study correlation" and stored["num"]["prompts"] == 10


def test_the_figures_are_those_of_the_stored_tokens(result):
    """Spearman and captured share of entropy, made again from the stored stages with scipy and a sort."""
    out, result = result
    proxies = np.load(out / "stages" / "proxies.npz")
    exact = [np.load(path) for path in sorted((out / "stages").glob("exact_*.npz"))]
    effect, replace = (np.concatenate([piece[name] for piece in exact]) for name in ("before_after", "replace"))
    rollouts = [np.load(path) for path in sorted((out / "stages").glob("rollouts_*.npz"))]
    known = np.isfinite(replace) & np.concatenate([np.isfinite(piece["rewards"]).any(1) for piece in rollouts])
    entropy, effect = proxies["entropy"][known], effect[known]
    value = result["figures"]["exact/before_after/spearman/entropy"].value
    assert value == pytest.approx(stats.spearmanr(entropy, np.abs(effect)).statistic)
    top = effect[np.argsort(-entropy)][: int(0.2 * len(effect))]
    assert result["figures"]["exact/before_after/captured/entropy"].value == pytest.approx(
        (top**2).sum() / (effect**2).sum(), abs=0.02
    )


def test_the_correction_is_nearer_to_the_truth_than_the_naive_figure(result):
    check = result[1]["validation"]["before_after"]
    assert check["corrected_ranks"]["mean_error"] < 0.5 * check["spearman (naive)"]["mean_error"]
    assert check["captured"]["mean_error"] < 0.1


def test_a_killed_study_goes_on_with_the_same_numbers(result, tmp_path):
    """Half the stages are there, the record is still "running", one file is torn."""
    out, result = result
    other = tmp_path / out.name
    shutil.copytree(out, other)
    (other / "result.json").unlink()
    for path in sorted((other / "stages").glob("*_0000*"))[::2]:
        path.unlink()
    next((other / "stages").glob("condition_*")).unlink()
    (other / "stages" / ".proxies.npz.1.tmp").write_bytes(b"PK torn")
    info = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(info | {"status": "running"}))
    STUDY.run(CONFIG, other, command="tokencredit study correlation")
    assert read_json(other / "result.json")["figures"] == read_json(out / "result.json")["figures"]
    with pytest.raises(RunError, match="different run"):
        STUDY.run(CorrelationConfig(prompts=12), other)


def test_pieces_of_a_large_model_are_tokens_and_change_no_figure(tmp_path, monkeypatch):
    """Called large, a completion is a piece; then its tokens are several, as are proxies and the prompts of a
    condition. Cut in each of the three, it goes on with what is not stored, and every count reaches its end.
    """
    few = {"prompts": 4, "rollouts": 8, "completions": 2, "condition_prompts": 3, "temperatures": (), "exact": "no"}
    config = CorrelationConfig(**few, bootstraps=20, condition_samples=2, proxies=("entropy", "head_norm"))
    monkeypatch.setattr(study, "LARGE", 0)
    whole = STUDY.run(config, tmp_path / "whole")["figures"]
    monkeypatch.setattr(together, "WORK", 150 * sum(p.numel() for p in PolicyConfig().open().model.parameters()))
    done, told = [], []

    def cutting(name):
        own, run = [], getattr(pieces, name)

        def cut(*given):
            own.append(name)
            if len(own) == 2:
                raise Cut
            done.append(name)
            return run(*given)

        return cut

    for name in ("proxies", "rolled_out", "condition"):
        monkeypatch.setattr(pieces, name, cutting(name))
    for _ in range(3):
        with pytest.raises(Cut):
            STUDY.run(config, tmp_path / "cut", say=told.append)
    found = STUDY.run(config, tmp_path / "cut", say=told.append)["figures"]
    stored = Counter(path.name.split("_")[0] for path in (tmp_path / "cut" / "stages").glob("*_*.npz"))
    assert Counter(done) == {
        "proxies": stored["proxies"],
        "rolled_out": stored["rollouts"],
        "condition": stored["condition"],
    }
    assert stored["rollouts"] > 8 and stored["proxies"] > 1 and stored["condition"] == 3
    for what in ("computing proxies", "rolling out alternatives", "when is entropy"):
        last = [text for text in told if text.startswith(what)][-1]
        made, total = re.search(r"([\d,]+) of ([\d,]+)", last).groups()
        assert made == total, last
    one, many = (
        [np.load(path) for path in sorted((tmp_path / name / "stages").glob("condition_*.npz"))]
        for name in ("whole", "cut")
    )
    for name in one[0].files:
        np.testing.assert_allclose(np.concatenate([piece[name] for piece in many]), one[0][name], rtol=1e-4, atol=1e-6)
    assert found.keys() == whole.keys()
    sampled = [name for name in whole if name.startswith("sampled/")]
    assert sampled
    for name in sampled:
        for field in ("value", "low", "high"):
            mine, other = getattr(found[name], field), getattr(whole[name], field)
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-7, nan_ok=True), name


def test_tokens_are_cut_by_what_their_rollouts_may_write():
    """By hand: of 5 tokens with 2 rollouts of at most 5, 4, 3, 2, 1 tokens each."""
    cut = lambda together: [(own.start, own.stop) for own in pieces.spans(5, 2, 5, together)]  # noqa: E731
    assert cut(100) == [(0, 5)] and cut(18) == [(0, 2), (2, 5)] and cut(1) == [(k, k + 1) for k in range(5)]
    assert pieces.spans(0, 2, 5, 100) == []


def test_sampled_effects_are_those_of_the_trees(policy):
    """Standardised differences of before_after have mean 0 and are no wider than the rollouts' noise and the trees'
    brackets allow.
    """
    rows = measurement.held_out(policy.task, 4, 3)
    drawn = measurement.draw(policy, rows, 2, 3)
    rollouts, cost = measurement.roll_out(policy, rows, drawn, 64, 3)
    exact = measurement.exact(policy, rows, drawn, eps=1e-5)
    effects = rollouts.effects()
    difference = effects.before_after - exact["before_after"]
    assert abs(np.mean(difference)) < 0.01
    assert np.sqrt(np.mean(difference**2)) < 1.5 * np.sqrt(np.mean(effects.before_after_variance)) + 0.01
    assert cost["rollouts"] == rollouts.count.sum() == 64 * len(rollouts.pi)
    np.testing.assert_allclose(rollouts.pi, exact["pi"], atol=1e-5)
    # The written token is never an alternative to itself.
    ids = np.concatenate([each["ids"] for group in drawn for each in group])
    assert not (rollouts.alternative == ids[:, None]).any()


def test_sampling_is_repeated_by_its_seed(policy):
    rows = measurement.held_out(policy.task, 2, 0)
    one, two, other = (measurement.draw(policy, rows, 2, seed) for seed in (1, 1, 2))
    assert one == two != other
    assert len({str(row["prompt"]) for row in measurement.held_out(policy.task, 30, 0)}) == 30


def test_proxies_point_upwards(policy):
    """Larger means more important: a token of low entropy has a small margin's opposite, so the two agree in rank."""
    rows = measurement.held_out(policy.task, 4, 0)
    drawn = measurement.draw(policy, rows, 1, 0)
    found = measurement.proxies(policy, rows, drawn, 0, ("entropy", "margin", "surprisal"))
    assert stats.spearmanr(found["entropy"], found["margin"]).statistic > 0.9
    rollouts, _ = measurement.roll_out(policy, rows, drawn, 8, 0)
    np.testing.assert_allclose(np.exp(-found["surprisal"]), rollouts.pi, atol=1e-5)


def test_a_task_without_trees_is_measured_from_rollouts_alone(tmp_path):
    config = CorrelationConfig(
        prompts=6,
        rollouts=8,
        bootstraps=40,
        condition_prompts=4,
        condition_samples=2,
        temperatures=(),
        exact="no",
        proxies=("entropy", "surprisal"),
    )
    found = STUDY.run(config, tmp_path / "study")
    assert (
        found["exact"] == {}
        and found["validation"] == {}
        and set(found["sampled"]) == {"replace", "before_after", "spread"}
    )
    assert all(
        found["sampled"][name]["verdict"] in ("resolved", "unresolved at this budget") for name in found["sampled"]
    )
    assert "exact" not in found["view"][0]["before_after"]


def test_bad_input_is_refused_before_anything_is_sampled():
    for wrong, said in (
        ({"temperatures": (0.0,)}, "nothing to compare"),
        ({"rollouts": 4}, "8 rollouts"),
        ({"exact": "maybe"}, "maybe"),
        ({"prompts": 2}, "4 prompts"),
    ):
        with pytest.raises(ValueError, match=said):
            CorrelationConfig(**wrong)
    with pytest.raises(ValueError, match="no finished checkpoint"):
        from tokencredit.studies.correlation.study import _policies

        _policies(CorrelationConfig(runs=("nowhere",)))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"runs": ("nowhere",)}, "no finished checkpoint"),
        ({"policies": {"other": "/nowhere/m"}}, "/nowhere/m"),
        ({"proxies": ("bogus",)}, "no kind is called 'bogus'"),
        ({"exact": "yes", "policy": PolicyConfig(task="stories")}, "stories is none"),
    ],
)
def test_what_cannot_be_had_is_refused_without_a_trace(tmp_path, asked, said):
    with pytest.raises((ValueError, OSError), match=said):
        STUDY.run(CorrelationConfig(prompts=4, rollouts=8, **asked), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_prompts_without_room_are_refused_without_a_trace(tmp_path):
    """A directory that was begun would refuse the command that mends it."""
    config = CorrelationConfig(prompts=4, rollouts=8, policy=PolicyConfig(max_new_tokens=255))
    with pytest.raises(ValueError, match="255 may be written, more than the model's context of 256"):
        STUDY.run(config, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_too_few_tokens_are_refused_before_any_is_rolled_out(tmp_path):
    config = CorrelationConfig(prompts=4, completions=1, rollouts=8, policy=PolicyConfig(max_new_tokens=2))
    with pytest.raises(ValueError, match="8 tokens were sampled, fewer than 50: take more --prompts"):
        STUDY.run(config, tmp_path / "study")
    assert not list((tmp_path / "study").rglob("*rollouts*"))


def test_conditions_rank_calibration_against_agreement():
    """Three conditions, error .1 .2 .3 and captured .9 .5 .1: −1; draw 1 has the reverse: +1."""
    rows = [
        {"draws": {"ece": np.array([e, e]), "captured": np.array([c, 1 - c])}}
        for e, c in ((0.1, 0.9), (0.2, 0.5), (0.3, 0.1))
    ]
    assert conditions.across(rows, "captured").tolist() == pytest.approx([-1, 1])
    assert np.isnan(conditions.across(rows[:2], "captured")).all()
    assert conditions.permutation_p(rows, "captured") == pytest.approx(2 / 6), "the order found and its reverse, of six"
    bins = conditions.difficulty_bins(np.array([0.0, 0, 0, 0.5, 0.5, 1.0]))
    assert sum(member.sum() for _, member in bins) == 6 and bins[0][0] == "V₀ 0.00 to 0.00"


def test_the_command_line_reaches_every_choice():
    args = make_parser().parse_args(
        ["study", "correlation", "--small", "--rollouts", "24", "--proxies", "entropy", "--policy", "a=b=c"]
    )
    config = STUDY.read(args)
    assert (config.prompts, config.rollouts, config.proxies, config.policies) == (
        SMALL["prompts"],
        24,
        ("entropy",),
        {"a": "b=c"},
    )
    with pytest.raises(ValueError, match="LABEL=PATH"):
        STUDY.read(make_parser().parse_args(["study", "correlation", "--policy", "x"]))


def test_a_damaged_stage_is_named(tmp_path):
    stages = Stages(tmp_path)
    assert stages.value("a", lambda: {"x": (1, 2)}) == {"x": [1, 2]} == stages.value("a", lambda: 0)
    stages.arrays("b", lambda: {"x": np.arange(3)})
    assert stages.arrays("b", dict)["x"].tolist() == [0, 1, 2] and set(stages.seconds) == {"a", "b"}
    (tmp_path / "b.npz").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"b\.npz"):
        stages.arrays("b", dict)


@pytest.mark.parametrize("always", (True, False))
def test_prompts_that_always_or_never_succeed_have_nothing_to_resolve(tmp_path, monkeypatch, always):
    """V is 1, or 0, everywhere: no effect, no variance; the study says so, and its page is written."""
    from tokencredit.lm import policy
    from tokencredit.tasks.reckon import Reckon
    from tokencredit.tasks.verdict import CORRECT, WRONG

    class Settled(Reckon):
        def verify(self, completion, row, truncated=False):
            return CORRECT if always else WRONG

    monkeypatch.setattr(policy, "load", lambda name: Settled())
    config = CorrelationConfig(
        prompts=4,
        rollouts=8,
        bootstraps=20,
        condition_prompts=4,
        condition_samples=2,
        temperatures=(),
        exact="no",
        proxies=("entropy", "surprisal"),
    )
    found = STUDY.run(config, tmp_path / "study")
    for estimand in ("replace", "before_after", "spread"):
        assert found["sampled"][estimand]["verdict"] == "unresolved at this budget"
        assert np.isnan(found["figures"][f"sampled/{estimand}/spearman/entropy"].value)
    page = STUDY.write_page(tmp_path / "study").read_text()
    assert "unresolved at this budget" in page and ">nan" not in page.lower()
