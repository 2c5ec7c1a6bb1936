"""Commands and measurements on a device that is not the CPU (`other_device`, which needs none): a tensor that numpy is
given without `.cpu()`, and one that is made on the CPU and meets the model's, fail here as on a GPU.
"""

import json

import pyarrow.parquet
import pytest
import torch

from other_device import DEVICE, Elsewhere, elsewhere, move
from tokencredit.cli import main
from tokencredit.dynamics import checkpoint
from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.kernel import of_update
from tokencredit.dynamics.kernel_sketch import sketched_features
from tokencredit.dynamics.update import update_vector
from tokencredit.lm import load, policy
from tokencredit.scores.table import available
from tokencredit.stages import Stages
from tokencredit.studies.correlation import measurement
from tokencredit.studies.variance import sampling
from tokencredit.studies.variance.gradients import weights_of
from tokencredit.studies.variance.question import VarianceConfig
from tokencredit.studies.variance.setting import prepare
from tokencredit.tasks import load as load_task

REAL = load.load_model
SKETCHED = ("gradient_norm", "fisher_trace", "perturbation")


@pytest.fixture
def there(monkeypatch):
    """Whatever model is opened is on the other device."""
    for module in (policy, checkpoint):
        monkeypatch.setattr(module, "load_model", lambda *args, **options: move(REAL(*args, **options)))
    with elsewhere():
        yield


def test_the_device_refuses_what_a_gpu_refuses(there):
    x = Elsewhere(torch.arange(3.0))
    assert x.device == DEVICE and x.cpu().device.type == "cpu" and (x + 1).device == DEVICE
    with pytest.raises(TypeError, match=r"to numpy: use Tensor\.cpu"):
        x.numpy()
    for mixed in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(1)]), lambda: torch.ones(3)[x.long()]):
        with pytest.raises(RuntimeError, match="on the same device"):
            mixed()
    assert (x[torch.tensor([0, 2])] * 2 + torch.tensor(1.0)).tolist() == [1, 5]
    assert (torch.ones(3, device=x.device) + x.new_tensor([1, 2, 3]))[[0, 2]].cpu().numpy().tolist() == [2, 4]


def test_a_model_there_computes_and_differentiates(there):
    here, model = REAL(load.resolve_model("reckon")), policy.PolicyConfig("reckon").open().model
    ids = torch.tensor([[3, 4, 5, 6]])
    there_too = model(ids.to(model.device)).logits
    assert there_too.device == DEVICE and torch.allclose(there_too.cpu(), here(ids).logits, atol=1e-4)
    there_too.square().mean().backward()
    here(ids).logits.square().mean().backward()
    for p, q in zip(model.parameters(), here.parameters()):
        assert p.grad.device == DEVICE and torch.allclose(p.grad.cpu(), q.grad, atol=1e-4)


def scored(path, *more):
    names = sorted(available(load_task("reckon")))
    assert main(["score", "--prompts", "1", "--scores", *names, "--out", str(path), *more]) == 0
    [row] = pyarrow.parquet.read_table(path).to_pylist()
    return {name: torch.tensor(row[name]) for name in names} | {"ids": row["completion_ids"]}


def test_every_score_is_that_of_the_cpu(tmp_path, request):
    here = scored(tmp_path / "here.parquet")
    request.getfixturevalue("there")
    found = scored(tmp_path / "there.parquet")
    assert found.pop("ids") == here["ids"], "the same completion is sampled"
    for name, value in found.items():
        rtol = 0.05 if name in SKETCHED else 1e-3
        assert torch.allclose(value, here[name], rtol=rtol, atol=1e-4, equal_nan=True), name


def test_exact_gradients(there, tmp_path):
    asked = ["--prompts", "1", "--scores", "gradient_norm", "--method", "exact"]
    assert main(["score", *asked, "--out", str(tmp_path / "s.parquet")]) == 0


def test_pivotality(there, tmp_path):
    sizes = ["--prompts", "1", "--samples", "1", "--rollouts", "2"]
    assert main(["pivotality", "run", *sizes, "--out", str(tmp_path / "pivots")]) == 0


def test_the_measurements_of_the_correlation_study(there):
    opened = policy.PolicyConfig("reckon").open()
    rows = measurement.held_out(opened.task, 1, seed=0)
    drawn = measurement.draw(opened, rows, 1, seed=0)
    num = len(drawn[0][0]["ids"])
    proxies = measurement.proxies(opened, rows, drawn, 0, ("entropy", "head_norm"))
    assert {name: len(values) for name, values in proxies.items()} == {"entropy": num, "head_norm": num}
    rollouts, _ = measurement.roll_out(opened, rows, drawn, 4, seed=0)
    assert len(rollouts.pi) == num


def test_the_gradient_noise_scale(there, tmp_path):
    sizes = ["--prompts", "3", "--group", "2"]
    assert main(["dynamics", "noise-scale", *sizes, "--out", str(tmp_path / "noise")]) == 0


SHORT = 12
"""Tokens of the shortest right answers: of four prompts, one has rollouts of both outcomes."""


def answered(path, command, sizes, length=SHORT):
    """What a command writes there."""
    assert main([*command.split(), *sizes.split(), "--max-new-tokens", str(length), "--out", str(path)]) == 0
    return path


def test_the_change_of_entropy(there, tmp_path):
    sizes = "--prompts 4 --group 4 --eval-prompts 8 --fresh 1 --sweep-prompts 8 --updates 1 --rates 4"
    answered(tmp_path / "entropy", "dynamics entropy --optimizer adamw", sizes)


def test_attribution(there, tmp_path):
    asked = "dynamics attribute --optimizer adamw --methods gtpo clip_cov ptw_entropy"
    answered(tmp_path / "attribution", asked, "--prompts 3 --group 4 --entropy 3 2 --reward 3 4 --trees 1", 20)


@pytest.mark.parametrize("level", ["tokens", "sequences"])
def test_the_kernel(there, tmp_path, level):
    sizes = "--prompts 4 --group 4 --held-out 2 --samples 2"
    answered(tmp_path / "kernel", f"dynamics kernel --optimizer adamw --{level}", sizes)


def test_the_sketch_of_a_kernel(there):
    opened = checkpoint.open_checkpoint("reckon", max_new_tokens=12).fresh("adamw")
    update = update_vector(opened, draw(opened, 4, 4, seed=0))
    found = sketched_features(update.passes, of_update(update, opened.optimizer), 2)
    assert len(found) == len(update.passes.batch)


def test_the_variance_of_gradients(there, tmp_path, monkeypatch):
    opened = checkpoint.open_checkpoint("reckon", max_new_tokens=12)
    for truth, directions in (("exact", 0), ("rloo", 2)):
        config = VarianceConfig(truth=truth, methods=("gtpo",), prompts=8, group=2, directions=directions)
        setting = prepare(config, "reckon", opened, Stages(tmp_path), print)
    monkeypatch.setattr(sampling, "SCHEMES", {"uniform": sampling.SCHEMES["uniform"]})
    monkeypatch.setattr(sampling, "GROUPS", 2)
    weight = weights_of(setting.methods["gtpo"], setting.batch.rollouts)
    assert set(sampling.drawn_check(opened, setting.batch, weight, 2, 0)) == {"uniform"}


def test_correlation(there, tmp_path):
    sizes = "--prompts 4 --completions 2 --rollouts 8 --bootstraps 20 --temperatures"
    answered(tmp_path / "correlation", "study correlation", sizes)


def test_the_world(there, tmp_path):
    answered(tmp_path / "truth", "world truth", "--prompts 1 --samples 1")


def test_what_a_pivotality_run_is_for(there, tmp_path):
    run = str(answered(tmp_path / "pivots", "pivotality run --split train", "--prompts 10 --samples 2 --rollouts 2"))
    model = str(tmp_path / "model")
    assert main(["credit-model", "fit", run, "--out", model]) == 0
    assert main(["credit-model", "evaluate", model, run]) == 0
    assert main(["pivotality", "export", run, "--fresh", "2"]) == 0
    inspected = answered(tmp_path / "inspected", f"inspect {run} --model reckon", "--tokens 300 --rollouts 4")
    assert {"audit", "autopsy"} <= set(json.loads((inspected / "result.json").read_text())["parts"])


def test_two_stages(there, tmp_path):
    answered(
        tmp_path / "pivots", "pivotality run --budget two-stage", "--prompts 1 --samples 1 --rollouts 2 --confirm 2"
    )
