"""GRPO on reckon from the shipped model through CreditTrainer: held-out sampled pass@1 before and after, and the
seconds of training.

Seconds are those of generation, scoring and updates; evaluations are outside. Intervals over seeds.
"""

import argparse
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from _result import finish
from tokencredit.engines.train import train
from tokencredit.stats import mean_of_units
from tokencredit.train_config import TrainConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="rollout batches of 64 prompts x 8, two updates each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", default="grpo")
    options = parser.parse_args()
    per_seed = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            config = TrainConfig(
                method=options.method,
                seed=seed,
                steps=options.steps,
                threads=options.threads,
                eval_every=options.steps,
                eval_prompts=512,
                eval_samples=4,
                save_every=options.steps,
                record_every=options.steps,
            )
            run = train(config, Path(folder) / str(seed))
            before, after = run.evaluations()[0], run.evaluations()[-1]
            per_seed.append(
                {
                    "seed": seed,
                    "before": before["pass@1"]["value"],
                    "after": after["pass@1"]["value"],
                    "greedy": after["greedy"]["value"],
                    "seconds": run.metrics()[-1]["seconds"],
                }
            )
            print(per_seed[-1], flush=True)
    finish(
        "train_reckon" if options.method == "grpo" else f"train_reckon_{options.method}",
        {
            "pass1_before": mean_of_units([s["before"] for s in per_seed]).value,
            "pass1_after": asdict(mean_of_units([s["after"] for s in per_seed])),
            "seconds": statistics.median(s["seconds"] for s in per_seed),
            "seconds_slowest": max(s["seconds"] for s in per_seed),
            "per_seed": per_seed,
            "steps": options.steps,
            "held_out_prompts": 512,
        },
    )


if __name__ == "__main__":
    main()
