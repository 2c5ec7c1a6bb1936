"""What is cheap to know of a token beside what it does: which diagnostic predicts a token's part in the change of
entropy and of reward?

    covariance   (log π − mean)(c − mean)                    entropy mechanism (arXiv:2505.22617) eq. 10
    tabular      κ (p (log p + H) − Σᵥ pᵥ² (log pᵥ + H))
                                                  what the token's gradient does to the entropy of its own distribution

In the tabular picture every prefix has logits of its own: a step along −κ ∇_z log p moves them by −κ (e − p), and ∇_z H
= −p (log p + H). That is Theorem 1 of the entropy mechanism for one sample; its Theorem 2, for the natural gradient,
gives −covariance. In a network every token moves the distributions of all others too, and whether the picture still
says who lowers entropy is what is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tokencredit.agreement.ranks import spearman_matrix
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.dynamics.update import Update
from tokencredit.lm.readout import evaluating
from tokencredit.masked import pool_mean
from tokencredit.objective.covariance import covariance
from tokencredit.stats import Estimate, holm

CELLS = 1 << 22
"""Log-probabilities that are looked at together."""
COVARIANCE_GROUPS = {
    "top 0.2 %": (0.998, 1.0),
    "top 2 %": (0.98, 1.0),
    "top 20 %": (0.8, 1.0),
    "middle 60 %": (0.2, 0.8),
    "lowest 20 %": (0.0, 0.2),
}


def diagnostics(update: Update) -> dict[str, Tensor]:
    """{name: [B, T]} of the step's tokens, 0 off the mask."""
    rollouts = update.batch.rollouts
    logprob, mask = rollouts.score("logprob").double(), rollouts.mask
    rate = pool_mean(rollouts.success.double()[:, None], torch.ones_like(mask[:, :1]), rollouts.group_index)
    place = torch.arange(mask.shape[1], dtype=torch.float64).expand(mask.shape)
    found = {
        "surprisal": -logprob,
        "entropy": rollouts.score("entropy").double(),
        "credit": update.credit,
        "covariance": covariance(logprob, update.credit, mask),
        "tabular": own_context(update),
        "success rate": rate.expand(mask.shape),
        "position": place,
    }
    return {name: values.masked_fill(~mask, 0) for name, values in found.items()}


@torch.no_grad()
def own_context(update: Update) -> Tensor:
    """[B, T]: the first-order change of each token's own distribution's entropy under a plain gradient step of size 1,
    as if in a table.
    """
    passes = update.passes
    found = torch.zeros(len(passes.batch), dtype=torch.float64)
    with evaluating(passes.model):
        for part, keep in passes.parts(passes.tokens):
            hidden = passes.states(part)
            rows = max(CELLS // passes.readout.head.vocabulary(hidden), 1)
            for some in torch.arange(len(part)).split(rows):
                log_p = passes.readout.head.logits(hidden[some]).double().log_softmax(-1)
                p, floor = log_p.exp(), torch.finfo(log_p.dtype).min
                entropy = -(p * log_p.clamp_min(floor)).sum(1, keepdim=True)
                slope = p * (log_p.clamp_min(floor) + entropy)
                chosen = slope.gather(1, part.target[some][:, None].to(slope.device))[:, 0]
                found[keep[some].cpu()] = (chosen - (p * slope).sum(1)).cpu()
    return update.clip * update.coefficient * passes.grid(found)


def rank_correlations(
    columns: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], boot: Bootstrap
) -> dict[str, dict[str, dict]]:
    """{target: {diagnostic: {"estimate", "p", "holm"}}}: Spearman's correlation, intervals over prompts, Holm over the
    diagnostics.

    Of a target called "size of ..." the diagnostics are compared by their size as well.
    """
    found = {}
    for target, values in targets.items():
        sizes = target.startswith("size of")
        stack = np.stack([*(np.abs(x) if sizes else x for x in columns.values()), values])
        draws = spearman_matrix(stack, boot.weights)[:, :-1, -1]
        estimates = [boot.estimate(draws[:, k]) for k in range(len(columns))]
        p_values = [boot.p_value(draws[:, k]) if np.isfinite(each.low) else np.nan for k, each in enumerate(estimates)]
        found[target] = {
            name: {"estimate": each, "p": p, "holm": float(adjusted)}
            for name, each, p, adjusted in zip(columns, estimates, p_values, _holm(p_values))
        }
    return found


def _holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted over those that are defined: a diagnostic that is constant here was not tested."""
    p = np.array(p_values, float)
    known = np.isfinite(p)
    p[known] = holm(p[known])
    return p


def by_covariance(covariances: np.ndarray, share: np.ndarray, boot: Bootstrap) -> dict[str, dict[str, Estimate | int]]:
    """{group of tokens by covariance: {"tokens", "sum", "negative"}}: what they add to the change, and the part of them
    that lowers it.
    """
    order = np.argsort(np.argsort(covariances, kind="stable"), kind="stable") / len(covariances)
    groups = {name: (order >= low) & (order < high) for name, (low, high) in COVARIANCE_GROUPS.items()}
    groups |= {"above 0": covariances > 0, "below 0": covariances < 0}
    return {name: summed(share, inside, boot) for name, inside in groups.items() if inside.any()}


def summed(share: np.ndarray, inside: np.ndarray, boot: Bootstrap) -> dict[str, Estimate | int]:
    """Sum of the shares of some tokens, and the part of these tokens whose share is negative; intervals over the step's
    prompts.
    """
    count = boot.sums(inside.astype(float))
    negative = boot.sums(inside * (share < 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(count > 0, negative / count, np.nan)
    return {
        "tokens": int(inside.sum()),
        "sum": boot.estimate(boot.sums(inside * share)),
        "negative": boot.estimate(part),
    }


def agreement_in_sign(prediction: np.ndarray, share: np.ndarray, boot: Bootstrap) -> dict[str, Estimate]:
    """How often a prediction has the sign of what a token does: of tokens, and weighted by how much they do."""
    same = (np.sign(prediction) == np.sign(share)).astype(float)
    moving = ((share != 0) & (prediction != 0)).astype(float)
    ones, size = boot.sums(moving), boot.sums(moving * np.abs(share))
    heavy = boot.sums(moving * same * np.abs(share))
    return {"tokens": boot.estimate(boot.sums(moving * same) / ones), "weighted": boot.estimate(heavy / size)}
