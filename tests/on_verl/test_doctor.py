"""`tokencredit doctor verl`, where verl and Ray are installed."""

import subprocess
import sys

import pytest

from tokencredit import METHODS
from tokencredit.engines.verl.carried import carried
from verl_cpu.run import environment


def test_a_worker_finds_trainers_and_losses(address):
    command = [sys.executable, "-m", "tokencredit", "doctor", "verl", "--methods", "--address", address]
    settings = environment() | {"COLUMNS": "200"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "verl in a Ray worker" in said and "0.9.1" in said
    assert "tokencredit_colocate_async, tokencredit_separate_async, tokencredit_sync" in said
    losses = sum(not carried(method.within(1)).in_channel for method in METHODS.values()) + 1
    assert f"{losses} of ours" in said
    assert all(name in said for name in METHODS)


@pytest.mark.parametrize(
    ("policy", "words"), [("none", "VERL_USE_EXTERNAL_PLUGINS=none"), ("other", "VERL_USE_EXTERNAL_PLUGINS=other")]
)
def test_a_plugin_that_verl_is_told_to_leave_out_is_missed(policy, words):
    script = "from tokencredit.engines.verl.doctor import examine; print(*examine().faults, sep='\\n')"
    settings = environment() | {"VERL_USE_EXTERNAL_PLUGINS": policy}
    done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=False)
    assert words in done.stdout, done.stderr
