"""Does the explicit Fisher kernel predict what a real step does to held-out log-probs? R² by learning rate, on several
batches of a run.

The prediction is −f s K κ with the exact kernel of all tokens that have credit, plus momentum and decay by a forward
pass; R² is of the prediction as it stands, of the whole change and, `r2_fresh`, of what is left of it without momentum
and decay. Against the latter two mistakes: P⁻² for P⁻¹, and D without its bias correction. And how much of the tokens'
predicted change their own terms make.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from _checkpoint import STEP, trained_run
from _result import finish
from tokencredit.dynamics.checkpoint import open_checkpoint
from tokencredit.dynamics.influence import r2, r2_over_prompts, slope
from tokencredit.dynamics.kernel import of_update
from tokencredit.dynamics.kernel_shares import SharedChange, share_figures
from tokencredit.dynamics.vectors import scaled
from tokencredit.stages import Stages
from tokencredit.studies.kernel.measurement import at_units, measure
from tokencredit.studies.kernel.question import KernelConfig

SMALL = 0.03
LISTED = ("r2_fresh", "r2_p2", "r2_p2_rescaled", "r2_uncorrected", "slope", "gap", "senders", "seconds")


def mistakes(checkpoint, m, real: np.ndarray) -> dict[str, float]:
    """R² of the batch's own part [N'] at the small rate, from P⁻², as it is and at the scale that fits best, and from D
    uncorrected.
    """
    optimizer, passes = checkpoint.optimizer, m.held_batch.passes(checkpoint)
    inverse = of_update(m.update, optimizer).inverse
    uncorrected = {}
    for name, x in inverse.items():
        rule, t = optimizer.rules[name], optimizer.moments[name].step + 1
        uncorrected[name] = 1 / ((1 / x - rule.eps) * (1 - rule.betas[1] ** t) ** 0.5 + rule.eps) / x
    wrong = {"r2_p2": inverse, "r2_uncorrected": uncorrected}
    found = {
        name: SMALL * at_units(passes.forward(scaled(m.update.fresh, factor))[0], m.held_units)
        for name, factor in wrong.items()
    }
    rescaled = found["r2_p2"] * slope(real, found["r2_p2"])
    return {name: r2(real, x) for name, x in found.items()} | {"r2_p2_rescaled": r2(real, rescaled)}


def one_batch(checkpoint, seed: int) -> dict:
    config = KernelConfig(checkpoint=STEP, seed=seed, level="tokens", prompts=64, group=8, held_out=64)
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        m = measure(checkpoint, config, Stages(Path(folder)))
    seconds = time.perf_counter() - began
    through, carried = m.cross.sum(1).numpy(), m.held["all"] - m.held["fresh"]
    real = m.held["real"][config.factors.index(SMALL)]
    rates = {
        f"{factor:g}": r2(each, factor * (through + carried)) for factor, each in zip(config.factors, m.held["real"])
    }
    shares = share_figures(SharedChange.of(m.own, m.units), at_units(-m.update.coefficient, m.units))
    return {
        "estimate": r2_over_prompts(real, SMALL * (through + carried), m.held_units.prompt),
        "rates": rates,
        "r2_fresh": r2(real - SMALL * carried, SMALL * through),
        "slope": slope(real, SMALL * (through + carried)),
        "gap": float(np.abs(through - m.held["fresh"]).max() / np.abs(m.held["fresh"]).max()),
        "shares": shares,
        "senders": len(m.units),
        "seconds": seconds,
        **mistakes(checkpoint, m, real - SMALL * carried),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=3, help="seeds of the batches (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with trained_run() as run:
        checkpoint = open_checkpoint(run, STEP)
        found = [one_batch(checkpoint, seed) for seed in range(args.batches)]
    first = found[0]["estimate"]
    figures = {
        "r2": first.value,
        "r2_low": first.low,
        "r2_high": first.high,
        "r2_lowest": min(each["estimate"].value for each in found),
        "rate": SMALL,
        "r2_by_rate": {rate: [each["rates"][rate] for each in found] for rate in found[0]["rates"]},
    }
    figures |= {name: [each[name] for each in found] for name in LISTED}
    for name, word in (
        ("share/own", "diagonal_share"),
        ("token/own", "diagonal_share_of_pushes"),
        ("sign/own", "moves_as_own_term_says"),
        ("correlation/credit", "correlation_with_credit"),
    ):
        figures[word] = [[getattr(each["shares"][name], end) for end in ("value", "low", "high")] for each in found]
    finish("kernel_influence", {**figures, "batches": args.batches, "seed": 0, "checkpoint": STEP})


if __name__ == "__main__":
    main()
