"""What is still to come after a token, entropy and length, and baselines for it: functions of the prefix that cost no bias.

    none       0 from token t on, its own entropy and its own place included: G − b = Σ_{k≥t} Hₖ
    entropy    the token's own entropy: G − b = Σ_{k>t} Hₖ
    position   the mean over the rollouts of other prompts, of tokens at the same place
    ridge      a linear regression on the prefix's features, fitted on other prompts

"none" and "entropy" are those of P. Saad, "Entropy Dynamics in Reinforcement Learning" (2025), `none` and `Hk`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.masked import over, pool, zero_off
from tokencredit.rollouts import Rollouts

BASELINES = ("none", "entropy", "position", "ridge")
BINS = 64
FOLDS = 5
STRENGTH = 1e-3
"""Ridge penalty per token, for features of unit variance."""


class Baseline(NamedTuple):
    """[B, T] each: what is expected of the entropy and of the number of tokens after a token, before it is drawn."""

    entropy: Tensor
    length: Tensor


def after(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: Σ_{k>t} x over the row's tokens; 0 off the mask."""
    x = zero_off(x, mask)
    return zero_off(x.sum(1, keepdim=True) - x.cumsum(1), mask)


def baseline_of(rollouts: Rollouts, name: str, features: Tensor | None = None) -> Baseline:
    """A baseline by name. ValueError for another name, or features of another shape."""
    if name not in BASELINES:
        raise ValueError(f"{name!r} is not a baseline of what is to come; there are {', '.join(BASELINES)}")
    entropy, mask = rollouts.score("entropy").double(), rollouts.mask
    tokens = mask.double()
    if name == "none":
        return Baseline(-entropy, -tokens)
    if name == "entropy":
        return Baseline(torch.zeros_like(entropy), torch.zeros_like(entropy))
    targets = torch.stack([after(entropy, mask), after(tokens, mask)], -1)
    group, place = rollouts.group_index, places(mask)
    if name == "position":
        return Baseline(*others_mean(targets, mask, group, place).unbind(-1))
    return Baseline(*ridge(targets, mask, group, prefix_features(rollouts, features)).unbind(-1))


def places(mask: Tensor) -> Tensor:
    """[B, T]: the position of every token, in at most `BINS` bins."""
    width = mask.shape[1]
    return (torch.arange(width, device=mask.device) * min(width, BINS) // max(width, 1)).expand_as(mask)


def others_mean(targets: Tensor, mask: Tensor, group: Tensor, place: Tensor) -> Tensor:
    """[B, T, K]: mean of the targets over the tokens of other groups in the same bin; 0 where there are none."""
    bins = int(place.max()) + 1
    row = group[:, None].expand_as(mask)[mask]
    flat, here = torch.cat([targets[mask], targets.new_ones(len(row), 1)], 1), place[mask]
    whole, own = pool(flat, here), pool(flat, row * bins + here)
    rest = whole - own
    found = torch.zeros_like(targets)
    found[mask] = over(rest[:, :-1], rest[:, -1:].expand(-1, targets.shape[-1]))
    return found


def prefix_features(rollouts: Rollouts, given: Tensor | None = None) -> Tensor:
    """[B, T, F] known before the token is drawn: place, entropy, the mean entropy and log-prob of the tokens before, and what is given."""
    entropy, mask = rollouts.score("entropy").double(), rollouts.mask
    if given is not None and given.shape[:2] != mask.shape:
        raise ValueError(f"features are [B, T, F] with [B, T] = {list(mask.shape)}, got {list(given.shape)}")
    count = torch.arange(mask.shape[1], dtype=torch.float64, device=mask.device).expand_as(entropy)
    before = [over(x.cumsum(1) - x, count) for x in (entropy, rollouts.score("logprob").double())]
    last = torch.cat([torch.zeros_like(entropy[:, :1]), entropy[:, :-1]], 1)
    place = torch.nn.functional.one_hot(places(mask), int(places(mask).max()) + 1).double()
    columns = torch.stack([entropy, entropy.square(), last, *before], -1)
    interactions = columns[..., :1] * place
    parts = [place, columns, interactions] if given is None else [place, columns, interactions, given.double()]
    return torch.cat(parts, -1)


def ridge(targets: Tensor, mask: Tensor, group: Tensor, features: Tensor) -> Tensor:
    """[B, T, K]: predictions of the targets, every group's from a ridge regression on the groups of the other folds."""
    found, fold = torch.zeros_like(targets), (group % FOLDS)[:, None].expand_as(mask)[mask]
    x, y = features[mask], targets[mask]
    x = x / x.square().mean(0).sqrt().clamp_min(1e-12)
    out = torch.zeros_like(y)
    grams = [(x[fold == k].T @ x[fold == k], x[fold == k].T @ y[fold == k], int((fold == k).sum())) for k in range(FOLDS)]
    for k in range(FOLDS):
        gram, cross, count = (sum(part[i] for j, part in enumerate(grams) if j != k) for i in range(3))
        if count:
            penalty = STRENGTH * count * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            out[fold == k] = x[fold == k] @ torch.linalg.solve(gram + penalty, cross)
    found[mask] = out
    return found
