"""Weights that read a score one way where credit is positive and the other way where it is negative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokencredit.credit.transform import Transform
from tokencredit.rollouts import Rollouts


@dataclass(frozen=True)
class Amplify(Transform):
    """Praise louder and blame less where a score is high.

        cᵢₜ ← cᵢₜ · max(floor, base + up · xᵢₜ)       cᵢₜ > 0
              cᵢₜ · max(floor, base − down · xᵢₜ)     cᵢₜ < 0

    With x of 0 and 1 and up = down = α this is c + α |c| x. base = 1 and up = down = 0 is the identity; base = 0 leaves
    credit only where the score agrees with its sign, in proportion to it. floor = 0 keeps signs whatever x is; −inf
    bounds nothing, as TGDPO's weights are released. Source: HICRA (arXiv:2509.03646), in a third party's formula; TGDPO
    (arXiv:2506.14574), released code.

        Amplify("x", 0.2, 0.2)(credit, rollouts)     # credit 1, −1 where x is 1 -> 1.2, −0.8
    """

    score: str
    up: float = 0.2
    down: float = 0.2
    base: float = 1.0
    floor: float = 0.0
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign"})

    def __post_init__(self) -> None:
        if not self.floor >= 0:
            object.__setattr__(self, "laws", self.laws - {"keeps_sign"})

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        x = rollouts.score(self.score).to(credit.dtype)
        factor = torch.where(credit > 0, self.base + self.up * x, self.base - self.down * x)
        return credit * factor.clamp(min=self.floor)


@dataclass(frozen=True)
class Tilt(Transform):
    """Weights that grow exponentially with a score where credit is positive, and fall with it where it is negative.

        cᵢₜ ← cᵢₜ · exp(clip(xᵢₜ, low, high))        cᵢₜ > 0
              cᵢₜ · exp(−clip(xᵢₜ, low, high))       cᵢₜ < 0

    x = 0, or low = high = 0, is the identity. Source: TIS-DPO (arXiv:2410.04350), where x is a log-ratio of two
    policies, one trained to write what is chosen and one what is rejected; its bounds could not be checked.

        Tilt("x")(credit, rollouts)     # credit 1, −1, x 0.5 -> 1.649, −0.607
    """

    score: str
    low: float = -0.5
    high: float = 1.5
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign"})

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"Tilt needs low <= high, got low={self.low}, high={self.high}")

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        x = rollouts.score(self.score).to(credit.dtype).clamp(self.low, self.high)
        return credit * torch.where(credit > 0, x, -x).exp()
