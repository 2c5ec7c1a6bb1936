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

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch, draw
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.entropy import Weights, entropy_terms
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.sweep import Sweep
from tokencredit.dynamics.to_go import after, baseline_of
from tokencredit.dynamics.update import Update, by_group
from tokencredit.dynamics.vectors import Vector, dot
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
    known: list[Vector] = field(default_factory=list)

    @property
    def num_prompts(self) -> int:
        return self.batch.num_prompts

    @property
    def gradient(self) -> Vector:
        """Made once, by `changes` on the way."""
        return _gradient(self, _sum(self._terms), self._prompts)

    def changes(self, directions: Sequence[Vector], sweep: Sweep | None = None) -> list[np.ndarray]:
        """[P] each: ⟨∇H, u⟩ prompt by prompt: the mean is the estimate, and the prompts spread as it does
        (infinitesimal jackknife).

            D + (n_q − D T_q) / T̄ − T̄′ (h_q − H T_q) / T̄²
                                                              D = n̄ / T̄ the estimate, T′ the derivative of the length

        n_q is what prompt q adds to D's numerator, h_q and T_q its entropy and tokens. Linear in u: the changes of
        parts add up. A forward-mode pass for a direction; of a large model a reverse pass for a prompt, for all of
        them.
        """
        rollouts = self.batch.rollouts
        entropy, tokens = self._by_prompt(rollouts.score("entropy").double()), self._by_prompt(rollouts.mask.double())
        mean, length = entropy.sum() / tokens.sum(), tokens.mean()
        found = []
        for whole, longer in self._along(directions, sweep):
            numerator = tokens.sum() * whole
            slope = -tokens.sum() / mean * longer / len(tokens) if mean > 0 else 0.0
            value = numerator.mean() / length
            spread = (numerator - value * tokens) / length - slope * (entropy - mean * tokens) / length**2
            found.append(value + spread)
        return found

    def _along(self, directions: Sequence[Vector], sweep: Sweep | None) -> Iterator[tuple[np.ndarray, float]]:
        """Of every direction, what each prompt's tokens add to ⟨∇H, u⟩ [P], and what the term of the length adds."""
        if not self.passes.large:
            for direction in directions:
                moved = self.passes.forward(direction)
                longer = self._by_prompt(_along(self._terms["length"], moved)).sum()
                yield self._by_prompt(_along(_sum(self._terms), moved)), longer
            return
        weightings = [_sum(self._terms), self._terms["length"]]
        found, (_, length) = _swept(self, weightings, self._prompts, directions, sweep)
        yield from zip(found.numpy(), (dot(length, u) for u in directions))

    @property
    def _prompts(self) -> list[Tensor]:
        return [self.batch.rollouts.group_index == q for q in range(self.num_prompts)]

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
    known: list[Vector] = field(default_factory=list)

    @property
    def gradient(self) -> Vector:
        """Made once, by `changes` on the way."""
        return _gradient(self, self.weights, self._prompts)

    def changes(self, directions: Sequence[Vector], sweep: Sweep | None = None) -> list[np.ndarray]:
        """[P] each: ⟨∇F, u⟩ prompt by prompt, P Σ_{i∈q,t} wᵢₜ ∇log πᵢₜ·u: the mean is the estimate."""
        if not self.passes.large:
            moved = (self.passes.forward(direction) for direction in directions)
            sums = (by_group(_along(self.weights, each).sum(1), self.group, self.num_prompts) for each in moved)
            return [self.num_prompts * each for each in sums]
        return list(self.num_prompts * _swept(self, [self.weights], self._prompts, directions, sweep)[0].numpy())

    @property
    def _prompts(self) -> list[Tensor]:
        return [self.group == q for q in range(self.num_prompts)]


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
    checkpoint: Checkpoint,
    seed: int,
    *,
    entropy: tuple[int, int] = (1024, 4),
    reward: tuple[int, int] = (1024, 8),
    drawn: Callable[[str, int, int, int], Batch] | None = None,
) -> Goals:
    """{"entropy", "reward"}, each on (prompts, rollouts of each) of its own, so that their errors are independent of
    one another. `drawn` gives the rollouts, asked for by name, prompts, rollouts of each and seed, in place of `draw`.

    The reward's gradient is by far the noisier one, and costs rows with both outcomes alone.
    """
    drawn = drawn or (lambda name, *size: draw(checkpoint, *size))
    some = {
        name: drawn(name, *size, seed_of("goals", seed, name))
        for name, size in (("entropy", entropy), ("reward", reward))
    }
    passes = some["entropy"].passes(checkpoint)
    return {"entropy": EntropyGoal(some["entropy"], passes), "reward": RewardGoal.of(checkpoint, some["reward"])}


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
    """Passes that keep the derivatives along every direction: several goals on one batch ask for the same."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.known: list[tuple[Vector, tuple[Tensor, Tensor]]] = []

    def forward(self, direction: Vector, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if weight is not None:
            return super().forward(direction, weight)
        for along, found in self.known:
            if along is direction:
                return found
        self.known.append((direction, super().forward(direction)))
        return self.known[-1][1]


def _swept(
    goal: EntropyGoal | WeightedGoal,
    weightings: Sequence[Weights],
    prompts: Sequence[Tensor],
    directions: Sequence[Vector],
    sweep: Sweep | None = None,
) -> tuple[Tensor, list[Vector | None]]:
    """(`Passes.products` over a goal's prompts, of a large model; the gradients with the weightings). The goal knows
    that with the first, its own, after it, and where it knew it before there is None in its place.
    """
    wholes = [None if goal.known and k == 0 else goal.passes.zero() for k in range(len(weightings))]
    found = goal.passes.products(weightings, prompts, directions, wholes, sweep)
    if not goal.known:
        goal.known.append(goal.passes.kept(wholes[0]))
    return found, wholes


def _gradient(goal: EntropyGoal | WeightedGoal, weights: Weights, prompts: Sequence[Tensor]) -> Vector:
    """A goal's gradient, made once; of a large model added up prompt by prompt, as `changes` does."""
    if not goal.known and goal.passes.large:
        _swept(goal, [weights], prompts, [])
    elif not goal.known:
        goal.known.append(goal.passes.reverse(*weights))
    return goal.known[0]


def _sum(terms: Mapping[str, Weights]) -> Weights:
    return Weights(sum(term.logprob for term in terms.values()), sum(term.entropy for term in terms.values()))


def _along(weights: Weights, moved: tuple[Tensor, Tensor]) -> Tensor:
    return weights.logprob * moved[0] + weights.entropy * moved[1]


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


Question = Generator[Sequence[Vector], list[dict[str, np.ndarray]], Any]
"""What asks once for the changes along some directions, and ends with what it makes of them."""


Sweeps = Callable[[str, Sequence[str]], Sweep]
"""The sweep of a goal's prompts with directions by these names."""


@dataclass(frozen=True)
class Pending:
    """A question with what it asked for."""

    question: Question
    found: list[dict[str, np.ndarray]]

    def answer(self) -> Any:
        """What the question ends with."""
        try:
            self.question.send(self.found)
        except StopIteration as end:
            return end.value
        raise RuntimeError("a question asks once")


def asked(questions: Iterable[tuple[str, Question]], goals: Goals, sweeps: Sweeps | None = None) -> list[Pending]:
    """Questions by name with what they ask for. Of a large model the directions of all are held, `Passes.held`, and one
    sweep over the goals' prompts is made for them.
    """
    opened, names, directions = [], [], []
    for name, question in questions:
        some = [next(iter(goals.values())).passes.held(u) for u in next(question)]
        opened.append((question, len(some)))
        names += [f"{name}/{k}" for k in range(len(some))]
        directions += some
    found, pending = changes(directions, goals, sweeps, names), []
    for question, num in opened:
        mine, found = found[:num], found[num:]
        pending.append(Pending(question, mine))
    return pending


def answered(questions: Iterable[Question], goals: Goals) -> list[Any]:
    """What questions end with, all of them in one sweep."""
    return [pending.answer() for pending in asked(((str(k), each) for k, each in enumerate(questions)), goals)]


def attribute(update: Update, goals: Goals) -> Attribution:
    """The split of the predicted changes over the tokens of the step, momentum and decay."""
    return answered([attributing(update, goals)], goals)[0]


def attributing(update: Update, goals: Goals) -> Question:
    """Asks for what `attribute` gives."""
    found = yield [update.momentum, update.decay, update.fresh]
    shares = {name: update.shares(goal.gradient) for name, goal in goals.items()}
    return Attribution(update, shares, dict(zip(PARTS, found)))


def changes(
    directions: Sequence[Vector], goals: Goals, sweeps: Sweeps | None = None, names: Sequence[str] = ()
) -> list[dict[str, np.ndarray]]:
    """{goal: [P]} of every direction: ⟨∇F, u⟩ by evaluation prompt; 0 along nothing, such as the decay of a run without
    it. `sweeps` with the directions' names make the sweeps of a large model.
    """
    there = [k for k, direction in enumerate(directions) if any(x.any() for x in direction.values())]
    found = [{name: np.zeros(goal.num_prompts) for name, goal in goals.items()} for _ in directions]
    for name, goal in goals.items():
        sweep = sweeps(name, [names[k] for k in there]) if sweeps else None
        for k, values in zip(there, goal.changes([directions[k] for k in there], sweep)):
            found[k][name] = values
    return found
