"""Entropy and length of policies along a path θ(α), from the rollouts of the policy at α = 0, and their derivatives
there.

    S(α) = Σₜ ρ<t Hₜ(α) − (ρ≤t − ρ<t) bₜ        L(α) = Σₜ ρ<t − (ρ≤t − ρ<t) rₜ        H(α) = E[S(α)] / E[L(α)]

    ρ<t = Π_{k<t} π_α(yₖ|y<k) / π_0(yₖ|y<k)

A token's entropy is decided by its prefix, so the prefix's ratio weighs it and what comes later adds no noise; the
ratios' own sum normalises. The baselines (see `to_go`) are control variates of mean 0. S′(0) and L′(0) give the linear
prediction of `entropy`, S″ and L″ the quadratic one: prediction and reweighting are one functional, and differ by
nothing but the order of the expansion. Per-decision importance sampling: Precup et al. (2000); with baselines: Jiang
and Li (arXiv:1511.03722) eq. 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.to_go import Baseline, after, before
from tokencredit.dynamics.vectors import moved
from tokencredit.masked import zero_off

STEP = 0.1
"""Of the symmetric difference along a direction: its error is of second order, and the roundings of float32 stay
below 1e-5.
"""


class Sums(NamedTuple):
    """[B] each: a rollout's S and L, or a derivative of them."""

    entropy: Tensor
    length: Tensor


class PrefixTangents(NamedTuple):
    """[B, T] each: derivatives of log π and H of every token along a direction."""

    logprob: Tensor
    entropy: Tensor


def at_rest(entropy: Tensor, mask: Tensor) -> Sums:
    """S(0), L(0): entropy and tokens of every rollout."""
    return Sums(zero_off(entropy.double(), mask).sum(1), mask.double().sum(1))


def reweighted(log_ratio: Tensor, entropy: Tensor, mask: Tensor, baseline: Baseline) -> Sums:
    """S(α), L(α) from log π_α/π_0 and H(α) of every token [B, T]."""
    log_ratio = zero_off(log_ratio, mask)
    ratio = zero_off(before(log_ratio, mask).exp(), mask)
    step = zero_off(ratio * torch.expm1(log_ratio), mask)
    return Sums(
        (ratio * zero_off(entropy, mask) - step * baseline.entropy).sum(1), (ratio - step * baseline.length).sum(1)
    )


def reweighted_sequences(log_ratio: Tensor, entropy: Tensor, mask: Tensor, bound: float = 10.0) -> Sums:
    """w Σₜ Hₜ(α), w T of every rollout, w the ratio of its whole completion, its logarithm kept within ± `bound`: the
    self-normalised importance sampling of P. Saad, "Entropy Dynamics in Reinforcement Learning" (2025).

    What comes after a token weighs it too, which adds noise and nothing else.
    """
    w = zero_off(log_ratio, mask).sum(1).clamp(-bound, bound).exp()
    return Sums(w * zero_off(entropy, mask).sum(1), w * mask.double().sum(1))


def slopes(first: PrefixTangents, entropy: Tensor, mask: Tensor, baseline: Baseline) -> dict[str, Sums]:
    """S′(0), L′(0) in three parts: "direct" the tokens' own entropies, "path" the prefixes they are met at, "length"
    how many there are.
    """
    logprob, none = zero_off(first.logprob, mask), torch.zeros(len(mask), dtype=torch.float64)
    to_go = ((entropy, baseline.entropy), (mask, baseline.length))
    path, length = ((logprob * (after(x.double(), mask) - expected)).sum(1) for x, expected in to_go)
    return {
        "direct": Sums(zero_off(first.entropy, mask).sum(1), none),
        "path": Sums(path, none),
        "length": Sums(none, length),
    }


def curvatures(
    first: PrefixTangents, second: PrefixTangents, entropy: Tensor, mask: Tensor, baseline: Baseline
) -> Sums:
    """S″(0), L″(0). With c = Σ_{k<t} ∂log π and q = Σ_{k<t} ∂²log π + c²: ρ<t = 1 + α c + α² q/2 + …"""
    slope, bend, entropy = (zero_off(x, mask) for x in (first.logprob, second.logprob, entropy))
    so_far = before(slope, mask)
    q, step = before(bend, mask) + so_far.square(), bend + slope.square() + 2 * slope * so_far
    moving = zero_off(second.entropy + 2 * so_far * first.entropy, mask)
    return Sums(
        (moving + q * entropy - step * baseline.entropy).sum(1), (zero_off(q, mask) - step * baseline.length).sum(1)
    )


def linear_change(entropy, length, slope, longer):
    """H′ = (S′ − H L′) / L, from sums over rollouts: numbers or arrays."""
    return (slope - entropy / length * longer) / length


def quadratic_change(entropy, length, slope, longer, bend, bend_length):
    """H″/2 = (S″ − H L″ − 2 H′ L′) / 2L."""
    return (bend - entropy / length * bend_length - 2 * linear_change(entropy, length, slope, longer) * longer) / (
        2 * length
    )


def second_derivatives(passes: Passes, direction: Mapping[str, Tensor], step: float = STEP) -> PrefixTangents:
    """∂²log π, ∂²H [B, T] along a direction: the symmetric difference of two forward-mode passes at θ ± step · u.

    A second forward mode inside the first would be exact. Through SiLU, which most language models use, torch has one
    while it records gradients and none under `no_grad`; the passes here record none, to keep no graph.
    """
    ends = []
    for sign in (1, -1):
        with moved(passes.parameters, direction, sign * step):
            ends.append(passes.forward(direction))
    return PrefixTangents(*((plus - minus) / (2 * step) for plus, minus in zip(*ends)))


def effective_sample_size(log_ratio: Tensor, mask: Tensor) -> float:
    """(Σ w)² / Σ w² over rollouts, w the ratio of whole completions: how many of them still speak for the other
    policy.
    """
    total = zero_off(log_ratio, mask).sum(1)
    w = (total - total.max()).exp()
    return float(w.sum() ** 2 / w.square().sum())
