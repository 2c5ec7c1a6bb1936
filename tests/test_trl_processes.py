"""The TRL engine over several processes: the numbers of one process; and a process that is killed."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokencredit.engines.trl import CreditTrainer
from trl_killed import STEPS
from trl_tiny import build, steps, weights
from trl_two_processes import CASES, run

HERE = Path(__file__).parent
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Both helper scripts, started together: (folder, process) of each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    commands = {"two": [*torchrun, HERE / "trl_two_processes.py"], "killed": [HERE / "trl_killed.py"]}
    found = {}
    for name, command in commands.items():
        folder = tmp_path_factory.mktemp(name)
        with open(folder / "output.txt", "w") as output:
            started = subprocess.Popen(
                [sys.executable, *map(str, command), str(folder)], stdout=output, stderr=output, env=QUIET
            )
        found[name] = (folder, started)
    yield found
    for _, process in found.values():
        process.kill()
        process.wait()


def finished(launched, name):
    folder, process = launched[name]
    return folder, process.wait(), (folder / "output.txt").read_text()[-3000:]


@pytest.mark.filterwarnings("ignore:dynamic sampling used up its 3 rounds")  # of forking_tokens, in one batch
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_on_the_credit_of_one(launched, tmp_path, case):
    folder, status, output = finished(launched, "two")
    assert status == 0, output
    one = run(case, 1, tmp_path)
    for rank in range(2):
        two = load_file(folder / f"{case}.{rank}.safetensors")
        assert len(one.kept) == len({name.split(".")[0] for name in two} - {"weights"})
        for turn, batch in enumerate(one.kept):
            assert {f"{turn}.{name}" for name in batch} == {name for name in two if name.startswith(f"{turn}.")}
            for name, x in batch.items():
                assert torch.allclose(two[f"{turn}.{name}"], x, rtol=0, atol=1e-6), (
                    f"{name} of rollout batch {turn}, process {rank}"
                )
        assert (two["weights"] - weights(one)).abs().max() < 1e-6
        compare_logs(steps(one), json.loads((folder / f"{case}.{rank}.json").read_text()), rank)
    assert sum(batch["advantages"].abs().sum() for batch in one.kept) > 0
    assert case != "clip_cov" or all(batch["coefficient"].sum() > 0 for batch in one.kept)
    assert case != "dapo" or max(s["dynamic_sampling/rounds"] for s in steps(one)) > 1


def compare_logs(one, two, rank):
    """The figures do not depend on the number of processes, and every process has them (the loss only the first)."""
    timing = ("seconds", "tokens_per_second", "step_time", "epoch")
    share = ("credited_share", "ratio", "kl_old", "grad_norm")  # rows without credit are dropped in one process alone
    for a, b in zip(one, two, strict=True):
        for name, value in a.items():
            if not name.startswith(timing + share) and (rank == 0 or name != "loss"):
                close = 1e-4 if name == "noise_scale" else 1e-5  # a ratio, and its denominator a small difference
                assert b[name] == pytest.approx(value, rel=close, abs=1e-5), name
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4, abs=1e-5)


def test_a_killed_run_resumes_from_its_checkpoint_and_finishes(launched):
    folder, status, output = finished(launched, "killed")
    assert status == -signal.SIGKILL, output
    trainer = build(CreditTrainer, folder, STEPS, method="gtpo")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS["max_steps"]
    assert [s["step"] for s in steps(trainer)] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(s["loss"]) and s["entropy"] > 0 for s in steps(trainer))
    assert (folder / "checkpoint-6").exists()
