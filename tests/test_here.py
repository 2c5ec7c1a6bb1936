"""Modules of the current directory: a verifier of your own is found, and no folder takes the place of a library."""

import importlib
import os
import subprocess
import sys

import pytest

from tokencredit.here import FoundLast, look_here_last

QUIET = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory with a verifier, a folder of data and a checkout that are called like libraries."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_verifier_here.py").write_text("def verify(completion, row):\n    return '2' in completion\n")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "notes.txt").write_text("data")
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise AssertionError('imported')\n")
    return tmp_path


def test_only_modules_with_a_file_are_found_and_no_libraries(folder, monkeypatch):
    found = FoundLast(str(folder))
    assert found.find_spec("own_verifier_here").origin == str(folder / "own_verifier_here.py")
    assert found.find_spec("vllm") is None and found.find_spec("deepspeed") is None
    assert found.find_spec("own_verifier_here", [str(folder)]) is None, "a part of a package is the package's to find"
    (folder / "mine").mkdir()
    assert found.find_spec("mine") is None
    (folder / "mine" / "__init__.py").write_text("")
    assert found.find_spec("mine").submodule_search_locations == [str(folder / "mine")]


def test_the_directory_is_looked_at_last(folder, monkeypatch):
    (folder / "json.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.setattr(sys, "path", ["", str(folder), *sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    look_here_last()
    assert "" not in sys.path and str(folder) not in sys.path
    assert importlib.import_module("own_verifier_here").verify("2", {})
    assert importlib.util.find_spec("json").origin != str(folder / "json.py")
    assert importlib.util.find_spec("vllm") is None
    sys.modules.pop("own_verifier_here")


def test_train_runs_beside_folders_that_are_called_like_libraries(folder):
    """With a verifier from there, by `python -m`, which puts the directory first."""
    (folder / "data.jsonl").write_text('{"prompt": "<bos> 1 + 1 =", "answer": "2"}\n' * 2)
    settings = ("steps=1", "prompts=2", "group=2", "updates=1", "eval_every=0", "record_every=0")
    options = ["--option", "path=data.jsonl", "--option", "verifier=own_verifier_here:verify", "--model", "reckon"]
    told = [part for each in settings for part in ("--set", each)]
    command = [sys.executable, "-m", "tokencredit", "train", "--task", "jsonl", *options, *told]
    done = subprocess.run(
        [*command, "--device", "cpu", "--max-new-tokens", "4", "--out", "run", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        env=QUIET,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "run" / "metrics.jsonl").read_text().count("\n") == 1
