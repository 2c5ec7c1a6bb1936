"""Cheap stand-ins for the norm of a token's gradient: the Fisher information's diagonal over the LM head, and others.

    python benchmarks/fisher_diagonal.py [--prompts 48] [--samples 2]

Spearman's correlation over tokens with the exact norm of ∇log π over all parameters, on completions of the shipped
model: `head_fisher` (the trace over the head, of the distribution and not of the token), `fisher_trace` (over all
parameters, sketched), `head_norm`, `surprisal` and `entropy`; and each less `head_fisher` on the same draws of prompts.
Intervals are by prompt.
"""

import argparse

import numpy as np
import torch

from _result import finish
from tokencredit.agreement.ranks import spearman_matrix
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.figure import Figure
from tokencredit.lm.policy import PolicyConfig
from tokencredit.scores.measure import measure

NAMES = ("head_fisher", "fisher_trace", "head_norm", "surprisal", "entropy")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--samples", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = PolicyConfig().settled().open()
    rows = policy.task.rows("test", options.prompts, 0)
    prompts = policy.encode_rows(rows)
    each = [(i, c.ids) for i, some in enumerate(policy.complete(prompts, options.samples, seed=0)) for c in some]
    asked = [list(prompts[i]) for i, _ in each], [list(ids) for _, ids in each]
    found = measure(policy, [rows[i] for i, _ in each], *asked, ["gradient_norm"], importance={"method": "exact"})
    found |= measure(policy, [rows[i] for i, _ in each], *asked, NAMES, importance={"num_directions": 16})
    columns = np.stack(
        [np.concatenate([x.double().numpy() for x in found[name]]) for name in ("gradient_norm", *NAMES)]
    )
    bootstrap = Bootstrap(np.repeat([i for i, _ in each], [len(ids) for _, ids in each]), 300)
    draws = dict(zip(NAMES, spearman_matrix(columns, bootstrap.weights)[:, 0, 1:].T))
    figures = {
        f"spearman/{name}": Figure.of(bootstrap.estimate(x), "correlation").as_json() for name, x in draws.items()
    }
    for name in NAMES[1:]:
        difference = bootstrap.estimate(draws[name] - draws["head_fisher"])
        figures[f"{name} less head_fisher"] = Figure.of(difference, "correlation").as_json()
    finish("fisher_diagonal", {"figures": figures, "tokens": columns.shape[1], "settings": vars(options)})


if __name__ == "__main__":
    main()
