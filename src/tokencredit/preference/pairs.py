"""Pairs: the batch type of preference learning, two rollouts of one prompt, the better one first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tokencredit.masked import wide
from tokencredit.rollouts import Rollouts


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs in 2P rows of at most T tokens: all the chosen completions, then the rejected ones in the same order.

    mask    [2P, T] bool    which positions are tokens of the completion that count
    scores  name -> [2P, T] measured per token, of the reference or another frozen policy: a score of the policy in
            training would change the objective while it is optimised
    weight  [P] float >= 0  how much each pair counts; None: all alike

    `rollouts` are the same rows as rollouts, with rewards 1 and −1 and each pair a group: what a chain of transforms
    reads. Raises ValueError or TypeError naming the field.
    """

    mask: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None

    def __post_init__(self):
        if self.mask.dim() != 2 or len(self.mask) % 2:
            raise ValueError(f"mask must be [2P, T], chosen rows before rejected ones; got {list(self.mask.shape)}")
        weight = wide(self.weights.detach())
        if weight.shape != (len(self),):
            raise ValueError(f"weight must be [P] = [{len(self)}], got shape {list(weight.shape)}")
        if not (torch.isfinite(weight) & (weight >= 0)).all():
            raise ValueError("weight must be finite and not negative: drop a pair by weight 0")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "scores", self.rollouts.scores)
        object.__setattr__(self, "mask", self.rollouts.mask)

    def __len__(self) -> int:
        return len(self.mask) // 2

    @property
    def weights(self) -> Tensor:
        """[P]: how much each pair counts, 1 where nothing else was said."""
        return torch.ones(len(self), device=self.mask.device) if self.weight is None else self.weight

    @cached_property
    def rollouts(self) -> Rollouts:
        dtype = next((score.dtype for score in self.scores.values()), torch.float32)
        ones = torch.ones(len(self), dtype=dtype if dtype == torch.float64 else torch.float32, device=self.mask.device)
        group = torch.arange(len(self), device=self.mask.device).repeat(2)
        return Rollouts(reward=torch.cat([ones, -ones]), group=group, mask=self.mask, scores=self.scores)

    def pairs(self, keep: Tensor) -> Pairs:
        """The pairs that `keep` ([P] bool or [K] int) selects, in order."""
        rows = torch.arange(len(self), device=self.mask.device)[keep]
        rows = torch.cat([rows, rows + len(self)])
        scores = {name: score[rows] for name, score in self.scores.items()}
        return Pairs(self.mask[rows], scores, self.weights[keep])


def behind_common_prefix(ids: Tensor, mask: Tensor) -> Tensor:
    """[2P, T] bool: the mask without the tokens that both completions of a pair begin with.

    With equal weights on both sides those cancel in the margin; weights that are normalised row by row differ on them,
    and train the common prefix. `ids` [2P, T] are the completions' tokens, from the first column on.
    """
    num = len(mask) // 2
    alike = (ids[:num] == ids[num:]) & mask[:num] & mask[num:]
    return mask & ~alike.long().cumprod(1).bool().repeat(2, 1)
