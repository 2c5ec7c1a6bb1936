"""`tokencredit score`: files in, Parquet out, and what it says about bad input."""

import argparse
import json

import pyarrow.parquet
import pytest

from tokencredit.scores import command as score_command


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
    run("--data", data, "--out", out, "--prompt-column", "q", "--completion-column", "a")
    (row,) = pyarrow.parquet.read_table(out).to_pylist()
    assert len(row["entropy"]) == len(row["completion_ids"]) > 0


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "1"}\n', "row 0: no column 'completion'; it has: prompt"),
        ("{\n", "line 1: not JSON"),
        ("[1]\n", "line 1: a row is a JSON object with columns, not list"),
        ("", "no completions to score"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    data = tmp_path / "bad.jsonl"
    data.write_text(text)
    with pytest.raises(ValueError, match=message):
        run("--data", data, "--out", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(ValueError, match="no such file"):
        run("--data", tmp_path / "none.jsonl", "--out", tmp_path / "out.parquet")
