"""The demo, small: its runs, its figures within 80 columns, its report, and what is left when a run fails or somebody
interrupts.
"""

import io
import json
import os
import re
import shlex
import signal

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tokencredit.cli import main, make_parser
from tokencredit.console import PlainConsole
from tokencredit.runs import Run
from tokencredit.studies import demo as study
from tokencredit.studies import jobs, processes
from tokencredit.studies.claims import learned
from tokencredit.studies.correlation import question
from tokencredit.train_config import read_config

FEW = {"prompts": 4, "rollouts": 8, "bootstraps": 20, "condition_prompts": 4, "temperatures": (), "exact": "no"}


@pytest.fixture
def small(monkeypatch):
    """Runs and a correlation study of seconds."""
    sizes = ("prompts=4", "group=4", "eval_prompts=8", "eval_samples=2")
    monkeypatch.setattr(study, "SETTINGS", (*study.SETTINGS, *sizes))
    monkeypatch.setattr(question, "SMALL", FEW)
    monkeypatch.setenv("COLUMNS", "80")


def test_the_demo_and_a_method_that_fails(small, tmp_path, capsys):
    out = tmp_path / "the [bold] demo"
    out.mkdir()
    (out / "dapo-0").write_text("in the way")
    argv = ["demo", "--out", str(out), "--seeds", "1", "--steps", "2", "--workers", "2", "--methods"]
    assert main([*argv, "grpo", "dapo", "gtpo"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"dapo-0 failed: exit 1: error: .*\(log: .*/the \[bold\] demo/dapo-0\.log\)", text)
    assert "1 runs failed and are not in it: dapo-0" in text
    result = json.loads((out / "result.json").read_text())
    assert [m["name"] for m in result["methods"]] == ["grpo", "gtpo"] and result["failed"] == ["dapo-0"]
    assert result["command"].startswith("tokencredit demo --out") and set(result["curves"]["pass@1"]) == {
        "grpo",
        "gtpo",
    }
    assert json.loads((out / "correlation" / "result.json").read_text())["command"] == result["command"]
    claims = [f["claim"] for f in result["findings"]]
    assert all("than grpo" in claim for claim in claims[:4])
    assert claims[4:] == [
        "grpo learns: pass@1 rises",
        "gtpo learns: pass@1 rises",
        "entropy falls under grpo",
        "entropy falls under gtpo",
    ]
    headings = re.findall(r"<h2[^>]*>([^<]*)", (out / "report.html").read_text())
    assert headings[:2] == ["One wrong completion, three kinds of credit", "Tokens"]
    assert [Run.open(out / name).status for name in ("grpo-0", "gtpo-0")] == ["finished"] * 2
    before = (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns
    # Again, with one method: its run is not repeated, and the exit code says that all went well.
    assert main([*argv, "grpo", "grpo"]) == 0
    assert (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "pass@1" in capsys.readouterr().out
    # The run records what anybody would type.
    job, run = study.job_of("grpo", 0, 2), Run.open(out / "grpo-0")
    args = make_parser().parse_args(shlex.split(run.info["command"])[1:])
    assert args.out == out / "grpo-0" and job.config == read_config(
        None, args.settings, method=args.method, seed=args.seed, steps=args.steps
    )
    # A finished run whose last checkpoint is damaged is made whole by the next demo.
    assert jobs.finished(out, job)
    (run.path / "checkpoints" / "checkpoint-4" / "model.safetensors").write_bytes(b"")
    assert not jobs.finished(out, job)


def test_figures_fit_80_columns():
    figure = {"value": 0.4567, "low": -1.2345, "high": 2.3456}
    long = {"value": 14.2, "low": -101.23, "high": 139.0}
    names = ["grpo", "dapo", "reinforce_pp_baseline", "gtpo", "entropy_advantage"]
    summary = {"pass@1": figure, "pass@8": figure, "greedy": figure, "entropy": figure, "length": long}
    page = io.StringIO()
    found = [{"verdict": "shows here", "claim": "a [claim]", "detail": "a [detail]"}]
    figures = {
        "methods": [{"name": n, "summary": summary} for n in names],
        "curves": summary,
        "findings": found,
        "interval": "95 % over seeds",
    }
    study.show(figures, PlainConsole(file=page, width=80))
    text = page.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert text.count("0.457 [−1.234, 2.346]") == 20 and text.count("14.2 [−101, 139]") == 5
    assert all(name in text for name in ("grpo", "reinforce_pp_baseline", "a [claim]", "a [detail]"))


def line(first, last, half, seeds):
    """A curve of two steps with intervals of half-width `half`; seeds {name: (first, last)}."""
    ends = {"step": [0, 40], "value": [first, last]}
    drawn = {name: {"step": [0, 40], "value": list(values)} for name, values in seeds.items()}
    return ends | {"low": [first - half, last - half], "high": [first + half, last + half], "seeds": drawn}


def test_what_training_did_is_found_where_it_is_resolved():
    """With several seeds by paired differences, with one where the intervals over prompts do not meet; nothing is found
    of a method that was evaluated once.
    """
    seeds = {"0": (0.34, 0.92), "1": (0.36, 0.95), "2": (0.35, 0.93)}
    curves = {
        "pass@1": {"grpo": line(0.35, 0.93, 0.02, seeds), "gtpo": line(0.35, 0.40, 0.03, {"0": (0.35, 0.40)})},
        "entropy": {"grpo": line(0.3, 0.35, 0.02, {"0": (0.3, 0.35)}), "gtpo": line(0.3, 0.2, 0.02, {"0": (0.3, 0.2)})},
    }
    curves["pass@1"]["dapo"] = {"step": [0], "value": [0.3], "low": [0.2], "high": [0.4], "seeds": {}}
    found = {f["claim"]: f for f in learned(curves)}
    assert {claim: f["verdict"] for claim, f in found.items()} == {
        "grpo learns: pass@1 rises": "shows here",
        "gtpo learns: pass@1 rises": "not resolved",
        "entropy falls under grpo": "does not show here",
        "entropy falls under gtpo": "shows here",
    }
    assert found["grpo learns: pass@1 rises"]["difference"]["value"] == pytest.approx((0.58 + 0.59 + 0.58) / 3)
    assert found["gtpo learns: pass@1 rises"]["p"] == 1, "one seed has no p of its own"


def hang(job, path):
    print("up", flush=True)
    signal.pause()


def hang_on(job, path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang(job, path)


class Impatient(processes.Forked):
    """Whoever waits for it interrupts a second time."""

    def wait(self, timeout=None):
        if timeout is not None:
            raise KeyboardInterrupt
        return super().wait()


@pytest.mark.parametrize(
    "perform, kind, grace, ended_by",
    [
        (hang, processes.Forked, 3600, signal.SIGTERM),
        (hang_on, processes.Forked, 0.5, signal.SIGKILL),
        (hang_on, Impatient, 3600, signal.SIGKILL),
    ],
    ids=["asked", "stubborn", "interrupted again"],
)
def test_interrupted_it_leaves_no_process(tmp_path, monkeypatch, perform, kind, grace, ended_by):
    started = []

    class Interrupt(jobs.Tell):
        def running(self, name, share, figures):
            if [log.read_text() for log in tmp_path.glob("*.log")] == ["up\n"] * 2:
                raise KeyboardInterrupt

    def start(out, job, log):
        started.append(kind(perform, (job, out / job.name), log))
        return started[-1]

    monkeypatch.setattr(processes, "GRACE", grace)
    three = [study.job_of(method, 0, 2) for method in ("grpo", "gtpo", "dapo")]
    with pytest.raises(KeyboardInterrupt):
        jobs.run_jobs(tmp_path, three, 2, "runs", Interrupt(), start)
    assert [process.poll() for process in started] == [-ended_by] * 2


def test_when_every_run_fails_it_says_so(tmp_path, capsys):
    (tmp_path / "grpo-0").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path), "--methods", "grpo", "--seeds", "1", "--steps", "2"]) == 1
    assert f"no run succeeded; the first log is {tmp_path}/grpo-0.log" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_run_is_looked_at_after_every_third_of_it():
    config = study.job_of("gtpo", 1, 30).config
    assert (config.method, config.seed, config.steps, config.threads) == ("gtpo", 1, 30, 1)
    assert (config.eval_every, config.record_every, config.save_every) == (10, 10, 10)
    assert study.job_of("gtpo", 1, 1).config.eval_every == 1


def test_long_runs_begin_first():
    costs = {name: study.job_of(name, 0, 3).cost for name in ("grpo", "gtpo", "dapo", "ptw_fisher", "exact_value")}
    assert costs == {"grpo": 0, "gtpo": 0, "dapo": 1, "ptw_fisher": 1, "exact_value": 2}


@pytest.mark.parametrize("option", ["--seeds", "--steps", "--workers"])
def test_numbers_that_mean_nothing_are_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "x"), option, "0"])
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    given = {"methods": ["grpo"], "seeds": 1, "steps": 1, "workers": 1} | {option.removeprefix("--"): 0}
    with pytest.raises(ValueError, match=f"{option.removeprefix('--')} must be at least 1"):
        study.demo(tmp_path / "x", console=PlainConsole(), **given)
    assert not (tmp_path / "x").exists()
