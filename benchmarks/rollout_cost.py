"""Processor seconds per rollout batch of methods whose scores cost something, on reckon: generation, scoring, and two
updates.

One thread, so that they are the seconds of an idle core; medians over rollout batches of the base model's first steps,
when prefix trees are largest.
"""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from _result import finish
from tokencredit.engines.train import train
from tokencredit.train_config import TrainConfig

MEASURED = ("grpo", "otb", "token_sampling", "ptw_gradient_norm", "vineppo", "exact_value")


def seconds(method: str, prompts: int, steps: int) -> float:
    """Median processor seconds per rollout batch; the first batch, which warms up, is left out."""
    config = TrainConfig(
        method=method, prompts=prompts, steps=steps + 1, threads=1, eval_every=0, record_every=0, save_every=0
    )
    clock = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            config,
            Path(folder) / "run",
            listen=lambda event, _: clock.append(time.process_time()) if event == "step" else None,
        )
    ends = clock[config.updates - 1 :: config.updates]
    return statistics.median(b - a for a, b in pairwise(ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for prompts in options.prompts:
        for method in MEASURED:
            figures[f"{method}, {prompts} x 8"] = found = seconds(method, prompts, options.steps)
            print(f"{prompts} x 8  {method:18} {found:.2f}", flush=True)
    finish("rollout_cost", {"processor_seconds": figures, "steps": options.steps})


if __name__ == "__main__":
    main()
