"""A batch of verl as `Rollouts`, and what a method makes of it: its credit, and the plan of its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencredit.engines.verl.carrier import Carrier, named
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts
from tokencredit.scores.draws import uniform_draws

FIELDS = ("uid", "response_mask", "rm_scores", "old_log_probs", "entropy")
"""What credit is computed from: verl stores the entropies of its old policy beside its old log-probs."""


@dataclass(frozen=True)
class Assigned:
    """credit       [B, T]  verl's "advantages"

    weight       [B, T]  what a token's loss counts in an optimizer step; a batch of K mini-batches has K ω
    coefficient  [B, T]  of a surrogate that treats tokens apart, None from the others
    rollouts     the rows that are rollouts
    """

    credit: Tensor
    weight: Tensor
    coefficient: Tensor | None
    rollouts: Rollouts


def rollouts_of(batch: Mapping[str, Tensor], uid: Sequence[str], carrier: Carrier, needs: frozenset[str], step: int):
    """The `Rollouts` of a padded verl batch; `uid` names each row's prompt.

    The reward is the sum of a rollout's `rm_scores`. Rows that rollout correction has rejected keep their reward and
    have no tokens.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(uid))}
    mask = batch["response_mask"].bool()
    scores = {"entropy": batch["entropy"], "logprob": batch["old_log_probs"]}
    if "sum_p2" in batch:
        scores["sum_p2"] = batch["sum_p2"]
    if "uniform" in needs and "uniform" not in carrier.scores:
        scores["uniform"] = uniform_draws(carrier.seed, step, torch.arange(len(mask)), mask.shape[1])
    for name in sorted(needs & set(carrier.scores)):
        scores[name] = named(carrier.scores[name], f"scores.{name}")(batch)
        if scores[name].shape != mask.shape:
            raise ValueError(
                f'{carrier.scores[name]} must return the score "{name}" as [B, T] = {list(mask.shape)}, got shape'
                f" {list(scores[name].shape)}"
            )
    group = torch.tensor([names[name] for name in uid], dtype=torch.long)
    reward = batch["rm_scores"].float().sum(1)
    return Rollouts(reward, group, mask, scores, carrier.success_above)


def assign(
    batch: Mapping[str, Tensor],
    uid: Sequence[str],
    real: Sequence[bool],
    method: Method,
    carrier: Carrier,
    *,
    step: int = 0,
    minibatches: int = 1,
) -> Assigned:
    """Credit and plan over the whole batch, as the trainer's process sees it.

    real         False for the rows that verl adds to make a batch divisible: they are no rollouts and get nothing
    minibatches  optimizer steps that the batch is split into; each sees its part as if it were the whole
    """
    keep = torch.tensor(real, dtype=torch.bool)
    rows = {name: x[keep] for name, x in batch.items() if isinstance(x, Tensor)}
    own = [name for name, there in zip(uid, real) if there]
    rollouts = rollouts_of(rows, own, carrier, method.needs, step)
    credit = method.credit(rollouts)
    logprob = rows["old_log_probs"].float()
    plan = method.plan(logprob=logprob, old_logprob=logprob, credit=credit, rollouts=rollouts)
    coefficient = None if plan.coefficient is None else _spread(plan.coefficient, keep)
    return Assigned(_spread(credit, keep), _spread(plan.weight * minibatches, keep), coefficient, rollouts)


def check_outputs(keys: Sequence[str]) -> None:
    """ValueError where a rollout has several outputs of an agent loop: keys are prompt, rollout and output."""
    several = [key for key in keys if key.rsplit("_", 1)[-1] != "0"]
    if several:
        raise ValueError(
            f"{len(several)} rows, {several[0]} the first, are further outputs of a rollout, and credit is given to one"
            " output per rollout: use an agent loop that returns one, with the turns of others off its response_mask"
        )


def _spread(x: Tensor, keep: Tensor) -> Tensor:
    """[B, T]: the rows of x where `keep` is, 0 elsewhere; float32, as verl's own advantages are."""
    whole = x.new_zeros((len(keep), x.shape[1]), dtype=torch.float32)
    whole[keep] = x.float()
    return whole
