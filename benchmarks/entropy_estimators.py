"""Other people's estimators of the change of entropy beside ours, on the same rollouts of the embedded world.

    python benchmarks/entropy_estimators.py [--updates 4] [--prompts 2048] [--batches 2000] [--size 256]

GRPO on reckon, checkpoint 40, as in dynamics_linear.py. Every update is AdamW's next step on a batch of its own; the
change of entropy along it is predicted, and measured, on one rollout of each of --prompts prompts.

error/NAME       standard error of the linear prediction with a baseline, over that without one: the root mean square
                 over updates
truth/NAME       the same for the true change, reweighted by prefixes or by whole completions, over that by prefixes, at
                 multiples of the optimizer's rate; size/NAME the effective sample size as a share of the rollouts
sub/NAME         errors of --batches synthetic batches of --size rollouts, drawn without replacement from all of them:
                 (linear − true) / |true| on the same batch, as P. Saad's study defines it, with its estimators
                 (baseline `ema`, whole completions) and with ours (`position`, prefixes): mean and standard deviation
                 over all, and the standard deviation of the middle 98 %. `fresh` divides by the root mean square true
                 change of all updates on all rollouts instead, and is of the same batches' linear predictions less that
softmax/NAME     noise of rounding (`dynamics.precision`), the body in float32, the softmax in float32 or float64
"""

import argparse
from dataclasses import replace

import numpy as np
import torch

from _checkpoint import STEP, trained_run
from _result import finish
from tokencredit.dynamics.batch import prompts_of
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.measured import jackknifed
from tokencredit.dynamics.precision import expansion, rounding
from tokencredit.dynamics.reweighting import (
    PrefixTangents,
    at_rest,
    effective_sample_size,
    linear_change,
    reweighted,
    reweighted_sequences,
    slopes,
)
from tokencredit.dynamics.to_go import BASELINES
from tokencredit.dynamics.vectors import moved
from tokencredit.studies.entropy.measure import Evaluation, draw_update
from tokencredit.studies.entropy.question import Sizes
from tokencredit.studies.entropy.statistics import change

FACTORS = (1.0, 4.0, 16.0)
WAYS = ("prefixes", "completions")


def sums_of(evaluation, update):
    """Per rollout: {baseline: (S′, L′)}, and {factor: {way: (S, L)}} with effective sample sizes."""
    first = PrefixTangents(*evaluation.passes.forward(update.vector))
    entropy, mask = evaluation.entropy, evaluation.mask
    linear = {}
    for name in (*BASELINES, "ema"):
        parts = slopes(first, entropy, mask, evaluation.baseline(name))
        linear[name] = tuple(sum(getattr(p, key) for p in parts.values()).numpy() for key in ("entropy", "length"))
    rest, position, true, size = evaluation.passes.values()[0], evaluation.baseline("position"), {}, {}
    for factor in FACTORS:
        with moved(evaluation.passes.parameters, update.vector, factor):
            logprob, there = evaluation.passes.values()
        ratio = logprob - rest
        pair = reweighted(ratio, there, mask, position), reweighted_sequences(ratio, there, mask)
        true[factor] = {way: tuple(x.numpy() for x in each) for way, each in zip(WAYS, pair)}
        size[factor] = effective_sample_size(ratio, mask) / len(mask)
    return linear, true, size


def spread(x):
    low, high = np.quantile(x, [0.01, 0.99])
    middle = x[(x >= low) & (x <= high)]
    return {"mean": float(x.mean()), "sd": float(x.std(ddof=1)), "sd_of_middle": float(middle.std(ddof=1))}


def synthetic(rest, linear, true, rng, options):
    """[batches]: linear prediction and true change of batches of rollouts, from sums per rollout."""
    found = np.empty((options.batches, 2))
    for k in range(options.batches):
        rows = rng.choice(len(rest[0]), options.size, replace=False)
        s, n = (x[rows].sum() for x in rest)
        found[k] = (
            linear_change(s, n, *(x[rows].sum() for x in linear)),
            change(*(x[rows].sum() for x in true), s, n),
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("updates", 4), ("prompts", 2048), ("batches", 2000), ("size", 256), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    errors, truths, sizes, subs, noise = {}, {}, {}, {}, {}
    with trained_run(options.seed) as run:
        checkpoint = open_checkpoint(run, STEP)
        evaluation = Evaluation.of(checkpoint, prompts_of(checkpoint, options.prompts, 7), 8)
        rest = [x.numpy() for x in at_rest(evaluation.entropy, evaluation.mask)]
        prompt = np.arange(len(rest[0]))
        whole = []
        for k in range(options.updates):
            update = draw_update(checkpoint, Sizes(prompts=64), 100 + k)
            linear, true, size = sums_of(evaluation, update)
            for name, (slope, longer) in linear.items():
                measured = jackknifed(linear_change, [*rest, slope, longer], prompt)
                errors.setdefault(name, []).append(measured.error)
            for factor in FACTORS:
                for way in WAYS:
                    measured = jackknifed(change, [*true[factor][way], *rest], prompt)
                    truths.setdefault((factor, way), []).append(measured.error)
                sizes.setdefault(factor, []).append(size[factor])
            whole.append(change(*(x.sum() for x in true[1.0]["prefixes"]), *(x.sum() for x in rest)))
            for name, baseline, way in (("theirs", "ema", "completions"), ("ours", "position", "prefixes")):
                subs.setdefault(name, []).append(synthetic(rest, linear[baseline], true[1.0][way], rng, options))
        fine = open_checkpoint(run, STEP, dtype=torch.float64)
        few = evaluation.part(checkpoint, torch.arange(256))
        terms = expansion(fine, few.batch, few.baseline(), update.vector)
        for name, dtype in (("float32", None), ("float64", torch.float64)):
            own = replace(checkpoint, softmax=dtype)
            noise[name] = rounding(own, few.batch, few.baseline(), update.vector, terms).noise
    scale = float(np.sqrt(np.square(whole).mean()))
    rms = lambda x: float(np.sqrt(np.square(x).mean()))  # noqa: E731
    figures = {f"error/{name}": rms(x) / rms(errors["none"]) for name, x in errors.items()}
    for (factor, way), x in truths.items():
        figures[f"truth/{way}/{factor:g}"] = rms(x) / rms(truths[factor, "prefixes"])
    figures |= {f"size/{factor:g}": float(np.mean(x)) for factor, x in sizes.items()}
    for name, parts in subs.items():
        ratio = np.concatenate([(x[:, 0] - x[:, 1]) / np.abs(x[:, 1]) for x in parts])
        figures |= {f"sub/{name}/{key}": value for key, value in spread(ratio).items()}
        fresh = np.concatenate([(x[:, 0] - truth) / scale for x, truth in zip(parts, whole)])
        figures |= {f"fresh/{name}/{key}": value for key, value in spread(fresh).items()}
    figures |= {f"softmax/{name}": value for name, value in noise.items()}
    finish("entropy_estimators", {"figures": figures, "true_change": whole, "settings": vars(options)})


if __name__ == "__main__":
    main()
