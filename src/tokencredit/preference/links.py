"""Links: the loss of a pair, of its margin. f [P] of m [P], to be minimised; f' is what gates the pair's gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Link:
    """margin [P] -> loss [P]. Subclass it as a frozen dataclass and write `loss`."""

    def loss(self, margin: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define loss(self, margin)")


@dataclass(frozen=True)
class Logistic(Link):
    """f(m) = −(1 − ε) log σ(m − γ) − ε log σ(γ − m)          ε: `smoothing`, γ: `gamma`

    Source: DPO (arXiv:2305.18290) eq. 7; γ: SimPO (arXiv:2405.14734); ε: conservative DPO, labels that are wrong with
    probability ε.
    """

    gamma: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"Logistic.smoothing must be in [0, 0.5), got {self.smoothing}")

    def loss(self, margin: Tensor) -> Tensor:
        m = margin - self.gamma
        return -(1 - self.smoothing) * logsigmoid(m) - self.smoothing * logsigmoid(-m)


@dataclass(frozen=True)
class Squared(Link):
    """f(m) = (m − ½)²: IPO (arXiv:2310.12036) eq. 17 times β², with the margin in units of β."""

    def loss(self, margin: Tensor) -> Tensor:
        return (margin - 0.5).square()


@dataclass(frozen=True)
class Hinge(Link):
    """f(m) = max(0, 1 − m): SLiC (arXiv:2305.10425), with the margin in units of β."""

    def loss(self, margin: Tensor) -> Tensor:
        return (1 - margin).clamp(min=0)
