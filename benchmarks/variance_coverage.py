"""How often the variance study's intervals hold the true value: samples drawn from a world that is enumerated."""

import math

import numpy as np
import torch

from _result import finish
from tokencredit.methods import METHODS
from tokencredit.studies.variance.estimators import (
    GradientMoments,
    exact_figures_of,
    figures_of,
    interval,
    statistics_of,
)
from tokencredit.studies.variance.exact import Law, World

SAMPLES = {40: 300, 128: 300, 384: 200}
FIGURES = ("relative_variance", "cosine", "truth_cosine", "mse", "length", "ess_variance", "between_prompts")
OWN, BASE, TRUTH = "ptw_entropy", "grpo", "rloo"


def plain(own: GradientMoments, base: GradientMoments) -> dict:
    """The jackknife interval of the cosines themselves, for comparison."""
    found = statistics_of(own, base, 64)
    return {f"{name}, plain jackknife": interval(found[name]) for name in ("cosine", "truth_cosine")}


def main() -> None:
    torch.set_num_threads(1)
    world = World()
    methods = {name: METHODS[name].within(64) for name in (OWN, BASE, TRUTH)}
    estimators = {name: world.estimator(method) for name, method in methods.items()}
    exact = {name: estimators[name].moments(estimators[BASE], world) for name in (OWN, BASE)}
    known = exact_figures_of(exact[OWN], exact[BASE], 64)
    law, held = Law.of(world, list(methods.values())), {}
    for prompts, samples in SAMPLES.items():
        for seed in range(samples):
            own, base = law.sample(OWN, BASE, TRUTH, prompts, seed)
            found = {name: figures_of(own, base, 64)[name] for name in FIGURES} | plain(own, base)
            for name, estimate in found.items():
                if not math.isnan(estimate.value):
                    held.setdefault(f"{name}, {prompts} prompts", []).append(
                        estimate.low <= known[name.split(",")[0]] <= estimate.high
                    )
    coverage = {name: {"value": float(np.mean(each)), "num": len(each)} for name, each in held.items()}
    finish("variance_coverage", {"coverage": coverage, "true": {name: known[name] for name in FIGURES}})


if __name__ == "__main__":
    main()
