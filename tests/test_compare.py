"""Comparing methods at an equal budget: what a run may spend, what is read off its curves, verdicts against known
truths, whole studies.
"""

import io
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from tokencredit import train_config as engines
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.budget import Budget
from tokencredit.cli import main, make_parser
from tokencredit.lm import room
from tokencredit.related import RELATED
from tokencredit.runs import Run, RunError
from tokencredit.stats import OverSeedsAndPrompts
from tokencredit.studies import jobs
from tokencredit.studies.book import Book
from tokencredit.studies.compare.curves import Curves, Prompts, area, budget_to, on_grid
from tokencredit.studies.compare.figures import Marks, figures
from tokencredit.studies.compare.question import STUDY, Comparison
from tokencredit.studies.compare.rates import choose
from tokencredit.studies.compare.study import (
    CHECK_SEED,
    COMPARED,
    CompareConfig,
    compare,
    forecast,
    plan,
    unavailable,
)
from tokencredit.studies.compare.tables import markdown, tables
from tokencredit.studies.jobs import FINAL, Tell, command_of, finished, run_jobs, side_by_side
from tokencredit.studies.processes import Forked, run_all
from tokencredit.studies.result import write_result
from tokencredit.studies.study import Work
from tokencredit.tasks import load
from tokencredit.tasks.data import held_out, part_of
from tokencredit.train_config import TrainConfig

TINY = TrainConfig(
    prompts=4, group=4, steps=4, updates=1, eval_prompts=8, eval_samples=2, record_every=0, save_every=2, threads=1
)
SETTINGS = ("prompts=4", "group=4", "updates=1", "eval_prompts=8", "eval_samples=2")
SMALL = [*(word for setting in SETTINGS for word in ("--set", setting)), "--steps", "2", "--final-prompts", "16"]


def config(**changes):
    usual = {"base": TINY, "budget": Budget("rollouts", 64, 4), "rates": (1.0,), "final_prompts": 16}
    return CompareConfig(**usual | changes)


def work_in(folder, tell=None):
    return Work("compare", None, folder, Book("", 0), tell or Tell())


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "dapo"])
@pytest.mark.parametrize("budget", [{"rollouts": 64, "marks": 4}, {"tokens": 2000, "marks": 2}])
def test_a_run_ends_when_its_budget_is_spent(tmp_path, method, budget):
    from tokencredit.engines.train import train

    spends = replace(TINY, method=method, steps=30, budget=budget, max_rounds=3)
    run, [unit] = train(spends, tmp_path / "run"), set(budget) - {"marks"}
    records, evaluations = run.metrics(), run.evaluations()
    amount, marks = budget[unit], budget["marks"]
    assert records[-1][unit] >= amount > records[-2][unit]
    if unit == "rollouts":  # dynamic sampling draws no more than is left, so both spend the very same
        assert records[-1]["rollouts"] == 64 and all(record["rollouts"] % 16 == 0 for record in records)
    drawn = [record.get("dynamic_sampling/drawn_groups", 4) * 4 for record in records]
    assert [record["rollouts"] for record in records] == np.cumsum(drawn).tolist(), (
        "what dynamic sampling left out counts"
    )
    tokens = np.cumsum([record["length"] * rollouts for record, rollouts in zip(records, drawn)])
    assert [record["tokens"] for record in records] == pytest.approx(tokens.tolist())
    # An evaluation wherever a further mark was passed, at the end too; each says what was spent until then.
    reached = [min(int(record[unit] / amount * marks + 1e-9), marks) for record in records]
    due = [record["step"] for record, now, before in zip(records, reached, [0, *reached]) if now > before]
    assert [record["step"] for record in evaluations] == [0, *due] and due[-1] == records[-1]["step"]
    assert [record[unit] for record in evaluations[1:]] == [record[unit] for record in records if record["step"] in due]
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{records[-1]['step']}" / "complete").exists()
    assert run.status == "finished" and len(evaluations[0]["by_prompt"]["correct"]) == 8


def test_a_run_that_was_killed_spends_what_one_in_one_piece_does(tmp_path):
    from tokencredit.engines.train import train

    spends = replace(TINY, method="dapo", steps=30, budget={"rollouts": 96, "marks": 6}, save_every=1)
    whole = train(spends, tmp_path / "whole")

    def interrupt(event, told):
        if event == "step" and told["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spends, tmp_path / "cut", listen=interrupt)
    again = train(spends, tmp_path / "cut")
    kept = ("step", "rollouts", "tokens")
    for records in ("metrics", "evaluations"):
        assert [[r[k] for k in kept] for r in getattr(again, records)()] == [
            [r[k] for k in kept] for r in getattr(whole, records)()
        ]
    assert [r["by_prompt"] for r in again.evaluations()] == [r["by_prompt"] for r in whole.evaluations()]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rollouts": 0}, "must be a positive number"),
        ({"rollouts": True}, "positive number"),
        ({"marks": 3}, "takes one of rollouts"),
        ({"rollouts": 9, "tokens": 9}, "takes one of"),
        ({"steps": 9}, "takes one of"),
        ({"rollouts": 9, "marks": 0}, "at least 1"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(budget=options)


def test_marks_are_equal_parts():
    budget = Budget.of({"tokens": 30, "marks": 3})
    assert [budget.mark({"tokens": n}) for n in (0, 9, 10, 19, 20, 29, 30, 99)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Budget.of({}) is None and Budget("rollouts", 0.3, 3).mark({"rollouts": 0.1}) == 1, (
        "0.1 / 0.3 · 3 rounds to just under 1"
    )


# --- prompts to choose by, prompts to report --------------------------------------------------------------------------


def test_the_parts_of_the_held_out_prompts_have_none_in_common(tmp_path):
    lines = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(2000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for task in (load("reckon"), load(str(tmp_path / "rows.jsonl"))):
        parts = {part: {str(row["prompt"]) for row in held_out(task, 10**6, part)} for part in ("validation", "final")}
        everything = {str(row["prompt"]) for row in task.rows("test")}
        assert parts["validation"] | parts["final"] == everything and not parts["validation"] & parts["final"]
        share, error = len(parts["validation"]) / len(everything), (0.25 * 0.75 / len(everything)) ** 0.5
        assert abs(share - 0.25) < 4 * error
        assert not everything & {str(row["prompt"]) for row in task.rows("train", 500)}
    few = [row["prompt"] for row in held_out(task, 20, "final")]
    assert len(few) == 20 and set(few) <= {row["prompt"] for row in held_out(task, 40, "final")}
    assert part_of([{"role": "user", "content": "2 + 2"}]) == part_of([{"content": "2 + 2", "role": "user"}])


# --- intervals over seeds and prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seeds, prompts, spread", [(5, 64, (0.03, 0.2, 0.1)), (4, 128, (0.05, 0.0, 0.2)), (5, 64, (0.0, 0.2, 0.1))]
)
def test_intervals_cover_what_other_seeds_and_prompts_would_give(seeds, prompts, spread):
    rng, num, covered, rejected = np.random.default_rng(0), 400, 0, 0
    weights = Prompts(prompts, 200, 0).weights
    for _ in range(num):
        table = spread[0] * rng.standard_normal((seeds, 1)) + spread[1] * rng.standard_normal((1, prompts))
        found = OverSeedsAndPrompts(weights @ (table + spread[2] * rng.standard_normal((seeds, prompts))).T, prompts)
        estimate = found.estimate()
        covered += estimate.low <= 0 <= estimate.high
        rejected += found.p_value() < 0.05
    assert covered / num > 0.95 - 4 * (0.95 * 0.05 / num) ** 0.5 - 0.01 and rejected == num - covered


def test_with_one_kind_of_variation_the_interval_is_students():
    rng = np.random.default_rng(1)
    values = rng.standard_normal(6)
    same = OverSeedsAndPrompts(np.tile(values, (50, 1)), 40).estimate()
    low, high = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    assert (same.low, same.high) == (pytest.approx(low), pytest.approx(high))
    column = rng.standard_normal(80)
    one = OverSeedsAndPrompts(Prompts(80, 4000, 0).means(column[None]), 80)
    low, high = stats.t.interval(0.95, 79, column.mean(), stats.sem(column))
    assert one.estimate().value == pytest.approx(column.mean()) and one.p_value() == 1.0
    assert one.estimate().high - one.estimate().low == pytest.approx(high - low, rel=0.1)
    nothing = OverSeedsAndPrompts(np.zeros((9, 3)), 8)
    assert (nothing.estimate().low, nothing.estimate().high, nothing.p_value()) == (0, 0, 1)


# --- curves -----------------------------------------------------------------------------------------------------------


def first_at(grid, curve, target):
    """Where the straight lines through a curve first reach the target, by walking along them."""
    for fine in np.linspace(0, 1, 20001):
        if np.interp(fine, grid, curve) >= target - 1e-12:
            return fine
    return 1.0


def test_area_and_budget_to_a_target_against_slow_walks():
    rng = np.random.default_rng(2)
    grid, curves = np.linspace(0, 1, 9), rng.random((4, 3, 9))
    assert area(curves) == pytest.approx(np.trapezoid(curves, grid, axis=-1))
    for target in (0.0, 0.3, 0.9, 1.5):
        walked = [[first_at(grid, curve, target) for curve in row] for row in curves]
        assert budget_to(curves, target) == pytest.approx(np.array(walked), abs=1e-4)
    assert budget_to(np.array([0.5, 0.5, 0.5]), 0.5) == 0 and budget_to(np.array([0.0, 0.5, 0.5]), 0.5) == 0.5


def test_curves_are_read_between_evaluations_off_straight_lines():
    share, values = np.array([0.0, 0.37, 1.05]), np.array([[0.0, 1.0], [0.37, 0.63], [1.05, -0.05]])
    grid = np.linspace(0, 1, 5)
    assert on_grid(grid, share, values) == pytest.approx(np.stack([grid, 1 - grid], 1))
    assert on_grid(grid, share[:2], values[:2])[-1] == pytest.approx([0.37, 0.63]), "the last value holds to the end"


# --- made-up runs with known truths -----------------------------------------------------------------------------------


def make_run(path, job, level, seed, rng, prompts=64, final=256, entropy=(0.4, 0.2), seconds=10.0):
    """A run whose pass@1 rises from 0.2 to `level` in a straight line over its budget, on prompts of various
    difficulty.
    """
    run = Run.create(
        path,
        name=path.name,
        method="m",
        method_name=job.config.method,
        task="reckon",
        model="reckon",
        config=job.config.as_dict(),
        seed=seed,
        command="x",
    )

    def evaluation(share, step, num, split):
        chance = np.clip(0.2 + share * (level - 0.2) + 0.05 * np.sin(np.arange(num)), 0, 1)
        found = {
            "correct": rng.binomial(8, chance).tolist(),
            "length": [10.0] * num,
            "entropy": [entropy[0] + share * (entropy[1] - entropy[0])] * num,
        }
        spent = {"seconds": seconds * share, "rollouts": int(64 * share), "tokens": int(640 * share)}
        run.log_evaluation({"step": step, **spent, "split": split, "by_prompt": found, "num_samples": 8})

    for step in range(5):
        if step:
            spent = {"seconds": seconds * step / 4, "rollouts": 16 * step, "tokens": 160 * step}
            run.log_metrics({"step": step, **spent, "seconds_update": seconds / 4})
        evaluation(step / 4, step, prompts, "test")
    if job.final:
        evaluation(1.0, 4, final, FINAL)
    run.finish()


def made_study(folder, levels, seeds=4, by_seed=0.0, study=None, **more):
    """The result over runs of the methods with these final pass@1; `by_seed` is what a seed adds, the same for every
    method.
    """
    study, rng = study or config(), np.random.default_rng(0)
    shift = by_seed * np.linspace(-1, 1, seeds) if seeds > 1 else [0.0]
    jobs = [study.job(method, 1.0, seed, final=True) for method in levels for seed in range(seeds)]
    for job in jobs:
        own = {key: value[job.config.method] for key, value in more.items() if job.config.method in value}
        make_run(
            folder / job.name, job, levels[job.config.method] + shift[job.config.seed], job.config.seed, rng, **own
        )
    assert all(finished(folder, job) for job in jobs)
    chosen = choose(study, folder, list(levels), [])
    book = Book("tokencredit study compare", 0)
    found = figures(study, folder, jobs, "grpo", chosen, Marks(), book)
    return found | {
        "figures": book.figures,
        "command": "tokencredit study compare",
        "seeds": list(range(seeds)),
        "config": study.as_dict(),
        "baseline": "grpo",
        "failed": {},
        "wall": 1.0,
        "workers": 1,
        "study": "compare",
    }


def verdicts_of(result, measure):
    return {row["method"]: row["verdict"] for row in result["verdicts"] if row["measure"] == measure}


def test_verdicts_find_what_was_put_there_and_nothing_else(tmp_path):
    levels = {"grpo": 0.7, "dapo": 0.85, "gtpo": 0.55, "grpo_s": 0.7}
    result = made_study(tmp_path / "seeds differ", levels, by_seed=0.1)
    expected = {"dapo": "better", "gtpo": "worse", "grpo_s": "not resolved at this budget"}
    assert verdicts_of(result, "area") == verdicts_of(result, "pass@1") == expected
    told = result["figures"]["difference/pass@1/dapo"]
    assert told.low < 0.15 < told.high and told.high - told.low < 0.1, "what seeds share is taken out by pairing"
    own = result["figures"]["dapo/pass@1"]
    assert own.high - own.low > 0.2 and own.seed == [0, 1, 2, 3] and own.unit == "share of samples"
    assert told.command == "tokencredit study compare" and told.more["p"] <= told.more["holm"]
    line = next(line for line in result["findings"] if line.startswith("Pass@1"))
    assert "better than grpo: dapo; worse than grpo: gtpo; not resolved at this budget: grpo_s" in line
    assert any("learning rate was not checked" in line for line in result["findings"])
    result = made_study(tmp_path / "seeds agree", levels)
    assert verdicts_of(result, "budget_to") == expected and markdown(result).count("| not resolved |") == 3
    # The target is 0.8 · 0.7 = 0.56: reached after (0.56 − 0.2) / (level − 0.2) of the budget.
    assert result["target"]["value"] == pytest.approx(0.56, abs=0.02)
    assert result["figures"]["grpo/budget_to"].value == pytest.approx(64 * 0.36 / 0.5, rel=0.1)
    assert result["figures"]["gtpo/budget_to"].value > 0.9 * 64


def test_the_table_fits_80_columns(tmp_path):
    result, page = (
        made_study(tmp_path, {"grpo": 0.7, "ptw_gradient_norm": 0.5, "entropy_advantage": 0.9}, seeds=2),
        io.StringIO(),
    )
    Console(file=page, width=80).print(tables(result)[0])
    lines = page.getvalue().splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 80 and "…" not in page.getvalue(), page.getvalue()


def test_equal_methods_are_seldom_told_apart(tmp_path):
    """Fourteen methods of one level: Holm keeps the chance of any false verdict at 5 % per measure; three are bounded
    well below five.
    """
    result = made_study(
        tmp_path, dict.fromkeys([name for name in COMPARED if name != "exact_value"], 0.7), by_seed=0.05
    )
    assert sum(row["verdict"] != "not resolved at this budget" for row in result["verdicts"]) <= 2
    assert min(row["holm"] for row in result["verdicts"]) >= min(row["p"] for row in result["verdicts"]) > 0


def test_the_size_that_is_said_to_be_seen_is_where_the_first_step_of_holm_finds_a_difference(tmp_path):
    levels = dict(zip(COMPARED, np.linspace(0.5, 0.8, len(COMPARED)))) | {"grpo": 0.65}
    result = made_study(tmp_path, levels, by_seed=0.05)
    rows = [row for row in result["verdicts"] if row["measure"] == "area"]
    sizes = [abs(result["figures"][row["difference"]].value) for row in rows]
    found = [row["p"] < 0.05 / len(rows) for row in rows]
    assert [size > row["seen"] for size, row in zip(sizes, rows)] == found and 0 < sum(found) < len(rows)
    told = np.median([row["seen"] for row in rows])
    assert f"differences under about {told:.3f} cannot be seen" in result["findings"][0]


def test_collapse_times_and_one_seed(tmp_path):
    result = made_study(
        tmp_path, {"grpo": 0.7, "dapo": 0.3}, seeds=1, entropy={"dapo": (0.4, 0.05)}, seconds={"dapo": 25.0}
    )
    grpo, dapo = result["methods"]
    assert (grpo["collapsed"], dapo["collapsed"]) == (0, 1) and (grpo["never"], dapo["never"]) == (0, 1)
    assert result["figures"]["dapo/overhead"].value == pytest.approx(2.5)
    assert result["figures"]["dapo/seconds_update"].value == pytest.approx(25)
    assert set(verdicts_of(result, "pass@1").values()) == {"not resolved at this budget"}
    said = " ".join(result["findings"])
    assert (
        "One seed: intervals are over prompts alone" in said
        and "dapo (1 of 1)" in said
        and "25 % of the initial" in said
    )


def test_a_baseline_that_learned_nothing_has_no_target(tmp_path):
    result = made_study(tmp_path, {"grpo": 0.2, "gtpo": 0.5})
    assert {row["measure"] for row in result["verdicts"]} == {"area", "pass@1"} and result["methods"][0][
        "never"
    ] is None
    assert "the initial policy already has 80 %" in " ".join(result["findings"])


def test_curves_of_a_method_keep_seeds_and_prompts_apart(tmp_path):
    made_study(tmp_path, {"grpo": 0.7, "gtpo": 0.5}, seeds=3)
    study = config()
    runs = {seed: Run.open(tmp_path / study.job("grpo", 1.0, seed, final=True).name) for seed in (2, 0, 1)}
    curves = Curves.read(runs, study.budget)
    assert (
        curves.seeds == [0, 1, 2]
        and curves.marks["pass@1"].shape == (3, 5, 64)
        and curves.final["pass@8"].shape == (3, 256)
    )
    record = runs[2].evaluations()[3]
    assert curves.marks["pass@1"][2, 3] == pytest.approx(np.array(record["by_prompt"]["correct"]) / 8)
    assert curves.at([2]).marks["pass@1"] == pytest.approx(curves.marks["pass@1"][2:])
    weights = Bootstrap(np.arange(64), 10, 0).cluster_weights / 64
    means = Prompts(64, 10, 0).means(curves.marks["length"])
    assert means == pytest.approx(np.einsum("rp,sgp->rsg", weights, curves.marks["length"]))


# --- learning rates ---------------------------------------------------------------------------------------------------


def test_the_rate_is_chosen_by_the_second_half_on_validation_prompts(tmp_path):
    study, rng = config(rates=(4.0, 1.0, 2.0), check_seeds=2), np.random.default_rng(3)
    assert study.rates == (1.0, 2.0, 4.0)
    levels = {"grpo": {1.0: 0.5, 2.0: 0.9, 4.0: 0.6}, "gtpo": {1.0: 0.4, 2.0: 0.5, 4.0: 0.95}}
    checks = [
        study.job(method, factor, seed, final=False) for method in levels for factor in study.rates for seed in range(2)
    ]
    for job in checks:
        assert job.config.eval_part == "validation" and job.config.seed >= CHECK_SEED and job.final is None
        assert job.config.learning_rate == pytest.approx(TINY.learning_rate * job.factor)
        make_run(tmp_path / job.name, job, levels[job.config.method][job.factor], job.config.seed, rng)
    found = choose(study, tmp_path, ["grpo", "gtpo", "dapo"], checks)
    assert [found[m]["factor"] for m in found] == [2.0, 4.0, 1.0] and [found[m]["edge"] for m in found] == [
        None,
        "highest",
        None,
    ]
    # From half of the budget on the line from 0.2 to 0.9 is at 0.55, 0.725, 0.9: 0.725 on average.
    assert (
        np.mean(found["grpo"]["scores"][2.0]) == pytest.approx(0.725, abs=0.02)
        and len(found["grpo"]["scores"][2.0]) == 2
    )
    final = study.job("grpo", 2.0, 0, final=True)
    assert (
        final.config.eval_part == "final"
        and final.config.seed == 0
        and final.config.learning_rate == 2 * TINY.learning_rate
    )
    assert final.name != study.job("grpo", 4.0, 0, final=True).name, "another choice is another directory"


def test_commands_are_those_that_anybody_would_type(tmp_path):
    job = config().job("gtpo", 2.0, 3, final=True)
    args = make_parser().parse_args(shlex.split(command_of(job.config, tmp_path / "x"))[1:])
    assert (
        engines.read_config(args.config, args.settings, task=args.task, method=args.method, seed=args.seed)
        == job.config
    )


# --- whole studies ----------------------------------------------------------------------------------------------------


def test_a_study_a_run_that_fails_and_a_study_that_goes_on(tmp_path, capsys):
    out = tmp_path / "study"
    argv = [
        "study",
        "compare",
        "--methods",
        "grpo",
        "gtpo",
        "--seeds",
        "2",
        "--rates",
        "1",
        "2",
        "--workers",
        "2",
        *SMALL,
        "--out",
        str(out),
    ]
    (out / "runs").mkdir(parents=True)
    for factor in (1, 2):
        (out / "runs" / f"gtpo-x{factor}-1").write_text("in the way")
    assert main(argv) == 1
    text = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    [failed] = result["failed"]
    assert (
        failed.startswith("runs/gtpo-x")
        and f"{failed} failed: exit 1: error:" in text.replace("\n", " ")
        and str(out / failed) in text
    )
    assert [m["seeds"] for m in result["methods"]] == [[0, 1], [0]] and len(list((out / "checks").glob("*-x*-0"))) == 4
    assert {row["seeds"][-1] for row in result["verdicts"] if row["method"] == "gtpo"} == {0}
    runs = [path for path in out.glob("*/*/metrics.jsonl")]
    assert [Run.open(path.parent).metrics()[-1]["rollouts"] for path in runs] == [32] * (4 + 3)
    assert (out / "table.md").read_text().startswith("| method |") and "gtpo" in (out / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in runs}
    # Again, with nothing in the way: the run that failed is made, no other is touched.
    (out / failed).unlink()
    assert main(argv) == 0 and json.loads((out / "result.json").read_text())["failed"] == {}
    assert {path: path.stat().st_mtime_ns for path in runs} == before
    assert [m["seeds"] for m in json.loads((out / "result.json").read_text())["methods"]] == [[0, 1]] * 2
    capsys.readouterr()
    assert main(["study", "compare", "--table", "--out", str(out)]) == 0
    assert capsys.readouterr().out == (out / "table.md").read_text()
    assert (
        main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
        and "Verdicts" in (tmp_path / "page.html").read_text()
    )
    capsys.readouterr()
    # Another configuration is refused, and the field that differs is named.
    assert main([*argv[:-2], "--set", "learning_rate=1e-3", "--out", str(out)]) == 1
    assert "learning_rate: 0.0005 in the directory, 0.001 asked for" in capsys.readouterr().err


def perform_a_quarter(job, path):
    """`perform`, but after its tenth step it waits for whatever ends it."""
    record = Run.log_metrics

    def record_and_wait(run, figures):
        record(run, figures)
        if figures["step"] == 10:
            signal.pause()

    Run.log_metrics = record_and_wait
    jobs.perform(job, path)


def test_an_interrupted_study_stops_its_runs_and_goes_on(tmp_path, monkeypatch):
    study = config(base=replace(TINY, steps=40), budget=Budget("rollouts", 640, 4))

    class Interrupt(Tell):
        def running(self, name, share, figures):
            if share >= 0.25:
                raise KeyboardInterrupt

    arguments = {"methods": ["grpo", "gtpo"], "seeds": 1, "baseline": "grpo"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jobs, "perform", perform_a_quarter)
        compare(study, work_in(tmp_path, Interrupt()), **arguments)
    [cut] = [path.parent for path in tmp_path.glob("runs/*/metrics.jsonl")]
    assert Run.open(cut).status == "running" and len(Run.open(cut).metrics()) == 10
    assert multiprocessing.active_children() == [], "nothing runs on"
    result = compare(study, work_in(tmp_path), **arguments)
    assert result["failed"] == {} and Run.open(cut).info["resumed"] and len(result["methods"]) == 2


def test_without_a_baseline_there_is_no_comparison(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "grpo-x1-0").write_text("")
    with pytest.raises(RuntimeError, match=r"the baseline grpo has no finished run.*: exit 1"):
        compare(config(), work_in(tmp_path), methods=["grpo", "gtpo"], seeds=1, baseline="grpo")
    assert not (tmp_path / "result.json").exists()


def test_a_budget_that_the_batches_cannot_spend_fails_the_run(tmp_path):
    job = replace(config(budget=Budget("tokens", 1e5, 2)).job("grpo", 1.0, 0, final=True), final=None)
    why = run_jobs(tmp_path, [job], 1, "runs", Tell())
    assert "tokens were left after 4 rollout batches: allow more with --steps" in why[job.name] and not finished(
        tmp_path, job
    )


def test_a_run_of_another_configuration_is_refused_by_name(tmp_path):
    job = config().job("grpo", 1.0, 0, final=True)
    other = replace(job, config=replace(job.config, temperature=0.5))
    make_run(tmp_path / job.name, other, 0.5, 0, np.random.default_rng(0))
    assert not finished(tmp_path, job)
    with pytest.raises(RunError, match=r"temperature: 0\.5 in the directory, 1\.0 asked for"):
        jobs.perform(job, tmp_path / job.name)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "grpo", "gtp"], 'Did you mean "gtpo"'),
        (["--methods", "dapo", "gtpo"], "the baseline grpo is not among the methods"),
        (["--baseline", "dappo"], 'Did you mean "dapo"'),
        (["--methods", "grpo"], "needs another method"),
        (["--budget", "hours"], "--budget is rollouts, tokens, seconds"),
        (["--budget", "tokens"], "say how many"),
        (["--budget", "rollouts=-3"], "positive number"),
        (["--rates", "1", "1"], "different"),
        (["--set", "seed=3"], "for the study to decide"),
        (["--set", "budget.rollouts=3"], "for the study to decide"),
        (["--set", "promts=3"], "did you mean prompts"),
        (["--table"], "holds no finished study"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_made(tmp_path, capsys, arguments, message):
    assert main(["study", "compare", "--out", str(tmp_path / "x"), *arguments]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ") and not (tmp_path / "x").exists()


FLAGS = ("--seeds", "--rates", "--workers", "--marks", "--final-prompts", "--final-samples", "--check-seeds", "--steps")


@pytest.mark.parametrize("flag", FLAGS)
def test_numbers_that_mean_nothing_are_refused_by_their_flag(tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        main(["study", "compare", "--out", str(tmp_path / "x"), flag, "0"])
    assert f"argument {flag}: must be" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_large_model_can_be_evaluated_less_often():
    config, _, _ = plan(Comparison(marks=4, final_prompts=64, final_samples=2))
    job = config.job("grpo", 1.0, 0, final=True)
    assert job.config.budget == {"rollouts": 24 * 32 * 8, "marks": 4} and job.final == (64, 2)


def test_sizes_follow_the_task_and_are_told_before_anything_runs():
    config, methods, seeds = plan(Comparison(methods=("grpo", "gtpo"), seeds=2))
    assert (config.base.eval_prompts, config.base.eval_samples, config.check_prompts) == (128, 8, 128)
    assert (config.final_prompts, config.final_samples) == (512, 8)
    other = Comparison(methods=methods, training={"task": "stories"}, settings=("eval_samples=2",), final_prompts=96)
    config, *_ = plan(other)
    assert (config.base.eval_prompts, config.base.eval_samples, config.check_prompts) == (64, 2, 64)
    assert (config.final_prompts, config.final_samples) == (96, 4)
    runs, checks = 4, 6
    answers = 11 * (runs * 64 * 3 + checks * 64 * 5) + runs * 96 * 5
    told = forecast(config, len(methods), seeds)
    assert f"{answers:,} completions to evaluate" in told and f"{(runs + checks) * 6144:,} rollouts of training" in told


def test_methods_that_a_task_cannot_give_are_left_out_or_refused(tmp_path, capsys):
    lines = [json.dumps({"prompt": f"{n} + {n} =", "answer": str(2 * n)}) + "\n" for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    task = load(str(tmp_path / "rows.jsonl"))
    assert unavailable(COMPARED, load("reckon")) == {} and set(unavailable(COMPARED, task)) == {
        "exact_value",
        "oracle_positions",
    }
    argv = ["study", "compare", "--task", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "x")]
    _, methods, _ = plan(STUDY.read(make_parser().parse_args(argv)))
    assert methods == [name for name in COMPARED if name not in ("exact_value", "oracle_positions")]
    assert main([*argv, "--methods", "grpo", "exact_value"]) == 1
    assert "exact_value needs exact_value, which the task" in capsys.readouterr().err.replace("\n", " ")
    assert main([*argv, "--methods", "grpo", "rto_group"]) == 1
    told = capsys.readouterr().err.replace("\n", " ")
    assert "rto_group needs implicit_reward (log π_r − log π_ref of the token, π_r trained on preferences)" in told
    others = {"rto_group": ["implicit_reward"], "prime_offline": ["implicit_reward"], "grpo_process": ["token_reward"]}
    assert unavailable([*(method.name for method in RELATED), "learned_credit"], load("reckon")) == others
    (tmp_path / "rows.jsonl").write_text("".join(lines[:20]))
    assert main(argv) == 1 and "held-out prompts in its validation part, too few" in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_defaults_and_quick_ask_for_what_they_say():
    def read(*argv):
        return plan(STUDY.read(make_parser().parse_args(["study", "compare", *argv])))

    usual, methods, seeds = read()
    assert (
        methods == list(COMPARED)
        and seeds == 5
        and usual.budget.amount == usual.base.steps * usual.base.prompts * usual.base.group
    )
    quick, few, seeds = read("--quick")
    assert (
        set(few) < set(methods) and seeds == 3 and quick.rates == (1.0,) and quick.budget.amount < usual.budget.amount
    )
    seconds, _, _ = read("--budget", "seconds=20", "--set", "learning_rate=1e-3")
    assert (seconds.budget.unit, seconds.budget.amount, seconds.base.steps, seconds.base.learning_rate) == (
        "seconds",
        20,
        500,
        1e-3,
    )
    assert read("--budget", "rollouts=1000")[0].base.steps == 4  # of 256 rollouts


# --- processes --------------------------------------------------------------------------------------------------------


def fail(path):
    path.write_text("began")
    raise ValueError("the [disk] is full")


def end_at_once(path):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_job_that_fails_or_is_killed_stops_no_other(tmp_path):
    heard = {}
    starts = {
        name: lambda function=function, name=name: Forked(function, (tmp_path / name,), tmp_path / f"{name}.log")
        for name, function in (("fails", fail), ("killed", end_at_once), ("well", write))
    }
    failed = run_all(starts, 2, lambda name, code: heard.setdefault(name, []).append(code))
    assert sorted(failed) == ["fails", "killed"] and (heard["fails"][-1], heard["killed"][-1], heard["well"][-1]) == (
        1,
        -signal.SIGKILL,
        0,
    )
    assert (tmp_path / "well").read_text() == "done" and "error: the [disk] is full" in (
        tmp_path / "fails.log"
    ).read_text()


def write(path):
    path.write_text("done")


def test_jobs_end_with_the_process_that_asked_for_them(tmp_path):
    script = tmp_path / "asker.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from tokencredit.studies.processes import Forked
import sleeper
if __name__ == "__main__":
    Forked(sleeper.sleep, (), Path({str(tmp_path / "job.log")!r}))
    signal.pause()
""")
    (tmp_path / "sleeper.py").write_text(
        "import os, time\ndef sleep():\n    print(os.getpid(), flush=True)\n    while True:\n        time.sleep(1)\n"
    )
    asker = subprocess.Popen([sys.executable, str(script)])
    try:
        log = tmp_path / "job.log"
        wait_for(lambda: log.exists() and log.read_text().strip())
        job = int(log.read_text())
        os.kill(job, 0)
    finally:
        asker.kill()
        asker.wait()
    wait_for(lambda: not alive(job))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition):
    while not condition():
        time.sleep(0.1)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = config(rates=(1.0, 2.0))
    result = made_study(folder, {"grpo": 0.7, "dapo": 0.9, "gtpo": 0.5}, study=study)
    result["failed"] = {"runs/gtpo-x1-9": "exit 1: error: <script>alert(1)</script>"}
    figure = result["figures"]["grpo/pass@1"]
    result["figures"] |= {f"{m}/validation/x{f}": figure for m in ("grpo", "dapo") for f in (1, 2)}
    result["rates"] = {
        m: [
            {"factor": float(f), "learning_rate": f * 5e-4, "figure": f"{m}/validation/x{f}", "chosen": f == 2}
            for f in (1, 2)
        ]
        for m in ("grpo", "dapo")
    }
    write_result(folder, result)
    return STUDY.write_page(folder)


def test_the_page_says_what_the_study_found(opened):
    assert opened.locator("main h2").all_text_contents() == [
        "What was compared",
        "Verdicts",
        "Differences from the baseline",
        "Learning curves",
        "At the end of the budget",
        "Learning rates",
        "Time and overhead",
    ]
    rows = opened.locator("#verdicts tbody tr")
    assert rows.locator("th").all_text_contents() == ["grpo", "dapo", "gtpo"]
    assert rows.nth(1).locator(".verdict").all_text_contents() == ["✓ better"] * 3
    assert rows.nth(2).locator(".verdict").all_text_contents() == ["✕ worse"] * 3
    assert "<script>alert(1)</script>" in opened.locator(".notice").text_content()
    marks = opened.locator("#differences-from-the-baseline .mark")
    assert [mark.get_attribute("class") for mark in marks.all()] == ["mark c0", "mark c1"]
    opened.get_by_label("Measure").first.select_option(label="mean pass@1 over the budget")
    assert (
        marks.count() == 2
        and "mean pass@1 over the budget, difference from grpo"
        in opened.locator("#differences-from-the-baseline svg").text_content()
    )
    assert opened.locator("#learning-rates .ring").count() == 2


def test_panels_of_curves_change_with_the_measure(opened):
    section = opened.locator("#learning-curves")
    assert section.locator("figcaption strong").all_text_contents() == ["dapo", "gtpo"]
    assert section.locator("figure").first.locator(".curve .line").count() == 2
    section.get_by_label("Measure").select_option("entropy")
    assert "nats" in section.locator("figcaption").first.text_content()
    section.locator("svg").first.focus()
    opened.keyboard.press("ArrowRight")
    assert section.locator(".readout strong").first.text_content() == "0 sampled rollouts"


def test_as_many_runs_go_side_by_side_as_the_memory_holds(monkeypatch, tmp_path):
    """Unless told: one per core; of a model with weights to speak of as many as the machine holds, at least one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    assert side_by_side(TrainConfig()) == 16
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=50_000)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    whole = TrainConfig(task="stories", model=str(tmp_path))
    takes = {None: 16 * numbers + room.LIBRARIES + room.USUAL, 8: 4 * numbers + room.LIBRARIES + room.USUAL}
    for rank, bytes_ in takes.items():
        own = replace(whole, peft={"r": rank} if rank else {})
        monkeypatch.setattr("tokencredit.limits.memory", lambda bytes_=bytes_: 7 * bytes_ + 1)
        assert 7 * bytes_ // 8 > room.USUAL and side_by_side(own) == 7
    monkeypatch.setattr("tokencredit.limits.memory", lambda: 1 << 33)
    assert side_by_side(whole, 3 << 30) == 2
    assert side_by_side(whole, 1 << 34) == 1


def test_every_run_keeps_to_the_memory_that_is_given(tmp_path, capsys):
    sizes = ("--seeds", "1", "--steps", "1", "--marks", "1", "--rates", "1", "--set", "eval_prompts=8")
    words = ("study", "compare", "--methods", "grpo", "dapo", *sizes)
    assert main([*words, "--memory", "900M", "--out", str(tmp_path / "study")]) == 1
    assert "--memory 0.879G is too little to train" in " ".join(capsys.readouterr().err.split())
