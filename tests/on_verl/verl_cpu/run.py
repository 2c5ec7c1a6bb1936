"""Runs of `python -m verl.trainer.main_ppo` on reckon, with two FSDP2 workers over gloo on this CPU."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas

import tokencredit.tasks
from tokencredit.tasks import load

HERE = Path(__file__).parents[1]
WORKERS = 2


SETTINGS = {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
    "PYTHONUNBUFFERED": "1",
    "HYDRA_FULL_ERROR": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_AUTH_MODE": "disabled",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TQ_LOGGING_LEVEL": "WARNING",
    "VERL_LOGGING_LEVEL": "WARNING",
}


def environment() -> dict[str, str]:
    """Of every process of a run; Ray's workers have that of their cluster."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | SETTINGS | {"PYTHONPATH": os.pathsep.join(paths)}


STARTED = """
import ray, sys
options = {"num_cpus": 8, "num_gpus": int(sys.argv[1]), "object_store_memory": 300_000_000}
node = ray.init(address="local", include_dashboard=False, log_to_driver=False, **options)
print(node.address_info["address"], flush=True)
sys.stdin.read()
"""


@contextmanager
def cluster(tries: int = 10) -> Iterator[str]:
    """The address of a Ray cluster on this machine, with as many logical GPUs as there are workers.

    It lives as long as the process that started it. Ray gives a node 30 seconds to start, and a machine with other work
    may need several tries.
    """
    for _ in range(tries):
        command = [sys.executable, "-c", STARTED, str(WORKERS)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, env=environment(), stderr=errors, **pipes) as owner,
        ):
            if address := owner.stdout.readline().strip():
                try:
                    yield address
                finally:
                    owner.stdin.close()
                return
            owner.wait()
            errors.seek(0)
            said = errors.read()
        if "timed out during startup" not in said:
            break
    raise RuntimeError(f"no Ray cluster: {said[-2000:]}")


def prepare(out: Path, prompts: int = 256, seed: int = 0) -> None:
    """The model, with a chat template that says the prompt alone, and the prompts as verl's Parquet."""
    (out / "weights").mkdir(parents=True)
    shutil.copytree(Path(tokencredit.tasks.__file__).parent / "reckon_model", out / "model")
    settings = out / "model" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "data_source": "reckon",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {**row, "index": i},
        }
        for i, row in enumerate(load("reckon").rows("train", prompts, seed))
    ]
    pandas.DataFrame(rows).to_parquet(out / "prompts.parquet")


def overrides(out: Path, *, prompts: int, group: int, steps: int, minibatches: int = 1, learning_rate: float = 5e-4):
    """Settings of verl for a run: everything that is not about tokencredit. A worker takes its part of a mini-batch in
    one micro-batch.
    """
    micro = prompts * group // minibatches // WORKERS
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    precision = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    return [
        f"hydra.run.dir={out}/hydra",
        "hydra.output_subdir=null",
        f"data.train_files={out}/prompts.parquet",
        f"data.val_files={out}/prompts.parquet",
        f"data.train_batch_size={prompts}",
        "data.max_prompt_length=32",
        "data.max_response_length=48",
        "data.dataloader_num_workers=0",
        "data.filter_overlong_prompts=False",
        "data.shuffle=False",
        f"actor_rollout_ref.model.path={out}/model",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"{actor}.strategy=fsdp2",
        f"{actor}.ppo_mini_batch_size={prompts // minibatches}",
        f"{actor}.ppo_micro_batch_size_per_gpu={micro}",
        f"{actor}.use_torch_compile=False",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.fsdp_config.dtype=float32",
        f"+{actor}.fsdp_config.mixed_precision={precision}",
        f"{actor}.optim.lr={learning_rate}",
        f"{rollout}.name=tokencredit_local",
        f"{rollout}.nnodes=1",
        f"{rollout}.n_gpus_per_node={WORKERS}",
        f"{rollout}.n={group}",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.log_prob_micro_batch_size_per_gpu={micro}",
        f"{rollout}.free_cache_engine=False",
        f"+{rollout}.agent.agent_loop_manager_class=verl_cpu.rollout.Sampling",
        "algorithm.adv_estimator=grpo",
        "trainer.logger=[console,file]",
        f"trainer.n_gpus_per_node={WORKERS}",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=100",
        "trainer.val_before_train=False",
        "trainer.device=cpu",
        f"trainer.default_local_dir={out}/checkpoints",
        "trainer.resume_mode=disable",
        "reward.num_workers=1",
        f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={out}/metrics.jsonl",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    ]


def main_ppo(out: Path, settings: list[str], address: str) -> subprocess.CompletedProcess:
    """verl's own command on a cluster; its output is kept in `out/log.txt`."""
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        return subprocess.run(
            [sys.executable, "-m", "verl.trainer.main_ppo", *settings],
            env=environment() | {"RAY_ADDRESS": address},
            cwd=out,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )


def steps(out: Path, rollouts: Path) -> dict:
    """What `verl_cpu.steps` finds on two processes."""
    launched = ["-m", "torch.distributed.run", "--nproc_per_node", str(WORKERS), "--standalone", "-m", "verl_cpu.steps"]
    done = subprocess.run(
        [sys.executable, *launched, out, rollouts, out / "steps.json"],
        env=environment() | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads((out / "steps.json").read_text(encoding="utf-8"))


def curve(out: Path, name: str) -> list[float]:
    """A figure of every step, from verl's own file logger."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [step["data"][name] for line in lines if name in (step := json.loads(line))["data"]]
