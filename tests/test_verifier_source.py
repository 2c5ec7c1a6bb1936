"""The identity of a verifier is its source: what changes it, what does not, and what cannot be told."""

import functools
import json
import warnings

import pytest
import torch

from tokencredit.tasks import load, source
from tokencredit.tasks.source import own_source, rows_source, task_source, verifier_source

DATA = '{"prompt": "2 + 3", "answer": "5"}\n{"prompt": "2 + 4", "answer": "6"}\n'


def verifier(folder, text):
    """A task with this verifier in a file."""
    (folder / "train.jsonl").write_text(DATA)
    (folder / "verify.py").write_text(text)
    return load(f"{folder / 'verify.py'}:verify", path=str(folder / "train.jsonl"))


PLAIN = """
LIMIT = 3


def helper(text):
    return text[:LIMIT]


def verify(completion, row):
    return row['answer'] in helper(completion)
"""


def test_an_edit_anywhere_in_the_file_is_another_verifier(tmp_path):
    first = task_source(verifier(tmp_path, PLAIN))
    assert first == task_source(verifier(tmp_path, PLAIN)) and len(first) == 32
    edits = [("LIMIT = 3", "LIMIT = 4"), ("text[:LIMIT]", "text[-LIMIT:]"), (" in helper", " not in helper")]
    others = {task_source(verifier(tmp_path, PLAIN.replace(*edit))) for edit in edits}
    assert len(others) == 3 and first not in others


def test_a_task_of_ours_is_the_installed_version_of_all_our_verifiers(tmp_path, monkeypatch):
    """Reckon and a data file are different classes of one package: a changed file of it changes both."""
    (tmp_path / "train.jsonl").write_text(DATA)
    tasks = [load("reckon"), load(str(tmp_path / "train.jsonl"))]
    before = [task_source(task) for task in tasks]
    copy = tmp_path / "tasks"
    copy.mkdir()
    for path in source.OWN.iterdir():
        if path.suffix in source.READ:
            (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(source, "OWN", copy)
    assert [task_source(task) for task in tasks] == before
    (copy / "vocabulary.txt").write_text("another unit\n")
    after = [task_source(task) for task in tasks]
    assert None not in after and not set(after) & set(before)


def near(tolerance):
    def verify(completion, row):
        return abs(float(completion) - float(row["answer"])) < tolerance

    return verify


def same(completion, row, case=True):
    return completion == row["answer"]


def test_what_a_function_was_made_with_counts():
    assert verifier_source(near(0.1)) == verifier_source(near(0.1)) != verifier_source(near(0.2))
    assert verifier_source(functools.partial(same, case=False)) != verifier_source(functools.partial(same, case=True))
    assert verifier_source(functools.lru_cache(same)) == verifier_source(same)  # a wrapper is what it wraps


class Judge:
    def __call__(self, completion, row):
        return True

    def verify(self, completion, row):
        return True


def test_objects_and_methods_are_their_class():
    assert verifier_source(Judge()) == verifier_source(Judge())
    assert verifier_source(Judge().verify) is not None


def test_a_verifier_without_source_is_named(tmp_path):
    made = {}
    exec("def verify(completion, row):\n    return True\n", made)  # as in an interpreter: no file holds it
    for function, name in (
        (made["verify"], "verify"),
        (str.startswith, "startswith"),
        (near(object()), "near.*verify"),
    ):
        with pytest.warns(UserWarning, match=rf"the verifier .*{name}.*used by its name alone"):
            assert verifier_source(function) is None
    (tmp_path / "train.jsonl").write_text(DATA)
    task = load("jsonl", path=str(tmp_path / "train.jsonl"), verifier=made["verify"])
    with pytest.warns(UserWarning, match="verify has no source"):
        assert task_source(task) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert task_source(load("reckon"))


COMMAND = ["--prompts", "2", "--samples", "1", "--max-new-tokens", "8", "--rollouts", "2", "--model", "reckon"]


def run(folder, *more):
    from tokencredit.cli import main

    data = ["--task", f"{folder / 'verify.py'}:verify", "--option", f"path={folder / 'train.jsonl'}"]
    return main(["pivotality", "run", "--out", str(folder / "run"), *data, *COMMAND, *more])


def test_only_what_is_yours_is_asked_of_a_run(tmp_path):
    (tmp_path / "verify.py").write_text("def verify(completion, row):\n    return True\n")
    (tmp_path / "train.jsonl").write_text(DATA)
    mine = load(f"{tmp_path / 'verify.py'}:verify", path=str(tmp_path / "train.jsonl"))
    assert own_source(load("reckon")) is None and own_source(mine) not in (None, task_source(mine))


@pytest.mark.parametrize("command", ["study", "train"])
def test_a_run_with_an_edited_verifier_does_not_go_on(tmp_path, capsys, command):
    """Its stages, and its records, hold rewards of the code before."""
    from tokencredit.cli import main
    from tokencredit.tasks.reckon import Reckon

    rows = Reckon().rows("train", 24, 0)
    text = "def verify(completion, row):\n    return len(completion) % 2 == 0\n"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    (tmp_path / "verify.py").write_text(text)
    data = ["--task", f"{tmp_path / 'verify.py'}:verify", "--option", f"path={tmp_path / 'train.jsonl'}"]
    sizes = {
        "study": ["dynamics", "noise-scale", "--prompts", "8", "--group", "8"],
        "train": ["train", "--quiet", *(f"--set={x}" for x in ("steps=1", "prompts=2", "group=2", "eval_every=0"))],
    }
    words = [*sizes[command], *data, "--model", "reckon", "--max-new-tokens", "8", "--out", str(tmp_path / "out")]
    assert main(words) == 0 and main(words) == 0, "the same code goes on"
    (tmp_path / "verify.py").write_text(text.replace("== 0", "== 1"))
    capsys.readouterr()
    assert main(words) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "verifier_source" in told and "was edited" in told and "Choose another directory" in told


def test_the_data_of_a_directory_are_the_files_of_its_parts(tmp_path):
    """A run may stand beside them, with files of its own."""
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    task = load("gsm8k", path=str(tmp_path))
    before = rows_source(task)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert rows_source(task) == before and rows_source(load("reckon")) is None
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 2?", "answer": "#### 3"}\n')
    assert rows_source(task) != before


@pytest.mark.parametrize("changed", ["weights", "data"])
def test_a_study_of_other_weights_or_rows_does_not_go_on(tmp_path, capsys, changed):
    """At the same paths, where its stages hold rollouts of the ones before."""
    from tokencredit.cli import main
    from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
    from tokencredit.tasks.reckon import Reckon

    model, tokenizer = load_model(resolve_model("reckon")), load_tokenizer(resolve_model("reckon"))
    model.save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    lines = [json.dumps({"prompt": row["prompt"], "answer": "1"}) + "\n" for row in Reckon().rows("train", 24, 0)]
    (tmp_path / "verify.py").write_text("def verify(completion, row):\n    return len(completion) % 2 == 0\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    data = ["--task", f"{tmp_path / 'verify.py'}:verify", "--option", f"path={tmp_path / 'train.jsonl'}"]
    words = ["dynamics", "noise-scale", "--prompts", "8", "--group", "8", *data, "--model", str(tmp_path / "m")]
    words += ["--method", "reinforce", "--max-new-tokens", "8", "--out", str(tmp_path / "out")]
    assert main(words) == 0 and main(words) == 0, "the same goes on"
    record = tmp_path / "out" / "run.json"
    known = json.loads(record.read_text())["rests_on"]
    if changed == "weights":
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
        model.save_pretrained(tmp_path / "m")
    else:
        (tmp_path / "train.jsonl").write_text("".join(reversed(lines)))
    capsys.readouterr()
    assert main(words) == 1
    assert f"the {changed} of" in (told := " ".join(capsys.readouterr().err.split())) and "changed since" in told
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "rests_on"}))
    assert main(words) == 0, "a directory of an earlier version says nothing of them"
    now = json.loads(record.read_text())["rests_on"]
    assert now.keys() == known.keys() and now != known


def test_stored_rewards_of_edited_code_are_refused(tmp_path, capsys):
    """The same name, another rule; and a store that knows the name alone."""
    from tokencredit.tasks.reckon import Reckon

    rows = Reckon().rows("train", 24, 0)
    text = "def verify(completion, row):\n    return len(completion) % 2 == 0\n"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    (tmp_path / "verify.py").write_text(text)
    assert run(tmp_path) == 0 and run(tmp_path) == 0
    (tmp_path / "verify.py").write_text(text.replace("== 0", "== 1"))
    capsys.readouterr()
    assert run(tmp_path) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "verifier_source:" in told and "was edited" in told and "Use another directory" in told
    (tmp_path / "verify.py").write_text(text)
    assert run(tmp_path) == 0
    file = tmp_path / "run" / "store" / "identity.json"
    former = {key: value for key, value in json.loads(file.read_text()).items() if key != "verifier_source"}
    file.write_text(json.dumps(former))
    assert run(tmp_path) == 1
    assert "a version that knew a verifier by its name" in " ".join(capsys.readouterr().err.split())
