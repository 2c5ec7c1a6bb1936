"""`tokencredit score`: files in, Parquet out, and what it says about bad input."""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from tokencredit import logs
from tokencredit.distribute import together
from tokencredit.durable import read_rows
from tokencredit.lm.policy import PolicyConfig
from tokencredit.scores import command as score_command
from tokencredit.scores.portions import cut


def run(*words):
    parser = argparse.ArgumentParser()
    score_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["score", *map(str, words)])
    return args.run(args)


def test_sampled_now_then_read_back_gives_the_same_scores(tmp_path):
    first, again = tmp_path / "first.parquet", tmp_path / "again.parquet"
    scores = ("logprob", "entropy", "gradient_norm")
    run("--out", first, "--prompts", 3, "--samples", 2, "--scores", *scores)
    table = pyarrow.parquet.read_table(first)
    rows = table.to_pylist()
    assert len(rows) == 6 and json.loads(table.schema.metadata[b"tokencredit"])["policy"]["model"] == "reckon"
    for row in rows:
        assert len(row["completion_ids"]) == len(row["tokens"]) == len(row["logprob"]) == len(row["gradient_norm"])
        assert all(x <= 0 for x in row["logprob"]) and all(x >= 0 for x in row["gradient_norm"])
    data = tmp_path / "given.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": r["prompt_ids"], "completion": r["completion_ids"]}) + "\n" for r in rows)
    )
    run("--data", data, "--out", again, "--scores", *scores, "--batch", 2)
    for a, b in zip(rows, pyarrow.parquet.read_table(again).to_pylist()):
        assert a["completion_ids"] == b["completion_ids"]
        for name in scores:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5)


def test_text_is_tokenised(tmp_path):
    data, out = tmp_path / "text.parquet", tmp_path / "out.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"q": ["3 + 4 + 5 ="], "a": ["7 + 5"]}), data)
    run("--data", data, "--out", out, "--column", "prompt=q", "--column", "completion=a")
    (row,) = pyarrow.parquet.read_table(out).to_pylist()
    assert len(row["entropy"]) == len(row["completion_ids"]) > 0


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "1"}\n', "there is no column completion; there are: prompt"),
        ("{\n", "line 1: not JSON"),
        ("[1]\n", "line 1: a row is a JSON object with columns, not list"),
        ("", "bad.jsonl has no rows"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    data = tmp_path / "bad.jsonl"
    data.write_text(text)
    with pytest.raises(ValueError, match=message):
        run("--data", data, "--out", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        run("--data", tmp_path / "none.jsonl", "--out", tmp_path / "out.parquet")


def test_a_log_keeps_its_rewards_groups_steps_and_numbers(tmp_path):
    log, out = Path(__file__).parent / "data" / "logs" / "prime_tokens", tmp_path / "out.parquet"
    run("--data", log, "--out", out, "--scores", "logprob")
    rows, logged = pyarrow.parquet.read_table(out).to_pylist(), list(logs.read(log))
    assert [row["reward"] for row in rows] == [each.reward for each in logged]
    assert [row["group"] for row in rows] == [0, 0, 1, 1] and {row["step"] for row in rows} == {3}
    for row, each in zip(rows, logged):
        assert row["logged_sampler_logprob"] == each.tokens["sampler_logprob"] and row["place"] == each.place
        assert len(row["logprob"]) == len(row["mask"]) == len(row["logged_entropy"])
    again = logs.encode(logs.read(out), PolicyConfig().open().tokenizer)
    assert [list(ids) for ids in again.completion_ids] == [row["completion_ids"] for row in rows]


def test_messages_are_scored_as_what_they_say_and_tools_are_masked(tmp_path):
    policy = PolicyConfig().open()
    folder, data, out = tmp_path / "chat", tmp_path / "chat.jsonl", tmp_path / "out.parquet"
    policy.model.save_pretrained(folder)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    policy.tokenizer.save_pretrained(folder)
    turns = [("user", "3 + 4 ="), ("assistant", "3 + 4"), ("tool", "7"), ("assistant", "@1 7")]
    data.write_text(json.dumps({"messages": [{"role": role, "content": said} for role, said in turns]}) + "\n")
    run("--data", data, "--out", out, "--model", folder, "--max-new-tokens", 20)
    (row,) = pyarrow.parquet.read_table(out).to_pylist()
    own = [token.strip() for token, written in zip(row["tokens"], row["mask"]) if written]
    assert own == ["3", "+", "4", "<eos>", "@1", "7", "<eos>"] and len(row["tokens"]) == len(own) + 2


KILLED = """
import os, runpy, signal, sys
from tokencredit.distribute import together
from tokencredit.scores import command
work, name, place, own = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), []
together.WORK, doing = work, getattr(command, name)
def done(*given):
    own.append(1)
    if len(own) == place:
        os.kill(os.getpid(), signal.SIGKILL)
    return doing(*given)
setattr(command, name, done)
run = runpy.run_path(sys.argv[4])["run"]
run(*sys.argv[5:])
"""


def killed(work, name, place, *words):
    """The command, which ends itself before its piece `place` of the work called `name`."""
    script = [sys.executable, "-c", KILLED, work, name, place, __file__, *words]
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_twice_it_goes_on_and_ends_with_the_same_file(tmp_path, monkeypatch):
    """While it samples and while it scores; what is done is not done again, and nothing is left beside the file."""
    work = 300 * sum(p.numel() for p in PolicyConfig().open().model.parameters())
    monkeypatch.setattr(together, "WORK", work)
    words = ("--prompts", 12, "--samples", 2, "--scores", "entropy", "uniform", "gradient_norm", "--batch", 5)
    words += ("--max-new-tokens", 40, "--method", "sketch")
    run("--out", tmp_path / "whole.parquet", *words)
    out = tmp_path / "killed.parquet"
    killed(work, "_drawn", 3, "--out", out, *words)
    killed(work, "_scored", 4, "--out", out, *words)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"(?s)killed\.parquet\.parts.*samples: 2 in the directory, 3 asked for"):
        run("--out", out, *words, "--samples", 3)
    drawn, scored = [], []
    for name, seen in (("_drawn", drawn), ("_scored", scored)):
        doing = getattr(score_command, name)
        monkeypatch.setattr(
            score_command, name, lambda *given, doing=doing, seen=seen: seen.append(given) or doing(*given)
        )
    stored = (tmp_path / "killed.parquet.parts" / "stages").glob("scores_*.npz")
    stops = [int(path.stem.split("_")[-1]) for path in stored]
    run("--out", out, *words)
    assert len(stops) == 3 and not drawn and scored[0][-2] == max(stops) < 24
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.parquet", "whole.parquet"]


def test_a_command_that_has_done_nothing_leaves_nothing(tmp_path, monkeypatch):
    def broken(*given):
        raise ZeroDivisionError

    monkeypatch.setattr(score_command, "_drawn", broken)
    with pytest.raises(ZeroDivisionError):
        run("--out", tmp_path / "a.parquet", "--prompts", 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", [False, True])
def test_siblings_are_told_from_others_wherever_they_stand(tmp_path, named):
    """Rows of two prompts in turn, scored in pieces of any size; a log's own groups count, in its steps."""
    rows = [
        {"prompt": f"{2 + k % 2} + 1 =", "completion": text, "group": k % 2, "step": k // 9}
        for k, text in enumerate(f"{a} + {a % 3}" for a in range(1, 10) for _ in "ab")
    ]
    kept = rows if named else [{key: row[key] for key in ("prompt", "completion")} for row in rows]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    found = []
    for size in (1, 4, 32):
        out = tmp_path / f"{size}.parquet"
        run("--out", out, "--data", tmp_path / "log.jsonl", "--scores", "js_divergence", "--batch", size)
        found.append([row["js_divergence"] for row in read_rows(out)])
    assert found[0] == found[1] == found[2] and sum(map(max, found[0])) > 0
    if named:
        out = tmp_path / "half.parquet"
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
        run("--out", out, "--data", tmp_path / "log.jsonl", "--scores", "js_divergence")
        assert [row["js_divergence"] for row in read_rows(out)] == found[0][:9]


def test_rows_are_cut_by_number_by_tokens_and_where_siblings_end():
    rows = [([p], [0] * n) for p, n in ((1, 3), (1, 3), (2, 3), (2, 9), (3, 1), (3, 1))]
    group = [1, 1, 2, 2, 3, 3]
    bounds = lambda *given: [(own.start, own.stop) for own in cut(rows, *given)]  # noqa: E731
    assert bounds(4, 100) == [(0, 4), (4, 6)]
    assert bounds(4, 8) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert bounds(1, 100, group) == [(0, 2), (2, 4), (4, 6)]
    assert bounds(5, 100, group) == [(0, 4), (4, 6)]
    assert cut([], 5, 100) == []
