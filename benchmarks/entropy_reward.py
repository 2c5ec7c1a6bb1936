"""What a step does to entropy against what it does to the expected reward, over many batches and model states.

    python benchmarks/entropy_reward.py [--states 10 20 40 60] [--batches 6]

GRPO on reckon (seed 0), a checkpoint every ten optimizer steps. At every state the gradients of mean token entropy and
of expected reward are estimated once, on rollouts of their own, and --batches batches of 64 prompts x 8 rollouts each
make AdamW's next step; dH and dJ are the products with the whole step, and with the part that the batch added.

state/N/...      mean over the batches, with its interval over them; the error of the gradients is common to a state
correlation      over batches within states: Pearson's of what is left of the state's means, with Fisher's interval for
                 as many batches less states; `between` that of the states' means
opposed          share of (state, batch) pairs in which dH and dJ have opposite signs
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

from _result import finish
from tokencredit.dynamics.attribution import draw_goals
from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.update import update_vector
from tokencredit.dynamics.vectors import dot
from tokencredit.engines.train import train
from tokencredit.stats import mean_of_units
from tokencredit.train_config import TrainConfig


def correlation(x, y, lost):
    r = float(np.corrcoef(x, y)[0, 1])
    half = 1.96 / np.sqrt(max(len(x) - lost - 3, 1))
    low, high = np.tanh(np.arctanh(r) + np.array([-half, half]))
    return {"value": r, "low": float(low), "high": float(high), "num": len(x)}


def interval(values):
    estimate = mean_of_units(list(map(float, values)))
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "num": len(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, nargs="+", default=[10, 20, 40, 60])
    parser.add_argument("--batches", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    changes = np.empty((len(options.states), options.batches, 2, 2))  # state, batch, (whole, batch's part), (dH, dJ)
    with TemporaryDirectory() as folder:
        config = TrainConfig(
            steps=30, eval_every=0, record_every=0, save_every=5, threads=1, trl={"save_total_limit": 6}
        )
        run = train(config, Path(folder) / "grpo").path
        for s, step in enumerate(options.states):
            checkpoint = open_checkpoint(run, step)
            goals = draw_goals(checkpoint, step, entropy=(512, 2), reward=(512, 8))
            gradients = [goals[name].gradient for name in ("entropy", "reward")]
            for b in range(options.batches):
                update = update_vector(checkpoint, draw(checkpoint, 64, 8, seed=1000 * step + b))
                for part, vector in enumerate((update.vector, update.fresh)):
                    changes[s, b, part] = [dot(gradient, vector) for gradient in gradients]
    figures = {}
    for part, name in enumerate(("whole", "batch")):
        x = changes[:, :, part]
        for s, step in enumerate(options.states):
            for goal, of in enumerate(("dH", "dJ")):
                figures[f"{name}/state/{step}/{of}"] = interval(x[s, :, goal])
        left = (x - x.mean(1, keepdims=True)).reshape(-1, 2)
        figures[f"{name}/correlation"] = correlation(*left.T, len(options.states))
        figures[f"{name}/between"] = correlation(*x.mean(1).T, 0)
        figures[f"{name}/opposed"] = {"value": float((x[..., 0] * x[..., 1] < 0).mean()), "num": x[..., 0].size}
    finish("entropy_reward", {"figures": figures, "changes": changes.tolist(), "settings": vars(options)})


if __name__ == "__main__":
    main()
