"""What `entropy_change_every` costs while training, and how its two numbers agree: GRPO on reckon, measured at every
rollout batch.

    python benchmarks/entropy_online.py [--steps 16]

`share` is the processor time of a measurement over that of an optimizer step, generation included; `every` the number
of optimizer steps between measurements from which they cost no more than 5 %. `ratio` is Σ predicted · realised /
Σ realised² over the measurements, `correlation` their correlation; `shifted` the same of the prediction and of what the
logged entropies of this rollout batch and the next differ by, which other prompts and samples blur.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from _result import finish
from tokencredit.engines import trl_entropy
from tokencredit.engines.train import train
from tokencredit.train_config import TrainConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    spent = []

    def timed(function):
        def run(*args):
            start = time.process_time()
            try:
                return function(*args)
            finally:
                spent.append(time.process_time() - start)

        return run

    trl_entropy._begin, trl_entropy._end = timed(trl_entropy._begin), timed(trl_entropy._end)
    config = TrainConfig(
        steps=options.steps, eval_every=0, record_every=0, save_every=0, threads=1, entropy_change_every=2
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        run = train(config, Path(folder) / "run")
        total = time.process_time() - start
        rows = [m for m in run.metrics() if "entropy_change/predicted" in m]
    predicted, realised = (np.array([m[f"entropy_change/{name}"] for m in rows]) for name in ("predicted", "realised"))
    entropy = np.array([m["entropy"] for m in rows])
    steps = config.optimizer_steps
    share = sum(spent) / len(rows) / ((total - sum(spent)) / steps)
    finish(
        "entropy_online",
        {
            "share": share,
            "every": int(np.ceil(share / 0.05)),
            "measurements": len(rows),
            "ratio": float(predicted @ realised / (realised @ realised)),
            "correlation": float(np.corrcoef(predicted, realised)[0, 1]),
            "shifted": float(np.corrcoef(predicted[:-1], np.diff(entropy))[0, 1]),
            "predicted": predicted.tolist(),
            "realised": realised.tolist(),
            "entropy": entropy.tolist(),
            "steps": options.steps,
        },
    )


if __name__ == "__main__":
    main()
