"""What is still to come after a token, entropy and length, and baselines for it: functions of the prefix that cost no
bias.

    none       0 from token t on, its own entropy and its own place included: G − b = Σ_{k≥t} Hₖ
    entropy    the token's own entropy: G − b = Σ_{k>t} Hₖ
    position   the mean over the rollouts of other prompts, of tokens at the same place
    ridge      that, and a linear regression of what is left on what the prefix shows, fitted on other prompts: entropy
               here and before, log-prob before, and the hidden state that the token is drawn from where it is given

    ema        an exponential moving average, with memory 0.9, over the rollouts of the prompts before in the batch, of
               tokens at the same place; 0 before the first

"ema", "none" and "entropy" are those of P. Saad, "Entropy Dynamics in Reinforcement Learning" (2025): `hk_ema`, `none`
and `Hk`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tokencredit.dynamics.passes import Passes
from tokencredit.lm.readout import evaluating
from tokencredit.masked import over, pool, zero_off
from tokencredit.rollouts import Rollouts

BASELINES = ("none", "entropy", "position", "ridge")
"""Those that the study of predicted and true change compares."""
MEMORY = 0.9
BINS = 64
FOLDS = 5
WIDTH = 64
"""Columns that hidden states are projected to where they have more."""


class Baseline(NamedTuple):
    """[B, T] each: what is expected of the entropy and of the number of tokens after a token, before it is drawn."""

    entropy: Tensor
    length: Tensor


def before(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: Σ_{k<t} x over the row's tokens; 0 off the mask."""
    x = zero_off(x, mask)
    return zero_off(x.cumsum(1) - x, mask)


def after(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: Σ_{k>t} x over the row's tokens; 0 off the mask."""
    x = zero_off(x, mask)
    return zero_off(x.sum(1, keepdim=True) - x.cumsum(1), mask)


def baseline_of(rollouts: Rollouts, name: str, features: Tensor | None = None) -> Baseline:
    """A baseline by name. features [B, T, F]: more for "ridge" to look at, such as `hidden_states`. ValueError for what
    does not fit.
    """
    if name not in (*BASELINES, "ema"):
        raise ValueError(f"{name!r} is not a baseline of what is to come; there are {', '.join(BASELINES)}, ema")
    entropy, mask = rollouts.score("entropy").double(), rollouts.mask
    tokens = mask.double()
    if name == "none":
        return Baseline(-entropy, -tokens)
    if name == "entropy":
        return Baseline(torch.zeros_like(entropy), torch.zeros_like(entropy))
    if features is not None and features.shape[:2] != mask.shape:
        raise ValueError(f"features are [B, T, F] with [B, T] = {list(mask.shape)}, got {list(features.shape)}")
    targets, group = torch.stack([after(entropy, mask), after(tokens, mask)], -1), rollouts.group_index
    if name == "ema":
        return Baseline(*moving_average(targets, mask, group, places(mask)).unbind(-1))
    expected = others_mean(targets, mask, group, places(mask))
    if name == "ridge":
        place = one_hot(places(mask)[mask], int(places(mask).max()) + 1).double()
        expected[mask] += ridge(
            targets[mask], group[:, None].expand_as(mask)[mask], place, prefix_features(rollouts, features)
        )
    return Baseline(*expected.unbind(-1))


def places(mask: Tensor) -> Tensor:
    """[B, T]: the position of every token, in at most `BINS` bins."""
    width = mask.shape[1]
    return (torch.arange(width, device=mask.device) * min(width, BINS) // max(width, 1)).expand_as(mask)


def others_mean(targets: Tensor, mask: Tensor, group: Tensor, place: Tensor) -> Tensor:
    """[B, T, K]: mean of the targets over the tokens of other groups in the same bin; 0 where there are none."""
    bins = int(place.max()) + 1
    row = group[:, None].expand_as(mask)[mask]
    flat, here = torch.cat([targets[mask], targets.new_ones(len(row), 1)], 1), place[mask]
    rest = pool(flat, here) - pool(flat, row * bins + here)
    found = torch.zeros_like(targets)
    found[mask] = over(rest[:, :-1], rest[:, -1:].expand(-1, targets.shape[-1]))
    return found


def moving_average(targets: Tensor, mask: Tensor, group: Tensor, place: Tensor) -> Tensor:
    """[B, T, K]: the average of the targets in the same bin over the groups before, in the order of their numbers; a
    group moves those of its bins by 1 − `MEMORY` towards its own mean.
    """
    bins = int(place.max()) + 1
    average, found = targets.new_zeros(bins, targets.shape[-1]), torch.zeros_like(targets)
    for number in range(int(group.max()) + 1):
        own = mask & (group == number)[:, None]
        here = place[own]
        found[own] = average[here]
        values = torch.cat([targets[own], targets.new_ones(len(here), 1)], 1)
        sums = targets.new_zeros(bins, values.shape[1]).index_add_(0, here, values)
        there = sums[:, -1] > 0
        mean = sums[there, :-1] / sums[there, -1:]
        average[there] += (1 - MEMORY) * (mean - average[there])
    return found


def prefix_features(rollouts: Rollouts, more: Tensor | None = None) -> Tensor:
    """[N, F] known before each of the N tokens is drawn: its entropy, entropy and log-prob of the tokens before, its
    place; and `more`.
    """
    entropy, mask = rollouts.score("entropy").double(), rollouts.mask
    count = before(torch.ones_like(entropy), mask)
    means = [over(before(x, mask), count) for x in (entropy, rollouts.score("logprob").double())]
    last = torch.cat([torch.zeros_like(entropy[:, :1]), entropy[:, :-1]], 1)
    columns = torch.stack([entropy, entropy.square(), entropy * count, last, *means], -1)[mask]
    return columns if more is None else torch.cat([columns, more[mask].double()], -1)


def ridge(targets: Tensor, group: Tensor, place: Tensor, features: Tensor) -> Tensor:
    """[N, K]: what features [N, F] say of the targets [N, K] beyond their mean at a place [N, P] (one-hot), every
    group's from a ridge regression on the groups of the other folds, with these folds' own means.

    The penalty is 10 F tokens for each feature, at its mean square: with few tokens little is left of the coefficients.
    """
    fold, found = group % FOLDS, torch.zeros_like(targets)
    for k in range(FOLDS):
        some, others = fold == k, fold != k
        if some.any() and others.any():
            x, y, at = features[others], targets[others], place[others]
            left = y - at @ over(at.T @ y, at.sum(0)[:, None].expand(-1, y.shape[1]))
            gram = x.T @ x
            penalty = 10 * x.shape[1] / len(x) * gram.diagonal() + 1e-9
            found[some] = features[some] @ torch.linalg.solve(gram + penalty.diag(), x.T @ left)
    return found


def hidden_states(passes: Passes) -> Tensor:
    """[B, T, F]: the hidden state that every token is drawn from; wider ones than `WIDTH` are projected to it at
    random, always alike.
    """
    found = None
    with torch.no_grad(), evaluating(passes.model):
        for part, keep in passes.batch.chunks(passes.tokens):
            hidden = passes.readout.hidden(part.ids, part.attention)[part.row, part.position].float().cpu()
            if hidden.shape[1] > WIDTH:
                generator = torch.Generator().manual_seed(0)
                hidden = hidden @ torch.randn(hidden.shape[1], WIDTH, generator=generator)
            found = hidden.new_zeros(len(passes.batch), hidden.shape[1]) if found is None else found
            found[keep.cpu()] = hidden
    grid = found.new_zeros(passes.num_rows, passes.width, found.shape[1])
    grid[tuple(x.cpu() for x in passes.place)] = found
    return grid
