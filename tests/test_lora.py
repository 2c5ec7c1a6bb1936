"""Adapters from the command line to the page: what is trained, kept, resumed and opened again, and what is refused.
Real TRL and PEFT, the shipped model.
"""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cuts import Cut, cut_at
from tokencredit import checkpoints
from tokencredit.checkpoints import COMPLETE
from tokencredit.cli import main
from tokencredit.durable import DamagedFile
from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.update import update_vector
from tokencredit.engines.lora import make_lora
from tokencredit.engines.recorder import RunRecorder
from tokencredit.engines.train import make_trainer, train
from tokencredit.lm.load import base_of, called, load_config, load_tokenizer
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.proxies import importance
from tokencredit.runs import Run
from tokencredit.tasks import load
from tokencredit.tasks.reckon import model_path
from tokencredit.train_config import TrainConfig, read_config

PEFT = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
SIZES = {"prompts": 4, "group": 4, "steps": 2, "save_every": 1, "eval_every": 0, "record_every": 1, "threads": 1}
WEIGHTS = "adapter_model.safetensors"


def config(**changes):
    return TrainConfig(**{"peft": PEFT} | SIZES | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(config(method="ptw_gradient_norm", learning_rate=0.01), tmp_path_factory.mktemp("lora") / "run")


@pytest.fixture(scope="module")
def last(run):
    return run.path / "checkpoints" / "checkpoint-4"


def test_a_checkpoint_holds_the_adapter_alone_and_its_mark_vouches_for_it(run, last, tmp_path):
    kept = load_file(last / WEIGHTS)
    assert {name.split(".")[-3] for name in kept} == {"q_proj", "down_proj"}
    assert all(x.abs().sum() > 0 for name, x in kept.items() if "lora_B" in name), "it was trained"
    assert not (last / "model.safetensors").exists()
    assert WEIGHTS in json.loads((last / COMPLETE).read_text())["files"]
    damaged = shutil.copytree(last, tmp_path / "checkpoint-4")
    (damaged / WEIGHTS).write_bytes((last / WEIGHTS).read_bytes()[:-8] + bytes(8))
    with pytest.raises(DamagedFile, match=f"{WEIGHTS} holds other bytes"):
        PolicyConfig(str(damaged), task="reckon").open()


def test_what_is_opened_is_the_base_with_the_adapter(run, last):
    model = PolicyConfig(str(run.path)).open().model
    assert isinstance(model, PeftModel) and not model.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        adapted, plain = model(ids).logits, base(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)
    assert (adapted - plain).abs().max() > 1e-3
    peers = PeftModel.from_pretrained(base, str(last)).eval()
    assert torch.equal(peers(ids).logits, adapted)


def test_a_run_that_was_cut_goes_on_bit_for_bit(run, last, tmp_path):
    out = tmp_path / "run"
    same = config(method="ptw_gradient_norm", learning_rate=0.01)
    with pytest.raises(Cut):
        train(same, out, listen=cut_at(3))
    assert [checkpoints.step_of(path) for path in checkpoints.marked(out / "checkpoints")] == [2]
    told = []
    train(same, out, listen=lambda *each: told.append(each))
    assert told[0] == ("resume", {"step": 2})
    mine, its = load_file(out / "checkpoints" / "checkpoint-4" / WEIGHTS), load_file(last / WEIGHTS)
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)
    assert Run.open(out).tokens(2) == run.tokens(2)


def test_proxies_in_training_measure_the_adapters_alone(run, tmp_path):
    """The scores that the first rollout batch was weighted with, again from the library by parameters="lora"."""
    task, own = load("reckon"), config(method="ptw_gradient_norm", learning_rate=0.01)
    recorder = RunRecorder(tmp_path / "unused", task)
    recorder.config = own
    model = make_trainer(own, own.build_method(), task, recorder).model.eval()
    tokenizer = load_tokenizer(str(model_path()))
    for row in run.tokens(0)[:3]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *row["token_ids"]]])
        wanted = torch.zeros_like(ids)
        wanted[0, len(prompt) :] = 1
        options = {"kinds": ("gradient_norm",), "method": "sketch", "num_directions": 8, "seed": own.seed}
        found = importance(model, ids, torch.ones_like(ids), wanted, parameters="lora", **options)
        expected = found["gradient_norm"].value[0, len(prompt) :]
        assert torch.allclose(torch.tensor(row["gradient_norm"]), expected.float(), rtol=0.02)
        everything = importance(model, ids, torch.ones_like(ids), wanted, parameters="all", **options)
        assert (everything["gradient_norm"].value[0, len(prompt) :] > 1.5 * expected).any()


def test_the_next_update_moves_the_adapters_alone(run):
    checkpoint = open_checkpoint(run.path)
    update = update_vector(checkpoint, draw(checkpoint, 2, 4, seed=0, needs=checkpoint.method.needs))
    assert update.vector.keys() == checkpoint.needs_optimizer().moments.keys()
    assert all("lora_" in name for name in update.vector)
    assert all(moments.step == 4 for moments in checkpoint.needs_optimizer().moments.values())


def test_commands_open_it_and_say_which_base(run, tmp_path, capsys):
    assert main(["evaluate", "--model", str(run.path), "--prompts", "2", "--samples", "2"]) == 0
    assert "(adapter checkpoint-4 on reckon) on reckon (test)" in " ".join(capsys.readouterr().out.split())
    scores = ["--prompts", "1", "--scores", "gradient_norm", "--parameters", "trainable"]
    assert main(["score", "--model", str(run.path), *scores, "--out", str(tmp_path / "s.parquet")]) == 0
    assert main(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    assert "lora_alpha" in (tmp_path / "page.html").read_text()


def test_a_base_that_has_moved_is_named(last, tmp_path):
    folder = shutil.copytree(last, tmp_path / "adapter")
    about = json.loads((folder / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(model_path()) and base_of(folder) == str(model_path())
    base = shutil.copytree(model_path(), tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(base)}))
    (folder / COMPLETE).unlink()
    assert called(str(folder)) == f"{folder} (adapter adapter on {base})"
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"an adapter of the model {base}, which is not there any more: .*ln -s"):
        PolicyConfig(str(folder), task="reckon").open()
    base.symlink_to(tmp_path / "moved")
    PolicyConfig(str(folder), task="reckon").open()


def test_the_shipped_base_is_found_wherever_the_package_is(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path / "run") / "checkpoints" / "checkpoint-4"
    about = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(
        json.dumps(about | {"base_model_name_or_path": "/elsewhere/reckon_model"})
    )
    assert base_of(copy) == str(model_path())


def test_an_adapter_is_trained_on_without_peft_and_refused_with_it(run, last, tmp_path):
    with pytest.raises(ValueError, match=r"is an adapter on .* already: leave out peft"):
        train(config(model=str(run.path)), tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    on = train(config(model=str(run.path), peft={}, steps=1, learning_rate=0.01), tmp_path / "on")
    before, after = load_file(last / WEIGHTS), load_file(on.path / "checkpoints" / "checkpoint-2" / WEIGHTS)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in after)
    assert base_of(on.path / "checkpoints" / "checkpoint-2") == str(model_path())


@pytest.mark.parametrize(
    ("peft", "told"),
    [
        ({"alpha": 4}, "LoraConfig has no field alpha that is set here; did you mean lora_alpha"),
        ({"task_type": "CAUSAL_LM"}, "LoraConfig has no field task_type"),
        ({"r": 0}, "peft.r is the rank .* got 0"),
        ({"r": "8"}, "peft.r is the rank .* got '8'"),
    ],
)
def test_settings_that_are_refused(peft, told):
    with pytest.raises(ValueError, match=told):
        make_lora(TrainConfig(peft=peft), str(model_path()), load_config(str(model_path())))


def test_an_architecture_that_peft_does_not_know_is_told_what_to_set():
    shape = load_config(str(model_path()))
    shape.model_type = "home_made"
    with pytest.raises(ValueError, match=r"which layers of a home_made model take adapters: set peft.target_modules"):
        make_lora(TrainConfig(peft={"r": 8}), str(model_path()), shape)
    made = make_lora(TrainConfig(peft={"r": 8, "target_modules": "all-linear"}), str(model_path()), shape)
    assert (made.r, made.target_modules, made.task_type) == (8, "all-linear", "CAUSAL_LM")


def test_settings_reach_into_peft_and_the_rate_follows():
    found = read_config(None, ["peft.r=8", "peft.target_modules=[q_proj, v_proj]", "task=gsm8k", "model=some/model"])
    assert found.peft == {"r": 8, "target_modules": ["q_proj", "v_proj"]} and found.learning_rate == 1e-5
    assert TrainConfig(task="gsm8k").learning_rate == 1e-6 and TrainConfig(peft={"r": 8}).learning_rate == 5e-4
