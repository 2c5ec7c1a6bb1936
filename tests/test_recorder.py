"""RunRecorder: the run directory of any CreditTrainer, with one process and with two. Real TRL, a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from chats import chat_model_in
from cuts import Cut, cut_at
from tokencredit import METHODS, Chain, GroupCenter, Outcome
from tokencredit.checkpoints import marked, step_of
from tokencredit.cli import main
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.engines.configs import read_method, read_trainer
from tokencredit.engines.recorder import RunRecorder
from tokencredit.engines.train import make_trainer
from tokencredit.engines.trl import CreditTrainer
from tokencredit.lm.load import load_tokenizer
from tokencredit.lm.policy import PolicyConfig
from tokencredit.runs import Run, RunError
from tokencredit.tasks import load, named
from tokencredit.train_config import TrainConfig
from trl_tiny import build, sums, tiny_tokenizer

OWN = METHODS["grpo"].replace(name="mine", chain=Chain(Outcome(), GroupCenter(scale="none"), GroupCenter()))
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "num_iterations": 1}


def recorded(out, changes=None, method=OWN, **keywords):
    """A trainer that records into `out`, with what its recorder takes."""
    recorder = RunRecorder(out, record_every=1, **keywords)
    return build(CreditTrainer, out, SAVED | (changes or {}), method=method, callbacks=[recorder])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded") / "run"
    recorded(out).train()
    return Run.open(out)


def test_a_run_of_ones_own_is_a_run(run, tmp_path, capsys):
    info, config = run.info, TrainConfig(**run.info["config"])
    assert info["status"] == "finished" and info["method_name"] == "mine" and "GroupCenter" in info["method"]
    assert [m["step"] for m in run.metrics()] == [1, 2, 3] and run.token_steps() == [0, 1, 2]
    assert [m["rollouts"] for m in run.metrics()] == [16, 32, 48] and run.metrics()[0]["tokens"] > 16
    assert (config.prompts, config.group, config.steps, config.optimizer_steps) == (4, 4, 3, 3)
    assert config.learning_rate == 0.05 and config.trl["max_grad_norm"] == 0.0 and config.trl["optim"] == "sgd"
    row = run.tokens(0)[0]
    assert row["reason"] == ("correct" if row["success"] else "wrong") and len(row["credit"]) == len(row["tokens"])
    assert main(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    assert [step_of(path) for path in marked(run.path / "checkpoints")] == [3, 2, 1]


def test_what_a_method_of_ones_own_asks_of_the_commands(run, capsys):
    """The run names no task and its method is in no table: both are asked for."""
    assert main(["evaluate", "--model", str(run.path)]) == 1
    assert "name one with --task" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="trained with a method of its own, mine: name one of METHODS with --method"):
        open_checkpoint(run.path, task="reckon").method  # noqa: B018
    opened = open_checkpoint(run.path, task="reckon", method="grpo")
    assert opened.method.name == "grpo" and opened.optimizer and opened.max_grad_norm is None


def test_a_cut_run_goes_on_from_its_checkpoint_and_a_finished_one_is_not_written_over(run, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Cut):
        recorded(out, listen=cut_at(2)).train()
    assert Run.open(out).status == "running" and [m["step"] for m in Run.open(out).metrics()] == [1, 2]
    recorded(out).train(resume_from_checkpoint=True)
    again = Run.open(out)
    assert again.status == "finished" and [m["step"] for m in again.metrics()] == [1, 2, 3]
    assert [m["rollouts"] for m in again.metrics()] == [16, 32, 48]
    assert [m["loss"] for m in again.metrics()] == [m["loss"] for m in run.metrics()]
    with pytest.raises(RunError, match="holds a finished run: choose another directory"):
        recorded(out).train()
    with pytest.raises(RunError, match="already holds a different run"):
        Run.open(out)._update(status="running")
        recorded(out, {"learning_rate": 0.01}).train()


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"recorded in .*run, .* it is .*elsewhere"):
        build(CreditTrainer, tmp_path / "elsewhere", callbacks=[RunRecorder(tmp_path / "run")])
    with pytest.raises(ValueError, match="held-out prompts: name a task, or eval_every=0"):
        recorded(tmp_path / "run", eval_every=1)
    late = build(CreditTrainer, tmp_path / "run")
    late.add_callback(RunRecorder(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="when it is made: CreditTrainer"):
        late.train()
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_job_s_own_trainer_is_read_as_its_config(tmp_path):
    """read_trainer undoes make_trainer, up to what a trainer does not know."""
    config = TrainConfig(
        method="dapo",
        method_options={"Clip.high": 0.3},
        prompts=4,
        group=4,
        steps=3,
        updates=2,
        minibatches=2,
        accumulate=2,
        temperature=0.8,
        max_new_tokens=9,
        peft={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        trl={"max_grad_norm": 0.5},
        eval_every=0,
    )
    task = load("reckon")
    recorder = RunRecorder(tmp_path / "run", task)
    recorder.config = config
    trainer = make_trainer(config, config.build_method(), task, recorder)
    trainer.state.max_steps = config.optimizer_steps
    names = ("task", "model", "eval_every", "threads", "save_every")
    found = read_trainer(trainer, **{name: getattr(config, name) for name in names})
    differing = {name for name, value in config.as_dict().items() if found.as_dict()[name] != value}
    assert differing <= {"trl", "record_every", "eval_prompts"}
    assert found.trl.items() >= config.trl.items() and found.build_method() == config.build_method()


SIGNED = "{% for m in messages %}{{ m['content'] }} {% endfor %}{{ sign or '' }} ="


def test_evaluations_ask_with_the_options_of_the_template_that_training_asks_with(tmp_path):
    tokenizer, asked = tiny_tokenizer(), [{"role": "user", "content": "3"}]
    tokenizer.chat_template = SIGNED
    data = sums().map(lambda row: {"prompt": asked})
    changes, keywords = {"chat_template_kwargs": {"sign": "+"}}, {"processing_class": tokenizer, "train_dataset": data}
    recorder = RunRecorder(tmp_path / "run", record_every=1)
    trainer = build(CreditTrainer, tmp_path / "run", SAVED | changes, callbacks=[recorder], **keywords)
    seen, generate = [], trainer._generate
    trainer._generate = lambda *args, **options: seen.append(generate(*args, **options)) or seen[-1]
    trainer.train()
    ids = tiny_tokenizer()("3 + =")["input_ids"]
    assert recorder.policy.encode(asked) == list(seen[0][0][0]) == ids
    opened = open_checkpoint(PolicyConfig(str(tmp_path / "run"), task="reckon"))
    assert opened.policy.encode(asked) == ids


def test_the_context_is_checked_with_the_options_of_the_template(tmp_path):
    folder = chat_model_in(tmp_path / "model", SIGNED)

    def made(sign):
        trl = {"chat_template_kwargs": {"sign": sign}}
        config = TrainConfig(model=folder, task="reckon", chat=True, trl=trl, prompts=4, group=4)
        recorder = RunRecorder(tmp_path / "run", load("reckon"))
        recorder.config = config
        make_trainer(config, config.build_method(), recorder.task, recorder)
        return recorder.policy.encode("3")

    assert made("+") == load_tokenizer(folder)("3 + =")["input_ids"]
    with pytest.raises(ValueError, match="more than the model's context"):
        made("+ " * 300)


def test_a_method_is_known_by_its_name_and_options():
    changed = METHODS["dapo"].replace(**{"Clip.high": 0.3})
    assert read_method(changed.within(32), 32) == ("dapo", {"Clip.high": 0.3})
    assert read_method(METHODS["gtpo"].within(32), 32) == ("gtpo", {})
    assert read_method(OWN.within(32), 32) == ("mine", {})
    other = METHODS["grpo"].replace(chain=OWN.chain)
    assert read_method(other.within(32), 32) == ("grpo (changed)", {})


def test_a_task_is_known_by_its_name_and_options(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": "2"}) + "\n")
    for name, options in (("reckon", {}), ("gsm8k", {"path": "x", "template": "plain"})):
        assert named(load(name, **options)) == (name, options)
    path = str(tmp_path / "data.jsonl")
    assert named(load(path, timeout=2.0)) == ("jsonl", {"path": path, "timeout": 2.0})
    assert named(load("jsonl", path=path, verifier=lambda completion, row: True)) == ("", {})


def test_two_processes_make_one_run(tmp_path):
    """`tokencredit train` under a launcher: the first process records, both train, and the run goes on from its
    checkpoint.
    """
    sizes = ("prompts=4", "group=4", "updates=1", "eval_every=2", "eval_prompts=4", "eval_samples=2", "save_every=1")
    settings = [part for each in (*sizes, "record_every=1", "peft.r=2") for part in ("--set", each)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "tokencredit", "train", "--steps", "2", *settings, "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Run: ") == 1
    run = Run.open(tmp_path / "run")
    assert run.status == "finished" and [m["step"] for m in run.metrics()] == [1, 2]
    assert [m["rollouts"] for m in run.metrics()] == [16, 32]
    assert [e["step"] for e in run.evaluations()] == [0, 2] and len(run.tokens(0)) == 16
    files = json.loads((run.path / "checkpoints" / "checkpoint-2" / "complete").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "adapter_model.safetensors"} <= files.keys()
