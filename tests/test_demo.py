"""The demo, small: its runs, its figures within 80 columns, its report, and what is left when a run fails or somebody
interrupts.
"""

import io
import json
import os
import re
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tokencredit.cli import main
from tokencredit.console import PlainConsole
from tokencredit.runs import Run
from tokencredit.studies import demo as study
from tokencredit.studies import processes
from tokencredit.studies.claims import learned

SMALL = ["prompts=4", "group=4", "eval_prompts=8", "eval_samples=2"]
FULL = study.command_of


@pytest.fixture
def small(monkeypatch):
    """Runs of seconds, of which `failing` names those that fail at once."""
    failing = set()

    def command_of(out, name, method, seed, steps, settings=()):
        if name in failing:
            return [sys.executable, "-c", "print('noise'); print('error: the [disk] is full'); raise SystemExit(3)"]
        return FULL(out, name, method, seed, steps, [*settings, *SMALL])

    monkeypatch.setattr(study, "command_of", command_of)
    monkeypatch.setenv("COLUMNS", "80")
    return failing


def test_the_demo_and_a_method_that_fails(small, tmp_path, capsys):
    small.add("dapo-0")
    out = tmp_path / "demo"
    argv = [
        "demo",
        "--out",
        str(out),
        "--methods",
        "grpo",
        "dapo",
        "gtpo",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--workers",
        "2",
    ]
    assert main(argv) == 1
    text = capsys.readouterr().out
    assert (
        "dapo-0 failed (exit 3): error: the [disk] is full" in text
        and "1 runs failed and are not in it: dapo-0" in text
    )
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
    assert main([*argv[:4], "grpo", "grpo", *argv[7:]]) == 0
    assert (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "pass@1" in capsys.readouterr().out


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


@pytest.mark.parametrize("stubborn", [False, True])
def test_interrupted_it_leaves_no_process(tmp_path, monkeypatch, stubborn):
    started = []
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
    script = f"import signal; {ignore} print('up', flush=True); signal.pause()"
    monkeypatch.setattr(study, "command_of", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr(processes, "GRACE", 0.5 if stubborn else 1e9)
    real_start, real_sleep = study.start, processes.time.sleep

    def start(*arguments):
        started.append(real_start(*arguments))
        return started[-1]

    def nap(seconds):
        if len([log for log in tmp_path.glob("*.log") if "up" in log.read_text()]) == 2:
            monkeypatch.setattr(processes.time, "sleep", real_sleep)
            raise KeyboardInterrupt
        real_sleep(0.05)

    monkeypatch.setattr(study, "start", start)
    monkeypatch.setattr(processes.time, "sleep", nap)
    jobs = [("a-0", "grpo", 0), ("b-0", "gtpo", 0), ("c-0", "dapo", 0)]
    with pytest.raises(KeyboardInterrupt):
        study.run_all(tmp_path, jobs, 2, 2, PlainConsole(file=io.StringIO()))
    assert [p.returncode for p in started] == [-signal.SIGKILL if stubborn else -signal.SIGTERM] * 2


def test_when_every_run_fails_it_says_so(small, tmp_path, capsys):
    small.add("grpo-0")
    assert main(["demo", "--out", str(tmp_path), "--methods", "grpo", "--seeds", "1", "--steps", "2"]) == 1
    assert f"no run succeeded; the first log is {tmp_path}/grpo-0.log" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_commands_are_those_that_anybody_would_type(tmp_path):
    command = FULL(tmp_path, "gtpo-1", "gtpo", 1, 30)
    assert command[1:3] == ["-m", "tokencredit"] and "--quiet" in command
    from tokencredit.cli import make_parser

    args = make_parser().parse_args(command[3:])
    assert (args.method, args.seed, args.out) == ("gtpo", 1, tmp_path / "gtpo-1") and "save_every=10" in args.settings


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
