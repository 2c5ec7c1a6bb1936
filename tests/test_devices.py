"""Commands and measurements on a device that is not the CPU (`other_device`, which needs none): a tensor that numpy is
given without `.cpu()`, and one that is made on the CPU and meets the model's, fail here as on a GPU.
"""

import pyarrow.parquet
import pytest
import torch

from other_device import DEVICE, Elsewhere, elsewhere, move
from tokencredit.cli import main
from tokencredit.dynamics import checkpoint
from tokencredit.lm import load, policy
from tokencredit.scores.table import available
from tokencredit.studies.correlation import measurement
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
