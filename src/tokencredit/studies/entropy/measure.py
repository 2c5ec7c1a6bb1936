"""One update, measured: what is predicted of it and what it does, as sums over evaluation prompts; no statistic is made
here.

Evaluation takes one rollout of each of P prompts, drawn for this update alone. Reweighted and fresh rollouts are of the
same prompts and otherwise independent, so that what is easy or hard for both cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from tokencredit.dynamics.vectors import cosine, moved, norm
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
    """The step on a batch of its own."""
    return update_vector(checkpoint, draw(checkpoint, sizes.prompts, sizes.group, seed, needs=checkpoint.method.needs))


def measure(checkpoint: Checkpoint, update: Update, sizes: Sizes, factors: Sequence[float], seed: int) -> Arrays:
    """Everything about one update. `factors` multiply the optimizer's own learning rate."""
    rows = prompts_of(checkpoint, sizes.eval_prompts, seed_of(seed, "prompts"))
    whole = Evaluation.of(checkpoint, rows, seed_of(seed, "rollouts"))
    some = torch.arange(min(sizes.sweep_prompts or len(rows), len(rows)))
    other = Evaluation.of(checkpoint, rows[: len(some)], seed_of(seed, "independent"))
    ids = [seed_of(*prompt) for prompt in whole.batch.prompts]
    found: Arrays = {"prompt": np.array(ids), **_predicted(whole, update.vector, sizes)}
    found |= {f"batch_{name}": x for name, x in _predicted(whole, update.fresh, sizes, short=True).items()}
    for name, evaluation in (("same", whole.part(checkpoint, some)), ("independent", other)):
        found |= {f"{name}_{key}": x for key, x in _reweighted(evaluation, update.vector, factors).items()}
    parameters, own = whole.passes.parameters, (sizes.fresh, seed_of(seed, "fresh"))
    found["fresh_rest"], found["fresh_own"] = _sampled(checkpoint, rows, parameters, update.vector, (1,), *own)
    _, found["batch_fresh_own"] = _sampled(checkpoint, rows, parameters, update.fresh, (1,), *own, rest=False)
    sweep = (sizes.sweep_fresh, seed_of(seed, "sweep"))
    found["sweep_rest"], found["sweep"] = _sampled(
        checkpoint, rows[: len(some)], parameters, update.vector, factors, *sweep
    )
    return found | _facts(update)


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


def _sampled(
    checkpoint: Checkpoint,
    rows: Sequence[dict],
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    factors: Sequence[float],
    num: int,
    seed: int,
    rest: bool = True,
) -> tuple[np.ndarray | None, np.ndarray]:
    """(entropy and tokens of fresh completions at rest [P, 2], at every factor and its negative [F, 2, P, 2]); the same
    uniforms in all.
    """
    here = np.stack(by_sampling(checkpoint, rows, num, seed), -1) if rest else None
    there = []
    for factor in factors:
        pair = []
        for sign in SIGNS:
            with moved(parameters, direction, sign * factor):
                pair.append(np.stack(by_sampling(checkpoint, rows, num, seed), -1))
        there.append(pair)
    return here, np.array(there)


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
