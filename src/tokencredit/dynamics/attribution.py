"""Who makes the change of entropy and of expected reward that a step predicts: every token, momentum and decay, exactly
by linearity.

    ⟨∇F, Δθ⟩ = ⟨∇F, μ⟩ + ⟨∇F, δ⟩ + Σᵢₜ φᵢₜ          φᵢₜ = −s κᵢₜ ⟨a ⊙ ∇F, ∇log πᵢₜ⟩          F = H or J

    ∇J = (1/N) Σᵢₜ (Rᵢ − R̄₋ᵢ) ∇log πᵢₜ               R̄₋ᵢ the mean reward of the rollout's group without it
    ∇T = (1/N) Σᵢₜ (Tᵢₜ − bₜ) ∇log πᵢₜ               Tᵢₜ the tokens still to come after token t, bₜ as many at its place
                                                    in the rollouts of other prompts

∇H is that of `entropy`; the rate of truncation is a reward of 1 for a rollout that was cut. All are estimated on
rollouts that the step was not made of; the same rollouts would share their noise with it. The split is exact for the
estimated gradient; how far the gradient itself is known is what the intervals over evaluation prompts say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch, draw
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.entropy import Weights, entropy_terms
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.to_go import after, baseline_of
from tokencredit.dynamics.update import Update
from tokencredit.dynamics.vectors import Vector
from tokencredit.lm.distribution import seed_of
from tokencredit.masked import pool, zero_off
from tokencredit.stats import Estimate, mean_of_units

GOALS = {"entropy": "nats per token", "reward": "expected reward"}
PARTS = ("momentum", "decay", "tokens")


def reward_weights(batch: Batch) -> Weights:
    """(weight of log π, weight of H) [B, T] with ∇J = passes.reverse(*weights). ValueError where a group has a single
    rollout.
    """
    return outcome_weights(batch, batch.rollouts.reward)


def outcome_weights(batch: Batch, outcome: Tensor) -> Weights:
    """The same for any number per rollout [B], such as whether it was cut."""
    rollouts, reward = batch.rollouts, outcome.double()
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
class WeightedGoal:
    """A mean over rollouts of P prompts, Σᵢₜ wᵢₜ ∇log πᵢₜ its gradient."""

    weights: Weights
    group: Tensor
    num_prompts: int
    passes: Passes

    @cached_property
    def gradient(self) -> Vector:
        return self.passes.reverse(*self.weights)

    def change(self, direction: Mapping[str, Tensor]) -> np.ndarray:
        """[P]: ⟨∇F, u⟩ prompt by prompt, P Σ_{i∈q,t} wᵢₜ ∇log πᵢₜ·u: the mean is the estimate."""
        return self.num_prompts * by_group(
            _along(self.weights, self.passes.forward(direction)).sum(1), self.group, self.num_prompts
        )


class RewardGoal(WeightedGoal):
    """J. Prompts whose rollouts all earn the same have weight 0: `passes` holds the others' rows alone, unless it is
    given.
    """

    @classmethod
    def of(cls, checkpoint: Checkpoint, batch: Batch, passes: Passes | None = None) -> RewardGoal:
        """ValueError where no prompt's rewards differ."""
        keep = batch.rollouts.informative
        if not keep.any():
            raise ValueError(
                "the gradient of the reward needs rollouts of a prompt that earn differently; none of the "
                f"{batch.num_prompts} prompts has them: draw more prompts, or more rollouts of each"
            )
        weights, group, num = reward_weights(batch), batch.rollouts.group_index, batch.num_prompts
        if passes is not None:
            return cls(weights, group, num, passes)
        return cls(Weights(*(w[keep] for w in weights)), group[keep], num, batch.take(keep).passes(checkpoint))


class TruncationGoal(WeightedGoal):
    """The share of rollouts that the length limit cuts."""

    @classmethod
    def of(cls, batch: Batch, passes: Passes) -> TruncationGoal:
        """ValueError where no prompt has both a rollout that was cut and one that was not."""
        weights = outcome_weights(batch, torch.tensor(batch.truncated, dtype=torch.float64))
        if not weights.logprob.any():
            raise ValueError("no prompt has both a completion that was cut and one that was not")
        return cls(weights, batch.rollouts.group_index, batch.num_prompts, passes)


class LengthGoal(WeightedGoal):
    """T, tokens of a rollout. What is still to come after a token is all that it can change."""

    @classmethod
    def of(cls, batch: Batch, passes: Passes) -> LengthGoal:
        mask = batch.rollouts.mask
        weight = zero_off(after(mask.double(), mask) - baseline_of(batch.rollouts, "position").length, mask)
        weights = Weights(weight / len(batch), torch.zeros_like(weight))
        return cls(weights, batch.rollouts.group_index, batch.num_prompts, passes)


Goals = Mapping[str, EntropyGoal | WeightedGoal]


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


def goals_on(checkpoint: Checkpoint, batch: Batch) -> tuple[Goals, dict[str, str]]:
    """({"entropy", "reward", "length", "truncation"} on one batch, whose passes they share; {goal: why not})."""
    passes = batch.passes(checkpoint, Remembering)
    found: dict[str, EntropyGoal | WeightedGoal] = {"entropy": EntropyGoal(batch, passes)}
    left_out = {}
    kinds: dict[str, Callable[[], WeightedGoal]] = {
        "reward": lambda: RewardGoal.of(checkpoint, batch, passes),
        "length": lambda: LengthGoal.of(batch, passes),
        "truncation": lambda: TruncationGoal.of(batch, passes),
    }
    for name, make in kinds.items():
        try:
            found[name] = make()
        except ValueError as error:
            left_out[name] = str(error)
    return found, left_out


class Remembering(Passes):
    """Passes that keep the last direction's derivatives: several goals on one batch ask for the same."""

    last: tuple[Mapping[str, Tensor], tuple[Tensor, Tensor]] | None = None

    def forward(self, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.last is None or self.last[0] is not direction:
            self.last = direction, super().forward(direction)
        return self.last[1]


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
