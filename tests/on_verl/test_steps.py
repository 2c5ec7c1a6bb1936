"""One step of verl's own actor worker on two FSDP2 processes, for every method, against plain torch."""

from pathlib import Path

import pytest

from tokencredit import METHODS
from verl_cpu.run import WORKERS, prepare, steps

ROLLOUTS = Path(__file__).parents[1] / "data" / "reckon_rollouts.json"
EXACT = 1e-5
INVERSE = ("gtpo", "gtpo_2025_08", "gtpo_geometric")
"""Their credit holds 1/H of single tokens: where H is 1e-4 nats, the 3e-6 by which two forward passes differ are a few
per cent of it. From the same scores it is equal; the gradient, which adds up many tokens, is to EXACT as well.
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("steps") / "run"
    prepare(out, prompts=8)
    return steps(out, ROLLOUTS)


def test_the_model_is_sharded_over_two_processes(found):
    assert found["sharded"] == "DTensor" and found["processes"] == WORKERS


def test_the_old_policy_is_the_same(found):
    assert max(found[name] for name in ("old", "entropy", "sum_p2")) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_methods(name, found):
    step = found["methods"][name]
    assert step["credit_given_scores"] == 0
    assert step["credit"] <= (1e-3 if name in INVERSE else EXACT)
    assert step["loss"] <= EXACT * max(step["loss_size"], 1)
    assert step["gradient"] <= EXACT
    assert step["gradient_size"] > 1e-6


def test_both_ways_are_taken(found):
    modes = {step["loss_mode"] for step in found["methods"].values()}
    assert "tokencredit_channel" in modes and len(modes) > 20
