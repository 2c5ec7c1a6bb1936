"""GRPO's KL-regularised problem on an exact world, solved without sampling: every completion counts by its
probability.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from tokencredit.tasks.exact import TabularPolicy
from tokencredit.theory.rows import SMALL

CLIP = 0.2
Gain = Callable[[float], float]
"""Success probability -> Δ, the credit of a success less that of a failure."""


class Solver:
    """A softmax table over the small world that moves from one iteration's optimum to the next; it starts at its
    reference.
    """

    def __init__(self, seed: int = 1) -> None:
        self.policy = TabularPolicy(SMALL, seed=seed)
        with torch.no_grad():
            _, _, self.reference, self.reward = SMALL.enumerate(self.policy).completions

    def chances(self) -> Tensor:
        """[N]: probabilities of all completions, differentiable."""
        return SMALL.enumerate(self.policy).completions[2]

    @property
    def success(self) -> float:
        with torch.no_grad():
            return float(self.chances() @ self.reward)

    def objective(
        self, chance: Tensor, old: Tensor, gain: Gain, beta: float, clip: float = inf, mirror: float = 0.0
    ) -> Tensor:
        """E_old[min(w A, clip(w) A)] − β KL(π ‖ π_ref) − `mirror` KL(π ‖ old), w = π / old, A = Δ (r − p) of old."""
        p = float(old @ self.reward)
        advantage = gain(p) * (self.reward - p)
        earned = torch.minimum(chance * advantage, (chance / old).clamp(1 - clip, 1 + clip) * old * advantage)
        apart = (chance * (chance / self.reference).log()).sum(), (chance * (chance / old).log()).sum()
        return earned.sum() - beta * apart[0] - mirror * apart[1]

    def solve(self, gain: Gain, beta: float, mirror: float = 0.0) -> None:
        """Moves the policy to the maximum without clipping."""
        old = self.chances().detach()
        optimizer = torch.optim.LBFGS(
            self.policy.parameters(),
            max_iter=150,
            history_size=30,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-10,
            tolerance_change=1e-15,
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -self.objective(self.chances(), old, gain, beta, mirror=mirror)
            loss.backward()
            return loss

        optimizer.step(closure)

    def ascend(self, gain: Gain, beta: float, clip: float = CLIP, steps: int = 250) -> None:
        """Climbs the clipped objective, which has kinks: Adam with a step size that falls to 0."""
        old = self.chances().detach()
        optimizer = torch.optim.Adam(self.policy.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (1 - done / steps) ** 2)
        for _ in range(steps):
            optimizer.zero_grad()
            (-self.objective(self.chances(), old, gain, beta, clip)).backward()
            optimizer.step()
            schedule.step()

    def one_step(self, gain: Gain, beta: float, rate: float = 1.0) -> None:
        """One step of plain gradient ascent."""
        old = self.chances().detach()
        gradient = torch.autograd.grad(self.objective(self.chances(), old, gain, beta), list(self.policy.parameters()))
        with torch.no_grad():
            for table, slope in zip(self.policy.parameters(), gradient):
                table += rate * slope
