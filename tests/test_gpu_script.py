"""The benchmark for a GPU runs through on a tiny model, and refuses to make figures without one."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """Its main function, called with arguments."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        gpu.main()

    return call


@pytest.mark.filterwarnings("ignore:rewards differ", "ignore:'pin_memory' argument:UserWarning")
def test_it_runs_on_a_tiny_model_and_keeps_nothing(gpu, capsys):
    kept = BENCHMARKS / "results" / "gpu.json"
    before = kept.read_bytes() if kept.exists() else None
    gpu("--device", "cpu", "--small")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (kept.read_bytes() if kept.exists() else None) == before
    assert found["device"] == "cpu" and set(found["training"]) == {"stock", "grpo", "gtpo", "ptw_gradient_norm"}
    assert all(figures["seconds"] > 0 and figures["tokens_per_second"] > 0 for figures in found["training"].values())
    assert set(found["sketch"]) == {"16", "32"} and all(row["seconds"] > 0 for row in found["sketch"].values())
    assert found["head"]["gap"] < 1e-4, "ours and TRL's log-probs are those of one model"


def test_without_a_gpu_it_says_what_is_missing(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"needs a GPU, and torch .* sees none"):
        gpu()
    with pytest.raises(SystemExit, match="--device cpu goes with --small"):
        gpu("--device", "cpu")
