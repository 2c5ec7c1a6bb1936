"""One update, measured: what is predicted of it and what it does, as sums over evaluation prompts; no statistic is made
here.

Evaluation takes one rollout of each of P prompts, drawn for this update alone. Reweighted and fresh rollouts are of the
same prompts and otherwise independent, so that what is easy or hard for both cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch, draw, prompts_of, roll_out
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.reweighting import (
    PrefixTangents,
    at_rest,
    curvatures,
    linear_change,
    second_derivatives,
    slopes,
)
from tokencredit.dynamics.to_go import BASELINES, Baseline, baseline_of, hidden_states, places
from tokencredit.dynamics.true_change import by_reweighting, by_sampling
from tokencredit.dynamics.update import Update, update_vector
from tokencredit.dynamics.vectors import Vector, cosine, moved, norm
from tokencredit.lm.distribution import seed_of
from tokencredit.masked import zero_off
from tokencredit.studies.entropy.question import Sizes

Arrays = dict[str, np.ndarray]
BEST = "position"
"""The baseline of the figures; the others stand beside it."""
SIGNS = (1, -1)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Rollouts that a prediction is made on: with their hidden states [B, T, F] and baselines."""

    batch: Batch
    passes: Passes
    hidden: Tensor

    @classmethod
    def of(cls, checkpoint: Checkpoint, rows: Sequence[dict], seed: int) -> Evaluation:
        batch = roll_out(checkpoint, rows, 1, seed)
        passes = batch.passes(checkpoint)
        return cls(batch, passes, hidden_states(passes))

    @property
    def entropy(self) -> Tensor:
        return self.batch.rollouts.score("entropy").double()

    @property
    def mask(self) -> Tensor:
        return self.batch.rollouts.mask

    def baseline(self, name: str = BEST) -> Baseline:
        return baseline_of(self.batch.rollouts, name, self.hidden)

    def part(self, checkpoint: Checkpoint, keep: Tensor) -> Evaluation:
        """Some of its rollouts, as if there were no others."""
        batch = self.batch.take(keep)
        return Evaluation(batch, batch.passes(checkpoint), self.hidden[keep])


def draw_update(checkpoint: Checkpoint, sizes: Sizes, seed: int) -> Update:
    """The step on a batch of its own; the vectors of a large model that are read again and again are kept."""
    batch = draw(checkpoint, sizes.prompts, sizes.group, seed, needs=checkpoint.method.needs)
    update = update_vector(checkpoint, batch)
    if not update.passes.large:
        return update
    return replace(update, **{name: update.passes.kept(getattr(update, name)) for name in ("fresh", "vector")})


@dataclass(frozen=True, eq=False)
class Measurement:
    """One update, and what its parts are measured on, each drawn when the first of them asks. `factors` multiply the
    optimizer's own learning rate; `own` and `seed` draw the update and its evaluation.
    """

    checkpoint: Checkpoint
    sizes: Sizes
    factors: Sequence[float]
    own: int
    seed: int

    @cached_property
    def update(self) -> Update:
        return draw_update(self.checkpoint, self.sizes, self.own)

    @cached_property
    def rows(self) -> list[dict]:
        return prompts_of(self.checkpoint, self.sizes.eval_prompts, seed_of(self.seed, "prompts"))

    @property
    def some(self) -> list[dict]:
        """The prompts of the sweep."""
        return self.rows[: self.sizes.sweep_prompts]

    @cached_property
    def whole(self) -> Evaluation:
        return Evaluation.of(self.checkpoint, self.rows, seed_of(self.seed, "rollouts"))

    def parts(self) -> dict[str, Callable[[], Arrays]]:
        """What is measured, by its name in words, each on its own: sums that `together` makes one of."""
        fresh = self.sizes.fresh, seed_of(self.seed, "fresh")
        sweep = self.sizes.sweep_fresh, seed_of(self.seed, "sweep")
        found = {
            "prediction": self._prediction,
            "prediction of the batch's own part": self._prediction_of_batch,
            "the same rollouts, reweighted": lambda: self._reweighted("same"),
            "independent rollouts, reweighted": lambda: self._reweighted("independent"),
            "fresh rollouts": lambda: {"fresh_own": self._sides(self.update.vector, 1.0, self.rows, *fresh)},
            "fresh rollouts before": lambda: {"fresh_rest": self._at_rest(self.rows, *fresh)},
            "fresh rollouts of the batch's own part": lambda: {
                "batch_fresh_own": self._sides(self.update.fresh, 1.0, self.rows, *fresh)
            },
            "the sweep's fresh rollouts before": lambda: {"sweep_rest": self._at_rest(self.some, *sweep)},
        }

        def at(k: int) -> Arrays:
            return {f"sweep_{k}": self._sides(self.update.vector, self.factors[k], self.some, *sweep)}

        return found | {f"the sweep's fresh rollouts, rate {k + 1}": partial(at, k) for k in range(len(self.factors))}

    def _prediction(self) -> Arrays:
        ids = [seed_of(*prompt) for prompt in self.whole.batch.prompts]
        predicted = _predicted(self.whole, self.update.vector, self.sizes)
        return {"prompt": np.array(ids), **predicted, **_facts(self.update)}

    def _prediction_of_batch(self) -> Arrays:
        found = _predicted(self.whole, self.update.fresh, self.sizes, short=True)
        return {f"batch_{name}": x for name, x in found.items()}

    def _reweighted(self, which: str) -> Arrays:
        if which == "same":
            evaluation = self.whole.part(self.checkpoint, torch.arange(len(self.some)))
        else:
            evaluation = Evaluation.of(self.checkpoint, self.some, seed_of(self.seed, which))
        found = _reweighted(evaluation, self.update.vector, self.factors)
        return {f"{which}_{name}": x for name, x in found.items()}

    def _at_rest(self, rows: Sequence[dict], num: int, seed: int) -> np.ndarray:
        """[P, 2]: entropy and tokens of fresh completions of the policy as it is."""
        return np.stack(by_sampling(self.checkpoint, rows, num, seed), -1)

    def _sides(self, along: Vector, factor: float, rows: Sequence[dict], num: int, seed: int) -> np.ndarray:
        """[2, P, 2] of the policy on either side along a vector; the same uniforms as at rest."""
        sides = []
        for sign in SIGNS:
            with moved(self.update.passes.parameters, along, sign * factor):
                sides.append(self._at_rest(rows, num, seed))
        return np.array(sides)


def together(parts: Iterable[Arrays], rates: int) -> Arrays:
    """The arrays of all parts; what has one for every rate is [F, 2, P, 2]."""
    found = {name: x for part in parts for name, x in part.items()}
    found["sweep"] = np.stack([found.pop(f"sweep_{k}") for k in range(rates)])
    return found | {name: found[name][None] for name in ("fresh_own", "batch_fresh_own")}


def _predicted(evaluation: Evaluation, direction: Mapping[str, Tensor], sizes: Sizes, short: bool = False) -> Arrays:
    """Sums of the linear prediction by baseline, and of the quadratic one; predictions of sub-batches that know nothing
    of one another.
    """
    first = PrefixTangents(*evaluation.passes.forward(direction))
    entropy, mask, rollouts = evaluation.entropy, evaluation.mask, evaluation.batch.rollouts
    names = (BEST,) if short else BASELINES
    rest = at_rest(entropy, mask)
    found: Arrays = {"rest_entropy": rest.entropy.numpy(), "rest_length": rest.length.numpy()}
    for name in names:
        parts = slopes(first, entropy, mask, evaluation.baseline(name))
        found["direct"] = parts["direct"].entropy.numpy()
        found |= {f"path_{name}": parts["path"].entropy.numpy(), f"length_{name}": parts["length"].length.numpy()}
    size, num = sizes.sub_batch, len(rollouts) // sizes.sub_batch
    found["sub"] = np.array(
        [
            [_linear(first, rollouts.rows(keep), keep, evaluation.hidden, name) for name in names]
            for keep in (torch.arange(k * size, (k + 1) * size) for k in range(num))
        ]
    )
    if short:
        return found
    second = second_derivatives(evaluation.passes, direction)
    bend = curvatures(first, second, entropy, mask, evaluation.baseline())
    scores = zero_off(first.logprob, mask)
    variates = torch.stack([(scores * x).sum(1) for x in (torch.ones_like(entropy), entropy, places(mask).double())], 1)
    return found | {
        "bend_entropy": bend.entropy.numpy(),
        "bend_length": bend.length.numpy(),
        "variates": variates.numpy(),
    }


def _linear(first: PrefixTangents, rollouts: Any, keep: Tensor, hidden: Tensor, name: str) -> float:
    """The linear prediction from some rollouts alone, baselines included."""
    entropy, mask = rollouts.score("entropy").double(), rollouts.mask
    parts = slopes(PrefixTangents(*(x[keep] for x in first)), entropy, mask, baseline_of(rollouts, name, hidden[keep]))
    return linear_change(
        *(float(x.sum()) for x in at_rest(entropy, mask)), *(float(sum(x).sum()) for x in zip(*parts.values()))
    )


def _reweighted(evaluation: Evaluation, direction: Mapping[str, Tensor], factors: Sequence[float]) -> Arrays:
    """S, L at every factor and its negative [F, 2, P, 2], at rest [P, 2]; effective sample sizes [F, 2]."""
    passes, mask, baseline = evaluation.passes, evaluation.mask, evaluation.baseline()
    rest = passes.values()
    moved_sums = [
        [by_reweighting(passes, rest, mask, baseline, direction, sign * factor) for sign in SIGNS] for factor in factors
    ]
    sums = np.array([[np.stack([x.numpy() for x in each], -1) for each, _ in pair] for pair in moved_sums])
    return {
        "rest": np.stack([x.numpy() for x in at_rest(rest[1], mask)], -1),
        "moved": sums,
        "size": np.array([[size for _, size in pair] for pair in moved_sums]),
    }


def _facts(update: Update) -> Arrays:
    """Sizes of the update and of its parts, and the covariances that the tabular theory looks at."""
    logprob, credit, mask = update.batch.rollouts.score("logprob").double(), update.credit, update.batch.rollouts.mask
    lp, a = logprob[mask], credit[mask]
    cov = [float(((lp - lp.mean()) * (x - x.mean())).mean()) for x in (lp.exp() * a, a)]
    shares = [
        norm(update.vector),
        norm(update.fresh),
        norm(update.momentum),
        cosine(update.fresh, update.momentum),
        update.clip,
    ]
    return {"covariance": np.array(cov), "vector": np.array(shares), "lr": np.array(update.lr)}
