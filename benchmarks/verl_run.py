"""verl's own trainer with GTPO's credit on reckon, on this CPU: its rewards, and what a step takes.

Needs the environment of `make test-verl`:

    PYTHONPATH=tests/on_verl .venv-verl/bin/python benchmarks/verl_run.py

Two FSDP2 workers over gloo, Ray, TransferQueue; the platform and the rollout engine are the tests' own. The prompts'
seed is 0; the same 32 prompts with 8 rollouts each make every batch, and each batch two optimizer steps.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from _result import finish
from verl_cpu.run import WORKERS, cluster, curve, main_ppo, overrides, prepare


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--method", default="gtpo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, cluster() as address:
        out = Path(folder) / "run"
        prepare(out, prompts=options.prompts)
        size = {"prompts": options.prompts, "group": options.group, "steps": options.steps}
        settings = overrides(out, **size, minibatches=2, learning_rate=1e-3)
        carrier = ["trainer.v1.trainer_mode=tokencredit_sync", f"+trainer.v1.tokencredit.method={options.method}"]
        began = time.perf_counter()
        done = main_ppo(out, [*settings, *carrier], address)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit((out / "log.txt").read_text()[-4000:])
        rewards, step = curve(out, "critic/rewards/mean"), curve(out, "timing_s/step")
    finish(
        "verl_run",
        {
            "method": options.method,
            "workers": WORKERS,
            "seed": 0,
            "steps": options.steps,
            "rollouts_per_step": options.prompts * options.group,
            "reward": rewards,
            "reward_first": rewards[0],
            "reward_last": rewards[-1],
            "seconds_per_step": statistics.median(step[1:]),
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
