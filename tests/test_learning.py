"""Comparing runs: curves and intervals over seeds, verdicts on the claims, and what must not be averaged. And that
training learns.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
from scipy import stats

from tokencredit import report
from tokencredit.methods import METHODS
from tokencredit.runs import Run, RunError
from tokencredit.studies import learning
from tokencredit.studies.claims import findings
from tokencredit.studies.learning import compare, find_runs
from tokencredit.train_config import TrainConfig

STEPS = (0, 10, 20)


def figure(value, width=0.1, num=32):
    return {"value": value, "low": value - width, "high": value + width, "num": num, "level": 0.95}


def made(folder, method, seed, entropy=0.3, steps=STEPS, changes=None, finish=True):
    """A run whose entropy is `entropy` at the last step, and half of that before."""
    config = TrainConfig(method=method, seed=seed, **changes or {})
    run = Run.create(
        folder / f"{method}-{seed}-{len(list(folder.iterdir()))}",
        name=f"{method}-{seed}",
        method=repr(METHODS[method]),
        method_name=method,
        task=config.task,
        model=config.model,
        config=config.as_dict(),
        seed=seed,
        command="x",
    )
    for step in steps:
        run.log_metrics({"step": step, "seconds": step, "entropy": entropy, "reward": 0.5, "pass_rate": 0.5})
        record = {
            "entropy": figure(entropy if step == steps[-1] else entropy / 2),
            "pass@1": figure(0.5),
            "pass@8": figure(0.9),
        }
        run.log_evaluation({"step": step, "seconds": step, "split": "test", "reasons": {"correct": 1}, **record})
    if finish:
        run.finish()
    return run.path


def test_curves_are_means_over_seeds_with_students_interval(tmp_path):
    values = [0.2, 0.3, 0.7]
    found = compare([made(tmp_path, "grpo", seed, value) for seed, value in enumerate(values)])
    curve = found["curves"]["entropy"]["grpo"]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert curve["step"] == [0, 10, 20] and curve["value"] == pytest.approx([0.2, 0.2, 0.4])
    assert low < 0 and (curve["low"][-1], curve["high"][-1]) == pytest.approx((0, high)), "entropy ends at 0"
    assert curve["seeds"]["2"] == {"step": [0, 10, 20], "value": [0.35, 0.35, 0.7]}
    [method] = found["methods"]
    assert (method["name"], method["label"], method["seeds"]) == ("grpo", "grpo", [0, 1, 2])
    assert (
        method["changes"] == METHODS["grpo"].summary
        and method["source"] == METHODS["grpo"].source
        and method["needs"] == []
    )
    assert method["summary"]["entropy"] == {
        "value": pytest.approx(0.4),
        "low": 0,
        "high": pytest.approx(high),
        "step": 20,
    }


def test_one_seed_has_the_evaluations_own_interval(tmp_path):
    found = compare([made(tmp_path, "gtpo", 0), made(tmp_path, "grpo", 0)])
    curve = found["curves"]["pass@1"]["gtpo"]
    assert (curve["low"], curve["high"]) == ([0.4] * 3, [0.6] * 3)
    assert {f["verdict"] for f in found["findings"]} == {"not resolved"}
    assert all("one seed, so no interval" in f["detail"] for f in found["findings"])


def test_steps_count_where_every_seed_has_reached_them(tmp_path):
    """A run that is behind does not lend its early figures to the last step; one without evaluations is left out of the
    curve.
    """
    behind = made(tmp_path, "grpo", 1, 0.2, steps=(0, 10), finish=False)
    paths = [made(tmp_path, "grpo", 0, 0.6), behind, made(tmp_path, "grpo", 2, steps=())]
    [method] = compare(paths)["methods"]
    assert method["summary"]["entropy"]["step"] == 10 and method["summary"]["entropy"]["value"] == pytest.approx(
        (0.3 + 0.2) / 2
    )
    assert method["seeds"] == [0, 1, 2]
    nothing = compare([made(tmp_path, "dapo", 0, steps=())])
    assert nothing["curves"] == {} and nothing["findings"] == [] and nothing["methods"][0]["summary"] == {}


def claims(found):
    """{(what is claimed, baseline): verdict} of the entropy claims and others."""
    return {
        (f["detail"].split(" at ")[0], "dapo" if "than dapo" in f["claim"] else "grpo"): f["verdict"]
        for f in found["findings"]
    }


def test_verdicts(tmp_path):
    paths = [made(tmp_path, "gtpo", seed, 0.50 + 0.01 * seed) for seed in range(6)]
    paths += [made(tmp_path, "dapo", seed, 0.30 + 0.01 * seed + 0.002 * (seed % 2)) for seed in range(6)]
    paths += [made(tmp_path, "grpo", seed, 0.80 + 0.01 * seed + 0.002 * (seed % 3)) for seed in range(5)]
    found = compare(paths)
    verdicts = claims(found)
    assert verdicts[("entropy", "dapo")] == "shows here" and verdicts[("entropy", "grpo")] == "does not show here"
    assert verdicts[("pass@1", "dapo")] == "not resolved" and verdicts[("pass@8", "grpo")] == "not resolved"
    against = next(f for f in found["findings"] if f["detail"].startswith("entropy") and "than grpo" in f["claim"])
    assert (
        "entropy at step 20, paired by seed: -0.302" in against["detail"] and "5 seeds" in against["detail"]
    )  # the five that both have
    assert "Holm's over 6 claims" in against["detail"]


def test_what_one_comparison_would_resolve_several_may_not():
    """p = .02 for each of four claims: alone it would show, in the family of four it does not (Holm: .08)."""
    differences = np.array([0.1, 0.5, 0.9, 0.2, 0.35])
    lines = {
        m: {
            name: {"seeds": {str(s): {"step": [1], "value": [float(v)]} for s, v in enumerate(values)}}
            for name, values in (("gtpo", differences), ("grpo", 0 * differences))
        }
        for m in ("entropy", "length", "pass@1", "pass@8")
    }
    assert 0.0125 < stats.ttest_1samp(differences, 0).pvalue < 0.05
    assert [f["verdict"] for f in findings({"entropy": lines["entropy"]}, "gtpo", ["grpo"])] == ["shows here"]
    assert {f["verdict"] for f in findings(lines, "gtpo", ["grpo"])} == {"not resolved"}


def test_seeds_are_paired_at_a_step_that_both_have(tmp_path):
    paths = [made(tmp_path, "gtpo", seed, 0.4) for seed in (0, 1)] + [
        made(tmp_path, "grpo", seed, 0.2, steps=(0, 10)) for seed in (1, 2)
    ]
    [entropy, *_] = compare(paths)["findings"]
    assert (
        "entropy at step 10" in entropy["detail"] and "+0.000" in entropy["detail"] and "one seed" in entropy["detail"]
    )
    assert compare([made(tmp_path, "gtpo", 0), made(tmp_path, "grpo", 5)])["findings"] == []


def test_other_settings_of_the_methods_are_said(tmp_path):
    paths = [made(tmp_path, "gtpo", 0, changes={"learning_rate": 1e-3}), made(tmp_path, "grpo", 0)]
    assert all(
        f["detail"].endswith("; the runs also differ in learning_rate 0.001 against 0.0005")
        for f in compare(paths)["findings"]
    )
    same = [
        made(tmp_path, "dapo", 0, changes={"method_options": {"high": 0.3}, "threads": 2}),
        made(tmp_path, "gtpo", 0),
    ]
    assert not any("differ" in f["detail"] for f in compare(same)["findings"])


@pytest.mark.parametrize(
    "one, other, message",
    [
        (("grpo", 0), ("grpo", 0), "are both seed 0 of grpo: leave one out"),
        (
            ("grpo", 0),
            ("grpo", 1, {"learning_rate": 1e-3}),
            "learning_rate = 0.0005, .* has 0.001: they are not seeds of one grpo",
        ),
        (
            ("gtpo", 0),
            ("gtpo", 1, {"method_options": {"alpha": [1, 0.5]}}),
            "method_options = .* they are not seeds of one gtpo",
        ),
        (
            ("grpo", 0),
            ("gtpo", 0, {"task_options": {"operands": [3]}}),
            "task_options = .*: their evaluations cannot be compared",
        ),
        (
            ("grpo", 0),
            ("gtpo", 0, {"eval_samples": 4}),
            "eval_samples = 8, .* has 4: their evaluations cannot be compared",
        ),
    ],
)
def test_what_is_no_replicate_is_not_averaged(tmp_path, one, other, message):
    paths = [
        made(tmp_path, method, seed, changes=changes[0] if changes else None) for method, seed, *changes in (one, other)
    ]
    with pytest.raises(RunError, match=message):
        compare(paths)


def test_the_report_says_method_and_what_it_changes(tmp_path):
    paths = [made(tmp_path, "gtpo", 0), made(tmp_path, "grpo", 0)]
    page = report.write(paths, tmp_path / "report.html", compare(paths)).read_text()
    assert (
        METHODS["gtpo"].summary in page
        and '<th scope="row"><span class="swatch" aria-hidden="true"></span>gtpo</th>' in page
    )


def test_runs_are_found(tmp_path):
    a, b = made(tmp_path, "grpo", 0), made(tmp_path, "grpo", 1)
    (tmp_path / "grpo-0.log").touch()
    assert find_runs([tmp_path]) == find_runs([a, b, a, tmp_path / "grpo-0.log"]) == sorted([a, b])
    with pytest.raises(ValueError, match="gone: no such directory"):
        find_runs([a, tmp_path / "gone"])


def test_what_is_no_run_is_left_out_with_a_warning_and_refused_alone(tmp_path):
    """`runs/*` finds models and unfinished pivotality runs as well."""
    run, pivots, model = made(tmp_path, "grpo", 0), tmp_path / "pivots", tmp_path / "model"
    for path in (pivots, model):
        path.mkdir()
    (pivots / "alternatives.parquet").touch()
    with pytest.warns(UserWarning) as told:
        assert find_runs([pivots, run, model]) == [run]
    assert [str(each.message) for each in told] == [
        f"left out of the page: {pivots}: a run of `tokencredit pivotality` that has not finished: give its command"
        " again",
        f"left out of the page: {model}: no run or study here (no run.json, no result.json of `tokencredit study`)",
    ]
    with pytest.raises(
        ValueError,
        match=f"^{pivots}: a run of `tokencredit pivotality` that has not finished.*\n{model}: no run or study",
    ):
        find_runs([pivots, model])


def test_ten_rollout_batches_teach_something(tmp_path):
    """GRPO from the shipped model: held-out pass@1 leaves the interval that it began with, and so does the training
    pass rate.
    """
    from tokencredit.engines.train import train

    config = TrainConfig(
        steps=10, eval_every=10, eval_prompts=192, eval_samples=4, record_every=0, save_every=0, threads=1
    )
    run = train(config, tmp_path / "run")
    before, after = (e["pass@1"] for e in run.evaluations())
    assert after["low"] > before["high"] + 0.1
    rates = [m["pass_rate"] for m in run.metrics()]
    # Four steps are two batches of 64 prompts: each mean has at most a variance of 0.25 / 128.
    assert np.mean(rates[-4:]) - np.mean(rates[:4]) > 4 * np.sqrt(2 * 0.25 / 128)


def test_the_interval_of_a_share_stays_a_share():
    """Two seeds, 0.9 and 1.0: Student's interval is 0.95 ± 12.7 · 0.05, which only entropy and length may keep."""
    figures = [{"value": 0.9, "low": 0.8, "high": 1.0, "num": 8}, {"value": 1.0, "low": 0.9, "high": 1.0, "num": 8}]
    share, other = learning._over_seeds("pass@8", figures), learning._over_seeds("entropy", figures)
    half = 12.706 * 0.05
    assert (other.low, other.high) == pytest.approx((0.95 - half, 0.95 + half), abs=1e-3)
    assert share.value == other.value == pytest.approx(0.95) and (share.low, share.high) == (other.low, 1.0)
