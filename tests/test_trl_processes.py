"""The TRL engine over several processes: the numbers of one process, with the whole model in each and with a part of
it; and a process that is killed.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tokencredit import METHODS
from tokencredit.engines.processes import is_lost, part_of, refuse_parts, refuse_strangers
from tokencredit.engines.scorers import importance_scorers, log_ratio, on_rows, task_scorers, uniform
from tokencredit.engines.trl import CreditTrainer
from tokencredit.tasks import load
from trl_killed import STEPS
from trl_tiny import build, steps, tiny_tokenizer, weights
from trl_two_processes import CASES, WHOLE, run

HERE = Path(__file__).parent
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SKETCHED = ("ptw_gradient_norm", "ptw_fisher", "ptw_perturbation")
"""Credit by finite differences: the same on the same weights. Of the second batch, whose weights differ by the rounding
of a sum of gradients, they divide that rounding by their step.
"""


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
@pytest.mark.parametrize("case", [*CASES, *WHOLE])
def test_two_processes_train_on_the_credit_of_one(launched, tmp_path, case):
    """Also where each holds a part of the model (FSDP2); what the launched script asserts is that it does."""
    folder, status, output = finished(launched, "two")
    assert status == 0, output
    one = run(case, 1, tmp_path)
    for mode in ("ddp", "fsdp2") if case in CASES else ("ddp",):
        for rank in range(2):
            two = load_file(folder / f"{mode}.{case}.{rank}.safetensors")
            assert len(one.kept) == len({name.split(".")[0] for name in two} - {"weights"})
            for turn, batch in enumerate(one.kept):
                assert {f"{turn}.{name}" for name in batch} == {name for name in two if name.startswith(f"{turn}.")}
                close = 5e-3 if case in SKETCHED and turn else 5e-6
                for name, x in batch.items():
                    assert torch.allclose(two[f"{turn}.{name}"], x, rtol=0, atol=close), (
                        f"{name} of rollout batch {turn}, process {rank}, {mode}"
                    )
            assert (two["weights"] - weights(one)).abs().max() < (5e-5 if case in SKETCHED else 1e-6), mode
            logged = json.loads((folder / f"{mode}.{case}.{rank}.json").read_text())
            compare_logs(steps(one)[: 1 if case in SKETCHED else None], logged, rank, mode)
    assert sum(batch["advantages"].abs().sum() for batch in one.kept) > 0
    assert case != "clip_cov" or all(batch["coefficient"].sum() > 0 for batch in one.kept)
    assert case != "dapo" or max(s["dynamic_sampling/rounds"] for s in steps(one)) > 1


def compare_logs(one, two, rank, mode):
    """The figures do not depend on the number of processes, and every process has them (the loss only the first)."""
    timing = ("seconds", "tokens_per_second", "step_time", "epoch")
    share = ("credited_share", "ratio", "kl_old", "grad_norm")  # rows without credit are dropped in one process alone
    sharded = ("noise_scale", "entropy_change") if mode == "fsdp2" else ()
    for a, b in zip(one, two[: len(one)], strict=True):
        for name, value in a.items():
            if not name.startswith(timing + share + sharded) and (rank == 0 or name != "loss"):
                close = 1e-4 if name == "noise_scale" else 1e-5  # a ratio, and its denominator a small difference
                assert b[name] == pytest.approx(value, rel=close, abs=1e-5), name
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4, abs=1e-5)


def test_at_least_fifteen_methods_stand_the_comparison_in_both_modes():
    assert len({method.name for method, _ in CASES.values()}) >= 15


def test_a_killed_run_resumes_from_its_checkpoint_and_finishes(launched):
    folder, status, output = finished(launched, "killed")
    assert status == -signal.SIGKILL, output
    trainer = build(CreditTrainer, folder, STEPS, method="gtpo")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS["max_steps"]
    assert [s["step"] for s in steps(trainer)] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(s["loss"]) and s["entropy"] > 0 for s in steps(trainer))
    assert (folder / "checkpoint-6").exists()


# --- what processes cannot do -----------------------------------------------------------------------------------------


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    """A launcher started two, and accelerate knows of one: torchrun on CPUs without use_cpu=True."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes .*each would train alone.*use_cpu=True"):
        build(CreditTrainer, tmp_path, {"use_cpu": False, "dataloader_pin_memory": False}, method="grpo")


def trainer_of(processes=2, with_fsdp=False, with_deepspeed=False, stage=None, **args):
    """What the refusals read of a trainer."""
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(num_processes=processes, device="cpu", state=state)
    return SimpleNamespace(
        accelerator=accelerator,
        is_fsdp_enabled=with_fsdp,
        is_deepspeed_enabled=with_deepspeed,
        args=SimpleNamespace(**{"fsdp": False, "deepspeed": None} | args),
    )


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_that_is_left_out_in_silence_is_refused(monkeypatch, name):
    refuse_strangers(trainer_of())
    refuse_strangers(trainer_of(with_fsdp=True, with_deepspeed=True, **{name.lower(): "yes"}))
    with pytest.raises(ValueError, match=f"{name} was asked for, but accelerate leaves it out on the device cpu"):
        refuse_strangers(trainer_of(**{name.lower(): "yes"}))
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"{name} was asked for"):
        refuse_strangers(trainer_of())


@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed ZeRO-3"])
def test_scores_of_whole_parameters_are_refused_where_these_are_sharded(kind):
    trainer = trainer_of(with_fsdp=True) if kind == "FSDP" else trainer_of(with_deepspeed=True, stage=3)
    task = load("reckon")
    tasks = {name: on_rows(f, ()) for name, f in task_scorers(task, tiny_tokenizer(), 8).items()}
    scorers = {**importance_scorers(), "uniform": uniform, **tasks, "self_reward": log_ratio(None, None)}
    for name in ("ptw_gradient_norm", "ptw_fisher", "ptw_perturbation", "ptw_attention", "vineppo", "exact_value"):
        needed = sorted(METHODS[name].needs)[0]
        with pytest.raises(ValueError, match=f'method "{name}" needs {needed}, .*and {kind} keeps a part of it'):
            refuse_parts(trainer, METHODS[name], scorers)
    with pytest.raises(ValueError, match="needs self_reward"):
        refuse_parts(trainer, METHODS["spro"], scorers)
    for name in ("gtpo", "random_tokens", "oracle_positions", "clip_cov"):
        refuse_parts(trainer, METHODS[name], scorers)
    mine = {**scorers, "gradient_norm": lambda trainer, inputs, batch: None}
    refuse_parts(trainer, METHODS["ptw_gradient_norm"], mine)
    refuse_parts(trainer_of(with_deepspeed=True, stage=2), METHODS["ptw_gradient_norm"], scorers)


def test_parts_of_prompts_are_everything_once():
    for number in (0, 1, 5, 8):
        for processes in (1, 2, 3):
            parts = [range(number)[part_of(number, index, processes)] for index in range(processes)]
            assert [i for part in parts for i in part] == list(range(number))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_lost_process_is_told_from_other_errors():
    assert is_lost(RuntimeError("[..gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21"))
    assert is_lost(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost(ValueError("Connection closed by peer"))
