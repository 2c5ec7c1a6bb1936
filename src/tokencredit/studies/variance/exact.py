"""Bias and variance without sampling: a small transformer whose completions, and groups of them, are all enumerated.

    μ = Σ P(group) x(group)        E|x|² = Σ P(group) |x(group)|²        τ = Σₛ P(s) Σₜ (Q − V) ∇log π

Two prompts, equally likely, of 15 completions each. A method's denominators and thresholds are those of a large batch:
one in which every group comes as often as its probability says. Every gradient is a combination of the gradients of
single tokens, so one matrix of their products is all that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations_with_replacement
from math import factorial, prod

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.passes import Passes
from tokencredit.lm.exact import element_gradients
from tokencredit.lm.packing import grid
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts
from tokencredit.scores.proxies import proxies
from tokencredit.studies.variance.estimators import GradientMoments
from tokencredit.studies.variance.gradients import Reference, weights_of
from tokencredit.tasks.exact import ExactWorld, PromptedPolicy, tiny_model

END = 2
ANSWERS = (0, 1)
PROXIES = ("gradient_norm", "fisher_trace", "perturbation_variance", "attention", "head_norm", "sum_p2")
DECIDES = 0.1
"""A position decides where the value of the next token varies by more than this standard deviation."""
LARGE = 20_000
"""Groups of the large batch; one that would come less than once comes once."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """All completions after one prompt: probability [S], their rollouts with scores, and Q − V [S, T]."""

    sequences: Tensor
    probability: Tensor
    rollouts: Rollouts
    credit: Tensor


@dataclass(frozen=True, eq=False)
class World:
    """The answer to prompt `0` or `1` is the token itself, said last before the end, within three tokens."""

    seed: int = 0
    group: int = 4

    @cached_property
    def model(self):
        return tiny_model(self.seed, vocab=3, hidden=16, scale=0.3).double()

    @cached_property
    def prompts(self) -> list[Prompt]:
        return [self._prompt(answer) for answer in ANSWERS]

    def _prompt(self, answer: int) -> Prompt:
        def reward(completions: Tensor) -> Tensor:
            if completions.shape[1] < 2:
                return torch.zeros(len(completions))
            return ((completions[:, -1] == END) & (completions[:, -2] == answer)).double()

        with torch.no_grad():
            known = ExactWorld(3, 3, reward, END).enumerate(PromptedPolicy(self.model, [answer]))
            sequences, mask, probability, rewards = known.completions
            found = known.scores(sequences, mask)
        spread = found.pop("spread")
        ids = [row[keep].tolist() for row, keep in zip(sequences, mask)]
        measured = proxies(self.model, [[answer]] * len(ids), ids, PROXIES, method="exact")
        found |= {name: grid(values, mask.shape[1]) for name, values in measured.items()}
        found["oracle_positions"] = (spread > DECIDES).double()
        rollouts = Rollouts(rewards.double(), torch.zeros(len(ids), dtype=torch.long), mask, found)
        return Prompt(sequences, probability, rollouts, found["exact_value"])

    @cached_property
    def token_gradients(self) -> Tensor:
        """[prompts · S · T, P]: ∇log π of every token of every completion, zero off them."""
        parts = []
        for answer, prompt in zip(ANSWERS, self.prompts):
            mask = prompt.rollouts.mask
            ids = [row[keep].tolist() for row, keep in zip(prompt.sequences, mask)]
            passes = Passes(self.model, [[answer]] * len(ids), ids)
            parameters, places = list(passes.parameters.values()), torch.stack(passes.place, 1)
            found = torch.zeros(*mask.shape, sum(p.numel() for p in parameters), dtype=torch.float64)
            for logprob, keep in passes.by_row():
                grads = element_gradients(logprob, parameters, torch.arange(len(logprob)))
                rows = torch.cat(
                    [
                        torch.zeros(len(keep), p.numel()) if g is None else g.flatten(1)
                        for g, p in zip(grads, parameters)
                    ],
                    1,
                )
                found[places[keep, 0], places[keep, 1]] = rows
            parts.append(found.flatten(0, 1))
        return torch.cat(parts)

    @cached_property
    def products(self) -> Tensor:
        """Products of the tokens' gradients."""
        return self.token_gradients @ self.token_gradients.T

    @cached_property
    def truth(self) -> Tensor:
        """τ as a combination of the tokens' gradients."""
        return torch.cat([(p.probability[:, None] * p.credit).flatten() for p in self.prompts]) / len(self.prompts)

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor]:
        """(members [K, G] of one prompt's groups, orders taken together; probability [prompts, K])."""
        members = list(combinations_with_replacement(range(len(self.prompts[0].probability)), self.group))
        ways = [factorial(self.group) / prod(factorial(some.count(s)) for s in set(some)) for some in members]
        index = torch.tensor(members)
        return index, torch.stack([p.probability[index].prod(1) for p in self.prompts]) * torch.tensor(
            ways, dtype=torch.float64
        )

    @cached_property
    def batch(self) -> tuple[Rollouts, Tensor]:
        """(the large batch, the place [prompts · K] of every group's first copy in it)."""
        members, chance = self.groups
        copies = (chance.flatten() * LARGE / len(self.prompts)).round().long().clamp(min=1)
        completions = len(self.prompts[0].probability)
        rows = torch.cat([members + p * completions for p in range(len(self.prompts))]).repeat_interleave(copies, 0)
        parts = [p.rollouts for p in self.prompts]
        one = Rollouts(
            torch.cat([r.reward for r in parts]),
            torch.zeros(len(parts) * completions, dtype=torch.long),
            torch.cat([r.mask for r in parts]),
            {name: torch.cat([r.score(name) for r in parts]) for name in parts[0].scores},
        )
        label = torch.arange(len(rows)).repeat_interleave(self.group)
        return replace(one.rows(rows.flatten()), group=label), copies.cumsum(0) - copies

    def estimator(self, method: Method) -> Estimator:
        """The gradient that the method makes of every group."""
        (members, chance), (rollouts, first) = self.groups, self.batch
        prompts, completions = chance.shape[0], len(self.prompts[0].probability)
        weight = weights_of(method, rollouts).unflatten(0, (-1, self.group))
        weight = -len(weight) * weight[first].unflatten(0, (prompts, -1))
        rows = torch.zeros(prompts, len(members), prompts, completions, weight.shape[-1], dtype=torch.float64)
        norms = self.products.diagonal().view(prompts, completions, -1)
        for p in range(prompts):
            rows[p, :, p].scatter_add_(1, members[..., None].expand(weight.shape[1:]), weight[p])
        apart = torch.stack([(w.square() * norm[members]).sum((1, 2)) for w, norm in zip(weight, norms)])
        credited = (weight != 0).sum((2, 3)).double()
        return Estimator(
            rows.flatten(2).flatten(0, 1), chance.flatten() / prompts, apart.flatten(), credited.flatten(), prompts
        )


@dataclass(frozen=True, eq=False)
class Estimator:
    """One row per group: combination of the tokens' gradients [K, tokens], probability [K], Σₜ|xₜ|² [K], credited
    tokens [K].
    """

    rows: Tensor
    chance: Tensor
    apart: Tensor
    credited: Tensor
    num_prompts: int

    @property
    def mean(self) -> Tensor:
        """μ as a combination of the tokens' gradients."""
        return self.chance @ self.rows

    def moments(self, base: Estimator, world: World) -> GradientMoments:
        """Exact, in the arrays of one entry that hold no jackknife."""
        products, mean = world.products, self.mean
        by_prompt = (self.chance[:, None] * self.rows).unflatten(0, (self.num_prompts, -1)).sum(1) * self.num_prompts
        values = {
            "second": self.chance @ ((self.rows @ products) * self.rows).sum(1),
            "signal": mean @ products @ mean,
            "pair": ((by_prompt @ products) * by_prompt).sum(1).mean(),
            "with_base": mean @ products @ base.mean,
            "with_truth": mean @ products @ world.truth,
            "truth": world.truth @ products @ world.truth,
            "credited": self.chance @ self.credited,
            "tokens_apart": self.chance @ self.apart,
        }
        return GradientMoments(**{name: np.array([float(value)]) for name, value in values.items()})


@dataclass(frozen=True, eq=False)
class Law:
    """What samples of the world are drawn from: gradients [groups, D] of every group, and its probability [prompts, K].
    For checks.
    """

    gradients: dict[str, Tensor]
    chance: Tensor

    @classmethod
    def of(cls, world: World, methods: Sequence[Method]) -> Law:
        """Gradients as coordinates that keep all their products."""
        values, vectors = torch.linalg.eigh(world.products)
        root = vectors * values.clamp(min=0).sqrt()
        return cls({method.name: world.estimator(method).rows @ root for method in methods}, world.groups[1])

    def sample(
        self, name: str, base: str, truth: str, prompts: int, seed: int
    ) -> tuple[GradientMoments, GradientMoments]:
        """Estimated moments of a method and of the unweighted one, from prompts drawn with two groups each."""
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(0, len(self.chance), (prompts,), generator=generator)
        drawn = (
            torch.multinomial(self.chance[prompt], 2, replacement=True, generator=generator)
            + prompt[:, None] * self.chance.shape[1]
        )
        x = {key: self.gradients[key][drawn.T.flatten()] for key in (name, base, truth)}
        reference = Reference(x[base], x[truth])
        counts = {"credited": np.ones(prompts), "tokens_apart": np.ones(prompts)}
        tables = {key: reference.products(each) | counts for key, each in x.items()}
        return GradientMoments.of(tables[name], tables[truth]), GradientMoments.of(tables[base], tables[truth])


def measurable(methods: Sequence[Method]) -> list[Method]:
    """Those whose scores the world has; random draws would be no enumeration."""
    there = {"logprob", "entropy", "exact_value", "oracle_positions", *PROXIES}
    return [method for method in methods if method.needs <= there]
