"""The gradient noise scale: what it costs while training, whether its intervals hold, and whether it predicts other
batches.

`online_cost` is the share of processor time that measuring adds to training at EVERY steps between measurements. The
same training with and without it take turns; step by step it is the same work, so the extra time is that of the
measured steps, over EVERY mean steps. To see more of them every fourth is measured here, the first one (which warms up)
is left out; interval over the runs. `coverage` counts how often the 95 % intervals hold the truth, on Gaussian
gradients with known nested covariance. `predicted` is the variance of leave-one-out gradients with other group sizes,
foretold from groups of 8 on reckon's base model; `measured` is that of 4,096 fresh rollouts in groups of that size;
`one_way` is foretold as if rollouts of a group were independent.
"""

import argparse
import time
from dataclasses import asdict

import numpy as np
import torch

from _result import finish
from _trainers import make
from tokencredit import METHODS
from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.gradient_products import products
from tokencredit.dynamics.noise_scale import noise_scale
from tokencredit.dynamics.update import loss_coefficients
from tokencredit.dynamics.variance_split import independent, prompt_products
from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_noise import EVERY
from tokencredit.stats import mean_of_units
from tokencredit.studies.noise_scale.measurement import measure

ROLLOUTS = 4096


def online(runs: int, updates: int) -> dict:
    """Share of processor time added at EVERY, and what one measurement costs in mean steps."""
    extra = []
    for turn in range(runs):
        seconds = {}
        for every in (0, 4) if turn % 2 else (4, 0):
            trainer, times = make(
                CreditTrainer, 24, updates=updates, clock=time.process_time, method="grpo", noise_scale_every=every
            )
            trainer.train()
            seconds[every] = np.array(times.seconds)
        measured = slice(4, None, 4)
        extra.append((seconds[4][measured] - seconds[0][measured]).mean() / seconds[0][1:].mean())
    return {
        "online_cost": asdict(mean_of_units(np.array(extra) / EVERY)),
        "one_measurement": asdict(mean_of_units(extra)),
        "per_run": list(extra),
    }


def coverage(runs: int, prompts: int, size: int = 8, dim: int = 100) -> dict:
    """Share of the intervals that hold the truth, at a batch whose noise is half of its squared gradient, and at |G|² =
    0.
    """
    between, within = torch.arange(1, dim + 1).double().reciprocal(), torch.full((dim,), 0.2).double()
    noise = float(between.sum() + within.sum() / size)
    group, found = torch.arange(prompts).repeat_interleave(size), {}
    for name, signal in (("half", noise / prompts), ("none", 0.0)):
        held = {"signal": 0, "noise": 0, "between": 0, "rollout": 0, "scale": 0}
        truth = {"signal": signal, "noise": noise, "between": float(between.sum()), "rollout": float(within.sum())}
        truth["scale"] = noise / signal if signal else float("inf")
        resolved = 0
        for seed in range(runs):
            random = torch.Generator().manual_seed(seed)
            effect = torch.randn(prompts, 1, dim, generator=random, dtype=torch.float64) * between.sqrt()
            x = (
                effect + torch.randn(prompts, size, dim, generator=random, dtype=torch.float64) * within.sqrt()
            ).flatten(0, 1)
            x = x + (signal / dim) ** 0.5
            gram = x @ x.T
            scale, split = noise_scale(prompt_products(gram, group)), independent(gram, group)
            resolved += scale.resolved
            for each in held:
                estimate = getattr(scale if hasattr(scale, each) else split, each)
                held[each] += estimate.low <= truth[each] <= estimate.high
        found[name] = {each: count / runs for each, count in held.items()} | {"resolved": resolved / runs}
    return found


def prediction(prompts: int, sizes: tuple[int, ...], seed: int) -> dict:
    """Variance of one prompt's leave-one-out gradient by group size: foretold from groups of 8, and measured."""
    checkpoint = open_checkpoint("reckon")
    method = METHODS["rloo"].replace(aggregate=METHODS["grpo"].aggregate)
    batch = draw(checkpoint, prompts, 8, seed)
    began = time.perf_counter()
    found = measure(checkpoint, method, batch)
    seconds = time.perf_counter() - began
    coefficient, _ = loss_coefficients(method, batch)
    rows = (coefficient * (torch.arange(len(batch)) == i)[:, None] for i in range(len(batch)))
    one_way = independent(
        products(batch.passes(checkpoint), rows, len(batch))[0] * len(batch) ** 2, batch.rollouts.group_index
    )
    answer = {}
    for size in sizes:
        fresh = measure(checkpoint, method, draw(checkpoint, ROLLOUTS // size, size, seed + size), limit=1 << 28)
        answer[size] = {
            "predicted": asdict(found.split.variance(1, size)),
            "measured": asdict(fresh.own.noise),
            "one_way": asdict(one_way.variance(1, size)),
        }
    return {"prediction": answer, "offline_seconds": seconds, "offline_rollouts": len(batch)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument(
        "--updates", type=int, default=2, help="optimizer steps per rollout batch, as in training (default: 2)"
    )
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    finish(
        "noise_scale",
        {
            **online(options.runs, options.updates),
            "every": EVERY,
            "runs": options.runs,
            "updates": options.updates,
            "coverage": {count: coverage(options.repetitions, count) for count in (16, 64)},
            "repetitions": options.repetitions,
            **prediction(options.prompts, (2, 4, 16), options.seed),
            "prompts": options.prompts,
            "seed": options.seed,
        },
    )


if __name__ == "__main__":
    main()
