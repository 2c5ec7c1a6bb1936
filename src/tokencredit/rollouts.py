"""Rollouts: the one batch type. Sampled completions, their verified rewards, and what was measured on their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tokencredit.masked import pool, wide, zero_off

TOKEN_REWARD = "token_reward"
"""The one score that a token may lack: what a dataset or a verifier gave it, or its turn, besides the outcome."""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """B completions of at most T tokens, in groups that share a prompt.

    reward         [B]    float   the verifier's number for each rollout, finite
    group          [B]    int     equal for rollouts of the same prompt; any integers, in any order
    mask           [B, T] bool    which positions are tokens of the completion that count (0/1 integers are accepted)
    scores         name -> [B, T] measured per token by the policy that sampled; finite on the mask, anything off it.
                   "token_reward" is the reward of a token besides the outcome, and may be NaN: no reward is none of 0
    success_above  a rollout is a success when its reward exceeds this: outcomes are kept apart from any length penalty

    Entropies are in nats, of the sampling distribution over the full vocabulary. Raises ValueError or TypeError naming
    the field and row.

    >>> mask = torch.ones(2, 3, dtype=torch.bool)
    >>> Rollouts(reward=torch.tensor([1.0, 0.0]), group=torch.tensor([0, 0]), mask=mask).success
    tensor([ True, False])
    """

    reward: Tensor
    group: Tensor
    mask: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    success_above: float = 0.0

    def __post_init__(self) -> None:
        for name in ("reward", "group", "mask"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(getattr(self, name)).__name__}")
        _check_mask(self)
        _check_rows(self)
        clean = {name: _clean_score(name, score, self.mask) for name, score in self.scores.items()}
        object.__setattr__(self, "scores", MappingProxyType(clean))

    def __len__(self) -> int:
        return len(self.reward)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"scores": dict(self.scores)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Rollouts.__init__(self, **state)

    @cached_property
    def success(self) -> Tensor:
        """[B] bool: which rollouts the verifier accepted."""
        return torch.gt(self.reward, self.success_above)

    @cached_property
    def length(self) -> Tensor:
        """[B] int: number of tokens of each rollout."""
        return self.mask.sum(1)

    @cached_property
    def group_index(self) -> Tensor:
        """[B] int: groups renumbered 0, 1, ..."""
        index: Tensor = torch.unique(self.group, return_inverse=True)[1]
        return index

    @cached_property
    def informative(self) -> Tensor:
        """[B] bool: rollouts of groups whose rewards are not all equal (a group of one is not informative)."""
        low, high = self.reward.new_full((2, len(self)), 0)
        low.scatter_reduce_(0, self.group_index, self.reward, "amin", include_self=False)
        high.scatter_reduce_(0, self.group_index, self.reward, "amax", include_self=False)
        return torch.gt(high, low)[self.group_index]

    @cached_property
    def mixed(self) -> Tensor:
        """[B] bool: rollouts of groups with both a success and a failure, 0 < |correct| < G."""
        wins = pool(self.success.long(), self.group_index)
        return (wins > 0) & (wins < pool(torch.ones_like(wins), self.group_index))

    @cached_property
    def comparable(self) -> Tensor:
        """[B] bool: rollouts of groups in which both a success and a failure have tokens."""
        alive = self.length > 0
        wins, losses = (pool((alive & side).long(), self.group_index) for side in (self.success, ~self.success))
        return (wins > 0) & (losses > 0)

    def index(self, scope: str) -> Tensor:
        """[B] int: the population of each rollout for statistics over `scope`: its "group", or 0 for the whole
        "batch".
        """
        return self.group_index if scope == "group" else torch.zeros_like(self.group_index)

    def score(self, name: str) -> Tensor:
        """[B, T]: a score, zero off the mask and where none was given. KeyError names what is missing and what is
        there.
        """
        score = self._score(name)
        return zero_off(score, self.given(name)) if name == TOKEN_REWARD else score

    def given(self, name: str) -> Tensor:
        """[B, T] bool: the tokens that have this score; all of the mask, but for a "token_reward"."""
        return self.mask & ~torch.isnan(self._score(name))

    @property
    def token_reward(self) -> Tensor:
        """[B, T]: the reward of each token or turn besides the outcome, NaN where none was given."""
        return self._score(TOKEN_REWARD).masked_fill(~self.mask, torch.nan)

    def _score(self, name: str) -> Tensor:
        if name not in self.scores:
            there = ", ".join(sorted(self.scores)) or "none"
            raise KeyError(
                f'this needs the score "{name}"; these rollouts have: {there}. Pass scores={{"{name}": [B, T]}}'
            )
        return self.scores[name]

    def rows(self, keep: Tensor) -> Rollouts:
        """The rollouts that `keep` ([B] bool or [K] int) selects, in order."""
        scores = {name: score[keep] for name, score in self.scores.items()}
        return replace(self, reward=self.reward[keep], group=self.group[keep], mask=self.mask[keep], scores=scores)


def _check_mask(rollouts: Rollouts) -> None:
    mask = rollouts.mask
    if mask.dim() != 2:
        raise ValueError(f"mask must be [B, T], got shape {list(mask.shape)}")
    if mask.dtype != torch.bool:
        if mask.is_floating_point() and not torch.isfinite(mask).all():
            raise ValueError("mask must be boolean or 0/1, got non-finite values")
        odd = ((mask != 0) & (mask != 1)).any(1)
        if odd.any():
            raise ValueError(f"mask must be boolean or 0/1: row {_first(odd)} holds other values")
        object.__setattr__(rollouts, "mask", mask.bool())


def _check_rows(rollouts: Rollouts) -> None:
    reward, group, mask = rollouts.reward, rollouts.group, rollouts.mask
    for name, x in (("reward", reward), ("group", group)):
        if x.shape != (len(mask),):
            raise ValueError(
                f"{name} must be [B] = [{len(mask)}] as the mask has {len(mask)} rows, got shape {list(x.shape)}"
            )
        if x.device != mask.device:
            raise ValueError(f"{name} is on {x.device} but mask is on {mask.device}: move them to one device")
    if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
        raise TypeError(f"group must hold integers, got {group.dtype}")
    if reward.is_complex():
        raise TypeError("reward must be real")
    object.__setattr__(rollouts, "reward", wide(reward.detach()))
    bad = ~torch.isfinite(rollouts.reward)
    if bad.any():
        row = _first(bad)
        raise ValueError(
            f"reward must be finite: row {row} has {rollouts.reward[row].item()}. Fix the verifier, or drop the row"
        )


def _clean_score(name: str, score: Tensor, mask: Tensor) -> Tensor:
    """Float32 or better, detached, finite on the mask and zero off it."""
    if not isinstance(score, Tensor):
        raise TypeError(f'score "{name}" must be a torch.Tensor, got {type(score).__name__}')
    if score.shape != mask.shape:
        raise ValueError(f'score "{name}" must be [B, T] = {list(mask.shape)}, got shape {list(score.shape)}')
    if score.device != mask.device:
        raise ValueError(f'score "{name}" is on {score.device} but mask is on {mask.device}: move them to one device')
    if score.is_complex():
        raise TypeError(f'score "{name}" must be real')
    score = zero_off(wide(score.detach()), mask)
    bad = torch.isinf(score) if name == TOKEN_REWARD else ~torch.isfinite(score)
    if bad.any():
        row, column = torch.nonzero(bad)[0].tolist()
        raise ValueError(
            f'score "{name}" must be finite on the mask: row {row}, token {column} has {score[row, column].item()}'
        )
    # A float32 entropy of a near-certain token can round to just below zero; anything lower is a mistake upstream.
    if name == "entropy":
        negative = score < -1e-4
        if negative.any():
            row, column = torch.nonzero(negative)[0].tolist()
            raise ValueError(
                f"entropy must be >= 0 nats: row {row}, token {column} has {score[row, column].item():.6g}"
            )
        score = score.clamp(min=0)
    return score


def _first(flags: Tensor) -> int:
    return int(torch.nonzero(flags)[0, 0])
