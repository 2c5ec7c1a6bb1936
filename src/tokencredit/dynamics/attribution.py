"""Who makes the change of entropy and of expected reward that a step predicts: every token, momentum and decay, exactly
by linearity.

    ⟨∇F, Δθ⟩ = ⟨∇F, μ⟩ + ⟨∇F, δ⟩ + Σᵢₜ φᵢₜ          φᵢₜ = −s κᵢₜ ⟨a ⊙ ∇F, ∇log πᵢₜ⟩          F = H or J

    ∇J = (1/N) Σᵢₜ (Rᵢ − R̄₋ᵢ) ∇log πᵢₜ               R̄₋ᵢ the mean reward of the rollout's group without it

∇H is that of `entropy`. Both are estimated on rollouts that the step was not made of; the same rollouts would share
their noise with it. The split is exact for the estimated gradient; how far the gradient itself is known is what the
intervals over evaluation prompts say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch, draw
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.entropy import Weights, entropy_terms
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.update import Update
from tokencredit.dynamics.vectors import Vector
from tokencredit.lm.distribution import seed_of
from tokencredit.masked import pool
from tokencredit.stats import Estimate, mean_of_units

GOALS = {"entropy": "nats per token", "reward": "expected reward"}
PARTS = ("momentum", "decay", "tokens")


def reward_weights(batch: Batch) -> Weights:
    """(weight of log π, weight of H) [B, T] with ∇J = passes.reverse(*weights). ValueError where a group has a single
    rollout.
    """
    rollouts = batch.rollouts
    reward = rollouts.reward.double()
    size = pool(torch.ones_like(reward), rollouts.group_index)
    if (size < 2).any():
        raise ValueError(
            "the gradient of the reward compares a rollout with the others of its prompt: draw two rollouts or more of"
            " each"
        )
    others = (pool(reward, rollouts.group_index) - reward) / (size - 1)
    weight = ((reward - others) / len(rollouts))[:, None] * rollouts.mask
    return Weights(weight, torch.zeros_like(weight))


@dataclass(frozen=True, eq=False)
class EntropyGoal:
    """H, on rollouts of P prompts."""

    batch: Batch
    passes: Passes

    @property
    def num_prompts(self) -> int:
        return self.batch.num_prompts

    @cached_property
    def gradient(self) -> Vector:
        return self.passes.reverse(*_sum(self._terms))

    def change(self, direction: Mapping[str, Tensor]) -> np.ndarray:
        """[P]: ⟨∇H, u⟩ prompt by prompt: the mean is the estimate, and the prompts spread as it does (infinitesimal
        jackknife).

            D + (n_q − D T_q) / T̄ − T̄′ (h_q − H T_q) / T̄²
                                                              D = n̄ / T̄ the estimate, T′ the derivative of the length

        n_q is what prompt q adds to D's numerator, h_q and T_q its entropy and tokens. Linear in u: the changes of
        parts add up.
        """
        moved, rollouts = self.passes.forward(direction), self.batch.rollouts
        entropy, tokens = self._by_prompt(rollouts.score("entropy").double()), self._by_prompt(rollouts.mask.double())
        mean, length = entropy.sum() / tokens.sum(), tokens.mean()
        numerator = tokens.sum() * self._by_prompt(_along(_sum(self._terms), moved))
        longer = (
            -tokens.sum() / mean * self._by_prompt(_along(self._terms["length"], moved))
            if mean > 0
            else np.zeros_like(tokens)
        )
        value = numerator.mean() / length
        return value + (numerator - value * tokens) / length - longer.mean() * (entropy - mean * tokens) / length**2

    @cached_property
    def _terms(self) -> dict[str, Weights]:
        return entropy_terms(self.batch)

    def _by_prompt(self, x: Tensor) -> np.ndarray:
        return by_group(x.sum(1), self.batch.rollouts.group_index, self.num_prompts)


@dataclass(frozen=True, eq=False)
class RewardGoal:
    """J, on rollouts of P prompts. Prompts whose rollouts all earn the same have weight 0: `passes` holds the others'
    rows alone.
    """

    weights: Weights
    group: Tensor
    num_prompts: int
    passes: Passes

    @classmethod
    def of(cls, checkpoint: Checkpoint, batch: Batch) -> RewardGoal:
        """ValueError where no prompt's rewards differ."""
        keep = batch.rollouts.informative
        if not keep.any():
            raise ValueError(
                "the gradient of the reward needs rollouts of a prompt that earn differently; none of the "
                f"{batch.num_prompts} prompts has them: draw more prompts, or more rollouts of each"
            )
        weights, some = reward_weights(batch), batch.take(keep)
        return cls(
            Weights(*(w[keep] for w in weights)),
            batch.rollouts.group_index[keep],
            batch.num_prompts,
            some.passes(checkpoint),
        )

    @cached_property
    def gradient(self) -> Vector:
        return self.passes.reverse(*self.weights)

    def change(self, direction: Mapping[str, Tensor]) -> np.ndarray:
        """[P]: ⟨∇J, u⟩ prompt by prompt, P Σ_{i∈q,t} wᵢₜ ∇log πᵢₜ·u: the mean is the estimate."""
        return self.num_prompts * by_group(
            _along(self.weights, self.passes.forward(direction)).sum(1), self.group, self.num_prompts
        )


Goals = Mapping[str, EntropyGoal | RewardGoal]


def draw_goals(
    checkpoint: Checkpoint, seed: int, *, entropy: tuple[int, int] = (1024, 4), reward: tuple[int, int] = (1024, 8)
) -> Goals:
    """{"entropy", "reward"}, each on (prompts, rollouts of each) of its own, so that their errors are independent of
    one another.

    The reward's gradient is by far the noisier one, and costs rows with both outcomes alone.
    """
    some = [
        draw(checkpoint, *size, seed=seed_of("goals", seed, name))
        for name, size in (("entropy", entropy), ("reward", reward))
    ]
    return {"entropy": EntropyGoal(some[0], some[0].passes(checkpoint)), "reward": RewardGoal.of(checkpoint, some[1])}


def _sum(terms: Mapping[str, Weights]) -> Weights:
    return Weights(sum(term.logprob for term in terms.values()), sum(term.entropy for term in terms.values()))


def _along(weights: Weights, moved: tuple[Tensor, Tensor]) -> Tensor:
    return weights.logprob * moved[0] + weights.entropy * moved[1]


def by_group(values: Tensor, group: Tensor, num: int) -> np.ndarray:
    """[num]: sums over the rows of every group, groups numbered from 0; 0 for one without rows."""
    return np.bincount(group.numpy(), weights=values.numpy(), minlength=num)


@dataclass(frozen=True, eq=False)
class Attribution:
    """Who makes the predicted change. shares {goal: [B, T]} of the update's rollouts; parts {part: {goal: [P]}} by
    evaluation prompt.
    """

    update: Update
    shares: Mapping[str, Tensor]
    parts: Mapping[str, Mapping[str, np.ndarray]]

    def estimate(self, goal: str, part: str = "total") -> Estimate:
        """Change of the goal that a part makes, or all of them, with its interval over evaluation prompts."""
        return mean_of_units(
            sum(self.parts[name][goal] for name in PARTS) if part == "total" else self.parts[part][goal]
        )


def attribute(update: Update, goals: Goals) -> Attribution:
    """The split of the predicted changes over the tokens of the step, momentum and decay."""
    shares = {name: update.shares(goal.gradient) for name, goal in goals.items()}
    vectors = dict(zip(PARTS, (update.momentum, update.decay, update.fresh)))
    return Attribution(update, shares, {part: change(vector, goals) for part, vector in vectors.items()})


def change(direction: Vector, goals: Goals) -> dict[str, np.ndarray]:
    """{goal: [P]}: ⟨∇F, u⟩ by evaluation prompt; 0 along nothing, such as the decay of a run without it."""
    if not any(x.any() for x in direction.values()):
        return {name: np.zeros(goal.num_prompts) for name, goal in goals.items()}
    return {name: goal.change(direction) for name, goal in goals.items()}
