"""Run directories: what was written is read back, whatever killed the writer, and nothing is recorded twice."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from tokencredit import durable
from tokencredit.runs import Run, RunError, read_json, write_json

IDENTITY = {
    "name": "grpo-0",
    "method": "Method(Chain(GroupCenter()))",
    "method_name": "grpo",
    "task": "reckon",
    "model": "tiny",
    "config": {"learning_rate": 1e-4, "steps": 20, "betas": (0.9, 0.99)},
    "seed": 0,
    "command": "tokencredit train grpo",
}


def create(path, **changes):
    return Run.create(path, **{**IDENTITY, **changes})


def row(group=0, tokens=("1", "2"), **changes):
    scores = {"logprob": [-0.5] * len(tokens), "entropy": [0.25] * len(tokens), "credit": [1.0] * len(tokens)}
    return {
        "group": group,
        "prompt": "1+1=",
        "completion": "".join(tokens),
        "reward": 1.0,
        "success": True,
        "reason": "exact",
        "token_ids": list(range(len(tokens))),
        "tokens": list(tokens),
        **scores,
        **changes,
    }


def test_what_is_recorded_is_read_back(tmp_path):
    run = create(tmp_path / "run")
    run.log_metrics({"step": 1, "seconds": 0.5, "reward": 0.25})
    run.log_evaluation({"step": 0, "split": "test", "pass@1": {"value": 0.5, "low": 0.4, "high": 0.6}})
    run.log_evaluation({"step": 0, "split": "train", "pass@1": {"value": 0.7, "low": 0.6, "high": 0.8}})
    run.write_tokens(
        10, [row(), row(1, ("a", "b", "c"), role=["x", "y", "z"], gradient_norm=[1.5, 2.5, 3.5], success=None)]
    )
    run.finish()
    again = Run.open(tmp_path / "run")
    assert (again.status, again.info["config"]) == (
        "finished",
        {"learning_rate": 1e-4, "steps": 20, "betas": [0.9, 0.99]},
    )
    assert again.info["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert again.metrics() == [{"step": 1, "seconds": 0.5, "reward": 0.25}]
    assert [record["split"] for record in again.evaluations()] == ["test", "train"]
    first, second = again.tokens(10)
    assert (first["step"], first["tokens"], first["entropy"]) == (10, ["1", "2"], [0.25, 0.25])
    assert first["role"] is None and first["gradient_norm"] is None
    assert (second["role"], second["gradient_norm"], second["success"]) == (["x", "y", "z"], [1.5, 2.5, 3.5], None)
    assert again.tokens() == [first, second]
    with pytest.raises(RunError, match=r"no tokens of step 3; it has \[10\]"):
        again.tokens(3)


def test_token_columns_have_the_documented_types(tmp_path):
    from pyarrow import parquet

    path = create(tmp_path / "run").write_tokens(1, [row(other=[1, 2])])
    types = {field.name: str(field.type) for field in parquet.read_schema(path)}
    assert types["token_ids"] == "list<element: int32>"
    assert types["role"] == types["tokens"] == "list<element: string>"
    assert {types[name] for name in ("logprob", "entropy", "credit", "other")} == {"list<element: float>"}
    assert (types["step"], types["group"], types["reward"], types["success"]) == ("int64", "int64", "double", "bool")


def test_rows_that_do_not_fit_are_refused_by_name(tmp_path):
    run = create(tmp_path / "run")
    with pytest.raises(RunError, match="Completion 1 of step 3: entropy has 1 values for 2 tokens"):
        run.write_tokens(3, [row(), row(entropy=[0.1])])
    with pytest.raises(RunError, match="lacks prompt, tokens; it has completion"):
        run.write_tokens(3, [{**row(), "prompt": None, "tokens": None}])
    assert run.token_steps() == []


def test_text_that_utf8_cannot_hold_is_recorded(tmp_path):
    run = create(tmp_path / "run", command="say \ud800")
    run.write_tokens(1, [row(tokens=("\ud83d", "\U0001f600"))])
    assert run.tokens(1)[0]["tokens"] == ["\ufffd", "\U0001f600"]
    assert Run.open(run.path).info["command"] == "say \ud800"


def test_numbers_that_are_not_finite_become_null(tmp_path):
    run = create(tmp_path / "run")
    run.log_metrics(
        {"step": 1, "loss": math.nan, "grad_norm": math.inf, "nested": {"low": -math.inf, "list": [1.0, math.nan]}}
    )
    text = (run.path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert run.metrics() == [{"step": 1, "loss": None, "grad_norm": None, "nested": {"low": None, "list": [1.0, None]}}]


def test_tensors_and_arrays_are_numbers_and_anything_else_is_named(tmp_path):
    import numpy as np

    run = create(tmp_path / "run", config={"path": tmp_path, "targets": {"q", "k"}})
    run.log_metrics({"step": 1, "reward": np.float32(0.5), "count": np.int64(3), "histogram": np.arange(3)})
    assert run.metrics() == [{"step": 1, "reward": 0.5, "count": 3, "histogram": [0, 1, 2]}]
    assert run.info["config"] == {"path": str(tmp_path), "targets": ["k", "q"]}
    with pytest.raises(TypeError, match="object is not a number"):
        run.log_metrics({"step": 2, "reward": object()})
    assert len(run.metrics()) == 1


def test_a_different_run_is_refused_and_says_what_differs(tmp_path):
    create(tmp_path / "run")
    with pytest.raises(RunError) as error:
        create(tmp_path / "run", seed=1, config={"learning_rate": 2e-4, "steps": 20, "betas": [0.9, 0.99], "new": 1})
    message = str(error.value)
    assert "config.learning_rate: 0.0001 in the directory, 0.0002 asked for" in message
    assert "config.new: '(absent)' in the directory, 1 asked for" in message
    assert "seed: 0 in the directory, 1 asked for" in message
    assert "steps" not in message and "Choose another directory" in message


def test_records_without_a_run_and_foreign_formats_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunError, match="holds records but no run"):
        create(tmp_path)
    with pytest.raises(RunError, match="holds no run"):
        Run.open(tmp_path / "nowhere")
    write_json(tmp_path / "run.json", {"format": 99})
    with pytest.raises(RunError, match="format 99"):
        Run.open(tmp_path)


def test_the_same_run_is_resumed_and_its_leftovers_removed(tmp_path):
    run = create(tmp_path / "run")
    run.finish("failed")
    (run.path / ".run.json.1.tmp").write_text("half")
    again = create(tmp_path / "run", command="another command")
    assert again.status == "running" and again.info["command"] == IDENTITY["command"]
    assert again.info["resumed"][0]["command"] == "another command"
    assert not list(run.path.glob(".*.tmp"))
    again.finish()
    assert create(tmp_path / "run").status == "finished", "asking for a finished run does not unfinish it"


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "rew', b'{"step": 3}', b"\x00\x00\x00", '{"reason": "\u00e9'.encode()[:-1]]
)
def test_a_torn_last_line_is_not_read_and_the_next_append_repairs_it(tmp_path, tail):
    run = create(tmp_path / "run")
    run.log_metrics({"step": 1})
    run.log_metrics({"step": 2})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert [record["step"] for record in run.metrics()] == [1, 2]
    again = create(tmp_path / "run")
    again.log_metrics({"step": 3, "reward": 0.5})
    assert (run.path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3, "reward": 0.5}\n'


def test_a_torn_line_longer_than_one_block_is_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": "' + b"x" * 200_000)
    durable.append_line(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_damage_inside_a_file_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON"):
        durable.read_lines(tmp_path / "metrics.jsonl")
    (tmp_path / "result.json").write_text('{"half": ')
    with pytest.raises(ValueError, match=r"result.json is not JSON"):
        read_json(tmp_path / "result.json")


def test_going_on_from_a_checkpoint_drops_later_records_and_none_twice(tmp_path):
    run = create(tmp_path / "run")
    for step in range(1, 8):
        run.log_metrics({"step": step})
    for step in (0, 5, 6):
        run.log_evaluation({"step": step, "split": "test"})
        run.write_tokens(step, [row()])
    with pytest.raises(RunError, match="already holds step 5"):
        create(tmp_path / "run").log_metrics({"step": 5})
    again = create(tmp_path / "run")
    again.truncate_after(5)
    assert [record["step"] for record in again.metrics()] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in again.evaluations()] == [0, 5]
    assert again.token_steps() == [0, 5]
    again.log_metrics({"step": 6})
    assert [record["step"] for record in Run.open(run.path).metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_truncated_finished_run_is_running_again(tmp_path):
    run = create(tmp_path / "run")
    run.log_metrics({"step": 1})
    run.finish()
    run.truncate_after(1)
    assert run.status == "finished"
    run.truncate_after(0)
    assert Run.open(run.path).status == "running"


# The modules under test alone: the package's own __init__ imports torch, which takes seconds and is not what is tested.
ALONE = f"""
import sys, types
sys.modules["tokencredit"] = types.ModuleType("tokencredit")
sys.modules["tokencredit"].__path__ = [{os.path.dirname(durable.__file__)!r}]
"""

WRITER = (
    ALONE
    + """
import itertools
from tokencredit.runs import Run
about = dict(name="n", method="m", method_name="m", task="t", model="m", config={}, seed=0, command="c")
run = Run.create(sys.argv[1], **about)
start = len(run.metrics())
run.truncate_after(start)
for step in itertools.count(start + 1):
    run.log_metrics({"step": step, "filler": "x" * 3000, "end": step})
    row = {"group": 0, "prompt": "p", "completion": "ab", "reward": 1.0, "success": True}
    row |= {"token_ids": [1, 2], "tokens": ["a", "b"]}
    run.write_tokens(step, [{**row, "credit": [float(step)] * 2}] * 50)
    run.finish("failed")
    print(step, flush=True)
"""
)


def test_a_run_killed_at_any_moment_is_readable_and_resumable(tmp_path):
    path, last = tmp_path / "run", 0
    for attempt in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        said = int(writer.stdout.readline())
        time.sleep(0.003 + 0.017 * attempt)
        writer.send_signal(signal.SIGKILL)
        said = max([said, *(int(line) for line in writer.communicate()[0].splitlines()[:-1])])
        run = Run.open(path)
        steps = [record["step"] for record in run.metrics()]
        assert steps == list(range(1, len(steps) + 1)), "every step once, in order"
        assert all(record["end"] == record["step"] for record in run.metrics()), "every line whole"
        assert len(steps) >= said > last, "what was said to be written is there"
        for step in run.token_steps():
            assert [each["credit"] for each in run.tokens(step)] == [[step, step]] * 50
        last = said


def test_a_full_disk_names_the_file_and_leaves_the_previous_version(tmp_path, monkeypatch):
    run = create(tmp_path / "run")
    run.write_tokens(1, [row()])
    run.log_metrics({"step": 1})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match=r"No space left.*run\.json"):
                run.finish()
            with pytest.raises(OSError, match=r"No space left.*step_000001\.parquet"):
                run.write_tokens(1, [row(), row()])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
            run.log_metrics({"step": 2})
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    run.log_metrics({"step": 2})
    run.finish()
    assert Run.open(run.path).status == "finished"


def test_a_line_that_does_not_fit_is_cut_off_again(tmp_path):
    """A real short write: the process may not grow a file past 4096 bytes."""
    resource = pytest.importorskip("resource", reason="no resource limits on this system")
    script = (
        ALONE
        + f"""
import resource
from tokencredit.durable import append_line
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.getrlimit(resource.RLIMIT_FSIZE)[1]}))
path = Path({str(tmp_path / "metrics.jsonl")!r})
try:
    for step in range(100):
        append_line(path, {{"step": step, "filler": "x" * 300}})
except OSError as error:
    print(error.filename, step)
"""
    )
    filename, step = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert filename == str(tmp_path / "metrics.jsonl")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(int(step))) and int(step) > 5


def test_lines_of_several_processes_are_all_there(tmp_path):
    pytest.importorskip("fcntl", reason="no POSIX locks on this system")
    script = (
        ALONE
        + f"""
from tokencredit.durable import append_line
from pathlib import Path
for step in range(60):
    append_line(Path({str(tmp_path / "lines.jsonl")!r}), {{"from": sys.argv[1], "step": step, "filler": "x" * 3000}})
"""
    )
    started = [subprocess.Popen([sys.executable, "-c", script, str(k)]) for k in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    found = sorted((record["from"], record["step"]) for record in durable.read_lines(tmp_path / "lines.jsonl"))
    assert found == [(str(k), step) for k in range(3) for step in range(60)]


def test_what_a_kill_left_half_written_is_gone_when_the_run_goes_on(tmp_path):
    run = Run.create(tmp_path, **IDENTITY)
    left = [tmp_path / name for name in (".a.json.7.tmp", "tokens/.b.parquet.7.tmp", "stages/.c.npz.7.tmp")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    assert Run.create(tmp_path, **IDENTITY).path == run.path and not any(path.exists() for path in left)


def test_reading_and_recording_need_no_torch(tmp_path):
    script = (
        ALONE
        + f"""
from tokencredit.runs import Run
run = Run.create({str(tmp_path / "run")!r}, **{IDENTITY!r})
run.log_metrics({{"step": 1}})
assert run.metrics() == [{{"step": 1}}]
print([name for name in ("torch", "numpy", "pyarrow", "transformers") if name in sys.modules])
"""
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
