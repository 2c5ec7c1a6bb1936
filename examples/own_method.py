"""A method of your own: one dataclass, held to its laws, then a loss with its gradient. Torch and hypothesis alone.

python examples/own_method.py
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import tokencredit as tc


@dataclass(frozen=True)
class FirstPart(tc.Transform):
    """Only the first part of a rollout keeps its credit: cᵢₜ ← cᵢₜ · 1[t ≤ fraction · |oᵢ|]."""

    fraction: float = 0.5
    laws: ClassVar[frozenset[str]] = frozenset({"row_local", "group_local", "keeps_sign", "idempotent"})

    def apply(self, credit, rollouts):
        position = rollouts.mask.cumsum(1)
        return torch.where(position <= self.fraction * rollouts.length[:, None], credit, 0)


grpo = tc.METHODS["grpo"]
first_part = grpo.replace(name="first_part", chain=tc.Chain(*grpo.chain.parts, FirstPart()))

if __name__ == "__main__":
    tc.check_laws(FirstPart())
    tc.check_method(first_part)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rollouts = tc.Rollouts(reward=torch.tensor([1.0, 0.0]), group=torch.tensor([7, 7]), mask=mask)
    credit = first_part.credit(rollouts)
    old = torch.full((2, 4), -1.0)
    logprob = old.clone().requires_grad_()
    loss, stats = first_part.loss(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts)
    loss.backward()
    print("credit", credit, "gradient", logprob.grad, sep="\n")
