"""The entropy of the moved policy, measured in ways that are never mixed: by reweighting rollouts of the old one, and
by sampling it.

Reweighted rollouts may be the ones that a prediction was made on (its noise is theirs too: agreement there says nothing
about the noise) or independent ones. Fresh samples of the moved policy assume nothing; with the uniforms of the old
policy's they differ from its rollouts only where the policies do, and the difference keeps little of the noise. H(θ +
ηv) − H(θ) holds the curvature, the odd half-difference (H(θ + ηv) − H(θ − ηv)) / 2 does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.reweighting import Sums, effective_sample_size, reweighted
from tokencredit.dynamics.to_go import Baseline
from tokencredit.dynamics.vectors import moved
from tokencredit.lm.distribution import Settings, seed_of
from tokencredit.lm.sampling import Request, Trace

COLLAPSED = 0.1
"""Share of the rollouts below which an effective sample size is called collapsed."""


def by_reweighting(
    passes: Passes,
    rest: tuple[Tensor, Tensor],
    mask: Tensor,
    baseline: Baseline,
    direction: Mapping[str, Tensor],
    factor: float,
) -> tuple[Sums, float]:
    """(S, L of every rollout at θ + factor · u, effective sample size); `rest` are passes.values() at θ, so that
    roundings cancel.
    """
    with moved(passes.parameters, direction, factor):
        logprob, entropy = passes.values()
    log_ratio = logprob - rest[0]
    return reweighted(log_ratio, entropy, mask, baseline), effective_sample_size(log_ratio, mask)


def by_sampling(checkpoint: Checkpoint, rows: Sequence[Mapping], num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(entropy, tokens) [P] summed over `num` fresh completions of every row, by the model as it is now.

    Equal seeds give equal uniforms to the k-th completion of a row, whatever the policy: common random numbers.
    """
    prompts = checkpoint.policy.encode_rows(rows)
    sampler = checkpoint.policy.sampler(settings=Settings(checkpoint.temperature))
    requests = [
        Request(i, 0, checkpoint.max_new_tokens, seed_of(seed, i, k)) for i in range(len(rows)) for k in range(num)
    ]
    entropy, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    for index, rollout in sampler.continue_([Trace(tuple(prompt)) for prompt in prompts], requests):
        entropy[index // num] += sum(rollout.entropy)
        tokens[index // num] += len(rollout.ids)
    return entropy, tokens
