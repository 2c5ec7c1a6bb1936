"""One step of verl's own actor worker on two FSDP2 processes, for every method, against plain torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokencredit import METHODS
from verl_cpu.run import WORKERS, environment, prepare

ROLLOUTS = Path(__file__).parents[1] / "data" / "reckon_rollouts.json"
EXACT = 1e-5
INVERSE = ("gtpo", "gtpo_2025_08", "gtpo_geometric")
"""Their credit holds 1/H of single tokens: where H is 1e-4 nats, the 3e-6 by which two forward passes differ are a few
per cent of it. From the same scores it is equal; the gradient, which adds up many tokens, is to EXACT as well.
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    prepare(folder / "run", prompts=8)
    launched = ["-m", "torch.distributed.run", "--nproc_per_node", str(WORKERS), "--standalone", "-m", "verl_cpu.steps"]
    done = subprocess.run(
        [sys.executable, *launched, folder / "run", ROLLOUTS, folder / "steps.json"],
        env=environment() | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "steps.json").read_text())
    if keep := os.environ.get("KEEP_STEPS"):
        Path(keep).write_text(json.dumps(found, indent=1))
    return found


def test_the_model_is_sharded_over_two_processes(steps):
    assert steps["sharded"] == "DTensor" and steps["processes"] == WORKERS


def test_the_old_policy_is_the_same(steps):
    assert max(steps[name] for name in ("old", "entropy", "sum_p2")) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_methods(name, steps):
    found = steps["methods"][name]
    assert found["credit_given_scores"] == 0
    assert found["credit"] <= (1e-3 if name in INVERSE else EXACT)
    assert found["loss"] <= EXACT * max(found["loss_size"], 1)
    assert found["gradient"] <= EXACT
    assert found["gradient_size"] > 1e-6


def test_both_ways_are_taken(steps):
    modes = {found["loss_mode"] for found in steps["methods"].values()}
    assert "tokencredit_channel" in modes and len(modes) > 20
