"""`tokencredit train` in several processes: one run, evaluated together, that goes on after a kill; by the
configuration files of examples/distributed.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tokencredit.lm.evaluate import evaluate
from tokencredit.lm.policy import PolicyConfig
from tokencredit.runs import Run
from tokencredit.tasks.data import held_out

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "examples" / "distributed"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
PROMPTS, SAMPLES, STEPS = 5, 2, 4
SETTINGS = {"prompts": 4, "group": 4, "updates": 1, "save_every": 1, "record_every": 2}
EVALUATED = {"eval_every": 2, "eval_prompts": PROMPTS, "eval_samples": SAMPLES}
CLOCKS = ("seconds", "tokens_per_second")


def accelerate(name):
    return ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{name}.yaml", "--main_process_port", "0"]


def start(folder, launcher, program, out, *flags, **settings):
    """The launched command, whose output goes to a file of the folder."""
    told = [part for key, value in (SETTINGS | settings).items() for part in ("--set", f"{key}={value}")]
    train = ["train", "--device", "cpu", "--out", out, "--quiet", *flags, *told]
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, [*launcher, *program, *train])], stdout=output, stderr=output, env=ENVIRONMENT
        )


def ended(folder, process):
    """(status, output) of a launched command."""
    return process.wait(), (folder / "output.txt").read_text()[-4000:]


def timeless(records):
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nobody disturbs, as it is being made."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, TORCHRUN, ["-m", "tokencredit"], folder / "run", "--steps", STEPS, **EVALUATED)
    yield folder, process
    process.kill()
    process.wait()


def test_killed_processes_go_on_with_the_rows_of_a_run_that_was_not(whole, tmp_path):
    """First one process is killed and the other ends with a word; then both at once. torchrun and accelerate launch are
    one and the same here.
    """
    out = tmp_path / "run"
    killed = [HERE / "train_killed.py", 2, 1], [HERE / "train_killed.py", 3, "0,1"]
    for launcher, program in zip((TORCHRUN, accelerate("ddp")), killed):
        status, output = ended(tmp_path, start(tmp_path, launcher, program, out, "--steps", STEPS, **EVALUATED))
        assert status != 0 and Run.open(out).status != "finished", output
        if program is killed[0]:
            assert "another one of 2" in " ".join(output.split()), output
    program = ["-m", "tokencredit"]
    status, output = ended(tmp_path, start(tmp_path, TORCHRUN, program, out, "--steps", STEPS, **EVALUATED))
    assert status == 0 and output.count("Run: ") == 1, output
    status, output = ended(*whole)
    assert status == 0, output
    resumed, straight = Run.open(out), Run.open(whole[0] / "run")
    assert [m["step"] for m in resumed.metrics()] == list(range(1, STEPS + 1))
    assert timeless(resumed.metrics()) == timeless(straight.metrics())
    assert timeless(resumed.evaluations()) == timeless(straight.evaluations())
    assert resumed.token_steps() == straight.token_steps()


def test_the_prompts_of_an_evaluation_are_spread_and_its_figures_are_those_of_one_process(whole):
    status, output = ended(*whole)
    assert status == 0, output
    run = Run.open(whole[0] / "run")
    first, *_, last = run.evaluations()
    assert first["num_prompts"] == last["num_prompts"] == PROMPTS
    for record, model in ((first, "reckon"), (last, str(run.path))):
        policy = PolicyConfig(model, task="reckon").open()
        rows = held_out(policy.task, PROMPTS, "all")
        alone = evaluate(policy, rows, num_samples=SAMPLES, ks=(1, SAMPLES), seed=0)
        for name in ("pass@1", f"pass@{SAMPLES}", "greedy", "truncated", "length", "reasons"):
            assert record[name] == alone[name], name
        for name in ("correct", "length", "entropy"):
            assert record["by_prompt"][name] == pytest.approx(alone["by_prompt"][name], rel=1e-5)
        assert record["entropy_by_role"] == pytest.approx(alone["entropy_by_role"], rel=1e-5)


def test_one_clock_ends_all_processes(tmp_path):
    """A budget of seconds that the first process has spent while the others have not: nobody waits for nobody."""
    out, budget = tmp_path / "run", "{seconds: 1e-6, marks: 1}"
    process = start(tmp_path, TORCHRUN, ["-m", "tokencredit"], out, "--steps", 50, budget=budget, **EVALUATED)
    status, output = ended(tmp_path, process)
    assert status == 0, output
    run = Run.open(out)
    assert run.status == "finished" and [m["step"] for m in run.metrics()] == [1]
    assert [e["step"] for e in run.evaluations()] == [0, 1] and (out / "checkpoints" / "checkpoint-1").is_dir()


def test_a_model_in_parts_is_trained_and_opened(tmp_path):
    """fsdp2.yaml. accelerate takes FSDP for GPUs alone: the launched script mends that, and without it the run is
    refused.
    """
    out, program = tmp_path / "run", [HERE / "fsdp_on_cpu.py"]
    options = {"eval_every": 0, "steps": 1, "task": "reckon"}
    refused = start(tmp_path, accelerate("fsdp2"), ["-m", "tokencredit"], tmp_path / "none", **options)
    status, output = ended(tmp_path, refused)
    assert status != 0 and "FSDP was asked for, but accelerate leaves it out" in " ".join(output.split()), output
    assert not (tmp_path / "none").exists()
    status, output = ended(tmp_path, start(tmp_path, accelerate("fsdp2"), program, out, **options))
    assert status == 0, output
    run = Run.open(out)
    assert run.status == "finished" and len(run.metrics()) == 1
    trained, base = (PolicyConfig(model).open().model.state_dict() for model in (str(out), "reckon"))
    assert trained.keys() == base.keys() and any((trained[name] != base[name]).any() for name in base)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed(tmp_path, name):
    if find_spec("deepspeed") is None:
        pytest.skip(
            f"deepspeed is not installed: {name}.yaml was not run (pip install deepspeed; it compiles with g++)"
        )
    out = tmp_path / "run"
    program, options = ["-m", "tokencredit"], {"eval_every": 0, "steps": 2}
    status, output = ended(tmp_path, start(tmp_path, accelerate(name), program, out, **options))
    assert status == 0, output
    assert Run.open(out).status == "finished" and len(Run.open(out).metrics()) == 2
    trained, base = (PolicyConfig(model).open().model.state_dict() for model in (str(out), "reckon"))
    assert trained.keys() == base.keys() and any((trained[name] != base[name]).any() for name in base)


def test_the_configurations_differ_in_what_they_keep_apart():
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    for name, kind in kinds.items():
        told = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        assert told["distributed_type"] == kind and told["num_processes"] == 2
        if kind == "DEEPSPEED":
            assert told["deepspeed_config"]["zero_stage"] == int(name[-1])
    assert set(kinds) == {path.stem for path in CONFIGS.glob("*.yaml")}
