"""The sampler's log-probs against the trainer's, token by token: how far apart they are, where, and since when.

    d = log π_trainer − log π_sampler        K = mean (eᵈ − 1 − d), an estimate of KL(sampler ‖ trainer) that is never
                                             below 0 (Schulman, "Approximating KL divergence", k3)

Both are the log's; where it has the sampler's alone, the trainer is the checkpoint, and d holds staleness as well: what
the policy has moved since. Intervals are over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.agreement.ranks import share_of_top
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.stats import Estimate, mean_of_units
from tokencredit.studies.book import Book
from tokencredit.studies.inspect.audit import Audited
from tokencredit.studies.inspect.sample import LoggedStep
from tokencredit.studies.inspect.source import Missing

QUANTILES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
BEYOND = (1.2, 2.0, 10.0)
"""Factors by which probabilities are counted as apart."""
FIFTHS = 5
TOP = 0.02


def log_ratios(steps: Sequence[LoggedStep]) -> tuple[list[Tensor], str]:
    """([B, T] of every step, whose the trainer's log-probs are: "log" or "checkpoint"). Missing says what lacks."""
    sampler = [step.logged("sampler_logprob") for step in steps]
    if any(x is None for x in sampler):
        raise Missing(
            "the log has no log-probs of the sampler: columns sampler_logprob, inference_logprobs, logprobs or"
            " rollout_log_probs, a number per token; --column sampler_logprob=COLUMN names another"
        )
    trainer, whose = [step.logged("trainer_logprob") for step in steps], "log"
    if any(x is None for x in trainer):
        trainer, whose = [step.scores.get("logprob") for step in steps], "checkpoint"
    if any(x is None for x in trainer):
        raise Missing(
            "the log has the sampler's log-probs alone; the trainer's are those of a checkpoint: --model CKPT"
        )
    return [(a - b).masked_fill(~step.mask, 0) for a, b, step in zip(trainer, sampler, steps)], whose


def mismatch_block(
    steps: Sequence[LoggedStep],
    focus: LoggedStep,
    found: Sequence[Tensor],
    audited: Audited | None,
    book: Book,
    num: int,
    seed: int,
) -> dict[str, Any]:
    """Quantiles, shares beyond, by position, by step, and of tokens that decide. All but `by step` are of the focus."""
    d = next(own for own, step in zip(found, steps) if step is focus)
    mask = focus.mask
    flat = d[mask].numpy()
    group = focus.rollouts.group_index[:, None].expand_as(mask)[mask].numpy()
    boot, over = Bootstrap(group, num, seed), {"over": "prompts"}
    ratio, ones = np.exp(flat), np.ones_like(flat)

    def mean(name: str, x: np.ndarray, unit: str, where: np.ndarray | None = None) -> str:
        where = ones if where is None else where.astype(float)
        return book.enter(
            f"mismatch/{name}", boot.estimate(_ratio(boot.sums(x * where), boot.sums(where))), unit, **over
        )

    k3 = ratio - 1 - flat
    place = _place(mask)[mask].numpy()
    fifth = np.minimum((place * FIFTHS).astype(int), FIFTHS - 1)
    block: dict[str, Any] = {
        "tokens": len(flat),
        "prompts": boot.num_clusters,
        "quantiles": {f"{q:g}": float(x) for q, x in zip(QUANTILES, np.quantile(ratio, QUANTILES))},
        "kl": mean("KL", k3, "nats per token"),
        "shift": mean("mean log-ratio", flat, "nats per token"),
        "beyond": {
            f"{factor:g}": mean(f"beyond {factor:g}", (np.abs(flat) > np.log(factor)).astype(float), "share of tokens")
            for factor in BEYOND
        },
        "position": [
            mean(f"KL in fifth {k + 1}", k3, "nats per token", fifth == k) for k in range(FIFTHS) if (fifth == k).any()
        ],
        "concentration": book.enter(
            "mismatch/top 2 %",
            boot.estimate(share_of_top(k3, k3, TOP, boot.weights, per_token=False)),
            "share of KL",
            **over,
        ),
        "sequences": _effective(d.sum(1).numpy()),
        "steps": [
            {
                "step": step.step,
                "figure": book.enter(f"mismatch/KL at step {step.step}", each, "nats per token", **over),
            }
            for step, own in zip(steps, found)
            if (each := _kl(step, own)) is not None
        ],
        "pivotal": None,
    }
    if audited is not None:
        block["pivotal"] = _pivotal(audited, d, book, num, seed)
    return block


def _kl(step: LoggedStep, d: Tensor) -> Estimate | None:
    """KL per token by group."""
    if not len(step):
        return None
    k3 = (d.exp() - 1 - d).masked_fill(~step.mask, 0).sum(1)
    group = step.rollouts.group_index.numpy()
    top, tokens = (np.bincount(group, x.double().numpy()) for x in (k3, step.mask.sum(1)))
    return mean_of_units(top[tokens > 0] / tokens[tokens > 0])


def _pivotal(audited: Audited, d: Tensor, book: Book, num: int, seed: int) -> str | None:
    """What the 20 % of tokens that are furthest apart hold of Σ (Q − V)²; None where that is not resolved."""
    boot = Bootstrap(audited.prompt, num, seed)
    total = boot.estimate(boot.sums(audited.square))
    if not total.low > 0:
        return None
    draws = share_of_top(np.abs(audited.along(d)), audited.square, 0.2, boot.weights, per_token=False)
    return book.enter("mismatch/reached", boot.estimate(draws), "share of Σ (Q − V)²", over="prompts")


def _effective(log_weight: np.ndarray) -> float:
    """(Σ w)² / (n Σ w²) of sequence weights: the share of the rollouts that reweighting them leaves."""
    w = np.exp(log_weight - log_weight.max())
    return float(w.sum() ** 2 / (len(w) * (w**2).sum()))


def _place(mask: Tensor) -> Tensor:
    count = mask.cumsum(1).double()
    return (count - 1) / count[:, -1:].clamp(min=1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def excess_surprisal(step: LoggedStep) -> Estimate | None:
    """Mean −log π − H of the tokens under the checkpoint, by group: 0 where it is the policy that wrote them, since a
    sample's surprisal is the entropy on average. None without the checkpoint's scores, or with two groups or fewer.
    """
    if not {"logprob", "entropy"} <= step.scores.keys() or step.num_prompts < 3:
        return None
    gap = torch.where(step.mask, -step.scores["logprob"] - step.scores["entropy"], 0.0).sum(1)
    group = step.rollouts.group_index.numpy()
    top, tokens = (np.bincount(group, x.double().numpy()) for x in (gap, step.mask.sum(1)))
    return mean_of_units(top[tokens > 0] / tokens[tokens > 0])
