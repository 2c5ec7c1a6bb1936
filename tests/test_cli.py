"""The command line as a newcomer meets it: help that teaches, errors of one line, and text that is printed as it is."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

import tokencredit
from tokencredit.cli import main, make_parser
from tokencredit.methods import METHODS

COMMANDS = ("demo", "train", "evaluate", "methods", "world", "report")


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def run(capsys, *argv):
    """(exit code, standard output, standard error) of a command."""
    code = main(list(map(str, argv)))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def refused(capsys, *argv):
    """The error of a command that is refused: on standard error, from its first word on, in one paragraph."""
    code, _, err = run(capsys, *argv)
    assert code == 1 and err.startswith("error: ")
    return err.removeprefix("error: ").strip()


def test_alone_it_explains_itself(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and all(f"    {name} " in out for name in COMMANDS) and "Start with: tokencredit demo" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples_that_parse(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    examples = out.split("examples:\n")[1].split("\n\n")[0].replace("\\\n", " ")
    lines = [line for line in examples.splitlines() if line.strip()]
    assert lines
    for line in lines:
        name, *argv = shlex.split(line)
        assert name == "tokencredit" and argv[0] == command
        make_parser().parse_args(argv)


def test_help_of_train_lists_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert "fields of --config and --set:" in out and "accumulate" in out and "method_options" in out


def test_help_needs_no_transformers():
    script = """
import sys
from tokencredit.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = ("transformers", "trl", "datasets", "accelerate", "peft", "pyarrow", "scipy", "math_verify")
print("loaded:", *(m for m in heavy if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:", done.stdout


def test_methods_are_a_table_within_80_columns(capsys):
    code, out, _ = run(capsys, "methods")
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert all(re.search(rf"^{name} ", out, re.M) for name in METHODS)
    words = "".join(out.split())
    assert (
        all("".join(f"[{method.fidelity}]".split()) in words for method in METHODS.values())
        and words.count("arXiv:2508.04349v6") == 4
    )


def test_a_method_in_full(capsys):
    code, out, _ = run(capsys, "methods", "gtpo")
    assert code == 0
    for part in (
        "success   cᵢₜ ← ",
        "arXiv:2508.04349",
        "needs: entropy",
        "EntropyReward.alpha = (1.0, 0.1)",
        "Clip.high = 0.28",
    ):
        assert part in out
    assert "dynamic sampling: prompts are drawn again" in run(capsys, "methods", "dapo")[1]


def test_a_method_with_several_sources_of_credit_shows_all_its_parts(capsys):
    code, out, _ = run(capsys, "methods", "prime_offline")
    assert code == 0
    for part in ("Sum(Chain(Outcome(), ", "\nTokenLeaveOneOut()\n", "\nReturns(gamma=1.0)\n", "\nBatchWhiten("):
        assert part in out
    assert "implicit_reward: log π_r − log π_ref of the token" in out and "nobody here measures" in out


def test_unknown_names_are_refused_with_the_nearest(capsys, tmp_path):
    out = tmp_path / "run"
    assert 'no method "gtop". Did you mean "gtpo"? There are: reinforce, ' in refused(capsys, "methods", "gtop")
    assert 'Did you mean "gtpo"?' in refused(capsys, "train", "--method", "gtop", "--out", out)
    assert "unknown key setps; did you mean steps?" in refused(capsys, "train", "--set", "setps=3", "--out", out)
    assert "unknown task 'rekcon'. Did you mean 'reckon'?" in refused(capsys, "evaluate", "--task", "rekcon")
    assert 'Did you mean "dapo"?' in refused(capsys, "demo", "--methods", "grpo", "dappo", "--out", tmp_path / "demo")
    assert not list(tmp_path.iterdir())


def test_missing_things_are_named(capsys, tmp_path):
    gone = tmp_path / "a.yaml"
    assert refused(capsys, "train", "--config", gone, "--out", tmp_path / "x") == f"{gone}: No such file or directory"
    assert refused(capsys, "report", tmp_path / "gone") == f"{tmp_path}/gone: no such directory"
    assert (
        refused(capsys, "report", tmp_path)
        == f"{tmp_path}: no run or study here (no run.json, no result.json of `tokencredit study`)"
    )
    (tmp_path / "a.log").touch()
    assert refused(capsys, "report", tmp_path / "a.log") == f"no directory of a run or study in: {tmp_path}/a.log"
    assert "no such model" in refused(capsys, "evaluate", "--model", tmp_path / "gone")


def test_an_error_keeps_its_notes_and_a_fault_of_ours_says_so(capsys, monkeypatch):
    def fail(error):
        def raising(args):
            raise error

        monkeypatch.setattr("tokencredit.cli._methods", raising)
        return refused(capsys, "methods")

    noted = ValueError("a reward of nan")
    noted.add_note("raised by the reward function mine")
    assert fail(noted) == "a reward of nan\nraised by the reward function mine"
    assert fail(OSError(28, "No space left on device", "runs/[a]")) == "runs/[a]: No space left on device"
    assert fail(KeyError("mask")).startswith(
        "KeyError: mask. This looks like a fault in tokencredit; TOKENCREDIT_TRACEBACK=1 shows"
    )
    monkeypatch.setenv("TOKENCREDIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a reward of nan"):
        monkeypatch.setattr("tokencredit.cli._methods", lambda args: (_ for _ in ()).throw(noted))
        main(["methods"])


def test_interrupted(capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokencredit.cli._methods", interrupt)
    code, out, _ = run(capsys, "methods")
    told = "What a run or study had finished is kept: the same command goes on from there."
    assert code == 130 and told in " ".join(out.split())


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"tokencredit {tokencredit.__version__}\n"


def test_world_shows_itself(capsys):
    code, out, _ = run(capsys, "world", "show", "--num", 2)
    assert code == 0 and out.count("<bos>") == 2 and "(forced)" in out and "(eos)" in out
    code, out, _ = run(capsys, "world")
    assert code == 0 and "tokencredit world build" in out


def test_report_takes_runs_and_studies(capsys, tmp_path):
    """Alone, mixed, from the directory above, and two studies on one page; a study that was cut short and other results
    are refused.
    """
    from test_correlation_report import study
    from tokencredit.runs import Run

    same = {"task": "reckon", "model": "reckon", "config": {}, "seed": 0, "command": "c"}
    Run.create(tmp_path / "all" / "grpo-0", name="grpo-0", method="m", method_name="grpo", **same)
    first, second = (tmp_path / "all" / name for name in ("first", "second"))
    for path in (first, second):
        Run.create_study(path, study="correlation", **same)
    page = tmp_path / "page.html"
    assert "first: this study has no result yet" in refused(capsys, "report", tmp_path / "all", "--out", page)
    for path in (first, second):
        (path / "result.json").write_text(json.dumps({"study": "correlation", **study()}))
    (first / "run.json").unlink()
    code, out, _ = run(capsys, "report", first, "--out", page)
    assert code == 0 and "Report of 1 study: " in out and page.read_text().count('id="proxies-against-effects"') == 1
    code, out, _ = run(capsys, "report", tmp_path / "all" / "grpo-0", second, "--out", page)
    assert (
        code == 0
        and "Report of 1 run and 1 study: " in out
        and '<h2 id="correlations-title">Correlations</h2>' in page.read_text()
    )
    code, out, _ = run(capsys, "report", tmp_path / "all", "--out", page)
    assert code == 0 and "Report of 1 run and 2 studies: " in out and f"{first}: Correlations</h2>" in page.read_text()
    anchors = re.findall(r'<section id="([^"]+)"', page.read_text())
    assert len(anchors) == len(set(anchors))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text('{"figures": {}}')
    with pytest.warns(UserWarning, match=f"left out of the page: {tmp_path}/other: no run or study here"):
        code, out, _ = run(capsys, "report", first, tmp_path / "other", "--out", page)
    assert code == 0 and "Report of 1 study: " in out


def test_evaluate_prints_and_writes_its_figures(capsys, tmp_path):
    """A name with markup in it is a name."""
    target = tmp_path / "[red]eval[/red] :smile: [/]" / "[bold].json"
    code, out, _ = run(capsys, "evaluate", "--prompts", 48, "--samples", 2, "--out", target)
    assert code == 0 and max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    written = json.loads(target.read_text())
    assert written["figures"]["pass@2"]["num"] == 48 and written["seed"] == 0
    assert "[red]eval[/red] :smile: [/]" in out and shlex.split(written["command"])[-1] == str(target)
    value = written["figures"]["pass@1"]["value"]
    assert re.search(rf"pass@1 +{value:.3f} +\[0\.\d+, 0\.\d+\]", out)


def test_evaluate_takes_the_task_of_a_run_and_options(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "<bos> 7 + 3 * 2 =", "answer": "3"}\n')
    config = {
        "task": str(tmp_path / "rows.jsonl"),
        "task_options": {"prompt": "question", "test": str(tmp_path / "rows.jsonl")},
    }
    (tmp_path / "run.json").write_text(json.dumps({"config": config, "model": "reckon"}))
    assert (
        refused(capsys, "evaluate", "--model", tmp_path)
        == f"the run {tmp_path} has no finished checkpoint yet; it starts from reckon"
    )
    options = [
        "--option",
        "prompt=question",
        "--option",
        f"test={tmp_path}/rows.jsonl",
        "--max-new-tokens",
        20,
        "--samples",
        2,
    ]
    code, out, _ = run(capsys, "evaluate", "--task", tmp_path / "rows.jsonl", *options)
    assert code == 0 and "1 prompts" in out and "prompt=question" in out, "the options of the task are told"
    (tmp_path / "rows.jsonl").write_text('{"question": "<bos> 7 =", "answer": "3"}\n\n{"question": "<bos> 8 ="}\n')
    assert "line 3: no answer" in refused(capsys, "evaluate", "--task", tmp_path / "rows.jsonl", *options)


def test_ended_from_outside_a_command_cleans_up():
    """SIGTERM runs the same endings as an exception does: nothing that was started is left behind."""
    script = (
        "import signal, tokencredit.cli as cli\ncli._methods = lambda args: (print('ready', flush=True),"
        " signal.pause())\n"
    )
    script += (
        "import sys; sys.argv = ['tokencredit', 'methods']\ntry:\n    cli.main()\nfinally:\n    print('cleaned',"
        " flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.communicate()[0] == "cleaned\n" and child.returncode == 143
