"""Who moves whom in the next step of a run: the kernel of the rollouts it learns from, and its influence on held-out
completions.

The rollouts that have credit send; they receive too, which is where the diagonal of the kernel is weighed against the
rest. Held-out completions, of other prompts, only receive: there the prediction meets real steps. A killed study goes
on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokencredit.dynamics.batch import Batch, draw, roles
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.influence import real_changes
from tokencredit.dynamics.kernel import (
    Features,
    Preconditioner,
    contributions,
    kernel,
    of_update,
    sequence_features,
    token_features,
)
from tokencredit.dynamics.kernel_pairs import Units
from tokencredit.dynamics.kernel_sketch import sketched_features
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.update import Update, at_rate, update_vector
from tokencredit.dynamics.vectors import norm
from tokencredit.lm.distribution import seed_of
from tokencredit.studies.kernel.question import KernelConfig
from tokencredit.studies.stages import Stages
from tokencredit.studies.study import Say


@dataclass(frozen=True, eq=False)
class KernelMeasurement:
    """Everything the figures are made of. K [N, N] of the senders, C [N, N] and [N', N] what they do to themselves and
    to the held-out units, `held` {fresh, all: [N'] by forward passes; real: [R, N']}; noise of a sketch's cosines."""

    update: Update
    held_batch: Batch
    units: Units
    held_units: Units
    kernel: torch.Tensor
    own: torch.Tensor
    cross: torch.Tensor
    held: dict[str, np.ndarray]
    noise: float


def step_of(checkpoint: Checkpoint, batch: Batch, preconditioner: str) -> tuple[Update, Preconditioner]:
    """The step and its preconditioner. "identity": plain gradient descent whose step is as long as a sign step at the
    run's rate, η √P.

    ValueError where there is no optimizer state to read AdamW's preconditioner from.
    """
    if preconditioner == "identity":
        plain = checkpoint.fresh("sgd")
        update = update_vector(plain, batch)
        size = sum(p.numel() for p in update.passes.parameters.values())
        lr = checkpoint.config.learning_rate * size**0.5 / (update.clip * norm(update.gradient))
        update = at_rate(update, plain.optimizer, lr)
        return update, of_update(update, plain.optimizer)
    if checkpoint.optimizer is None:
        raise ValueError(
            f"{checkpoint.path} has no optimizer state, so AdamW's preconditioner is not known. Choose another"
            " checkpoint (--run names a run of `tokencredit train`), ask for a fresh AdamW (--optimizer adamw, a sign"
            " step), or for --preconditioner identity"
        )
    if any(rule.kind == "sgd" for rule in checkpoint.optimizer.rules.values()):
        raise ValueError(
            "the optimizer is SGD, whose preconditioner is the identity: ask for --preconditioner identity"
        )
    update = update_vector(checkpoint, batch)
    return update, of_update(update, checkpoint.optimizer)


def measure(checkpoint: Checkpoint, config: KernelConfig, stages: Stages, say: Say) -> KernelMeasurement:
    """Rollouts, step, kernel, influence."""
    c, method = config, checkpoint.method
    say(f"{c.prompts} prompts x {c.group} rollouts")
    batch = draw(checkpoint, c.prompts, c.group, c.seed, needs=sorted(method.needs))
    held_batch = draw(checkpoint, c.held_out, c.samples, seed_of(c.seed, "held out"), split="test")
    update, preconditioner = step_of(checkpoint, batch, c.preconditioner)
    passes = held_batch.passes(checkpoint)
    say(f"the kernel of {c.level}")
    found = stages.arrays("kernel", lambda: _kernels(c, update, passes, preconditioner))
    say("real steps")
    units, held_units = (
        Units(
            found[f"{name}row"],
            found[f"{name}position"],
            of.rollouts.group_index.numpy()[found[f"{name}row"]],
            _labels(checkpoint, of, found[f"{name}row"], found[f"{name}position"]),
        )
        for name, of in (("", update.batch), ("held_", held_batch))
    )
    held = stages.arrays("steps", lambda: _steps(c, update, passes, held_units))
    k, own, cross = (torch.from_numpy(found[name]) for name in ("kernel", "own", "cross"))
    return KernelMeasurement(update, held_batch, units, held_units, k, own, cross, held, float(found["noise"]))


def _kernels(
    config: KernelConfig, update: Update, held: Passes, preconditioner: Preconditioner
) -> dict[str, np.ndarray]:
    """K of the senders and what they do to themselves and to the held-out units; the features go when this ends."""
    there = update.coefficient != 0
    if config.level == "tokens":
        sender, receiver = (_tokens(config, *each, preconditioner) for each in ((update.passes, there), (held, None)))
        sent, coefficient = sender, update.coefficient[sender.row, sender.position]
    else:
        rows = there.any(1, keepdim=True) & update.batch.rollouts.mask
        sender, sent = _completions(config, update.passes, preconditioner, rows, (rows.double(), update.coefficient))
        receiver = _completions(
            config, held, preconditioner, None, (held.grid(torch.ones(len(held.batch), dtype=torch.float64)),)
        )[0]
        coefficient = torch.ones(len(sent), dtype=torch.float64)
    k, cross = kernel(sender), kernel(receiver, sent)
    own, cross = (
        contributions(x, coefficient, preconditioner.fresh, update.clip)
        for x in (k if sent is sender else kernel(sender, sent), cross)
    )
    return {
        "kernel": k.numpy(),
        "own": own.numpy(),
        "cross": cross.numpy(),
        "noise": np.array(sender.noise),
        "row": sender.row.numpy(),
        "position": sender.position.numpy(),
        "held_row": receiver.row.numpy(),
        "held_position": receiver.position.numpy(),
    }


def _tokens(
    config: KernelConfig, passes: Passes, where: torch.Tensor | None, preconditioner: Preconditioner
) -> Features:
    if config.directions:
        return sketched_features(passes, preconditioner, config.directions, config.seed, where)
    return token_features(passes, preconditioner, where)


def _completions(
    config: KernelConfig,
    passes: Passes,
    preconditioner: Preconditioner,
    rows: torch.Tensor | None,
    weights: tuple[torch.Tensor, ...],
) -> list[Features]:
    """Features of completions under several weightings [B, T] of their tokens; a sketch is made once for all."""
    if config.directions:
        tokens = sketched_features(passes, preconditioner, config.directions, config.seed, rows)
        return [tokens.by_row(weight[tokens.row, tokens.position]) for weight in weights]
    return [sequence_features(passes, preconditioner, weight) for weight in weights]


def _steps(config: KernelConfig, update: Update, passes: Passes, units: Units) -> dict[str, np.ndarray]:
    """Forward passes along the fresh part and the whole of the step, and the changes that real steps make, for the
    held-out units.
    """
    real = real_changes(passes, update, config.factors)
    along = [passes.forward(vector)[0] for vector in (update.fresh, update.vector)]
    return {
        "fresh": at_units(along[0], units),
        "all": at_units(along[1], units),
        "real": np.stack([at_units(x, units) for x in real]),
    }


def at_units(values: torch.Tensor, units: Units) -> np.ndarray:
    """[N] of [B, T]: the tokens' own values, or the sums over whole completions."""
    if (units.position < 0).all():
        return values.sum(1).numpy()[units.row]
    return values.numpy()[units.row, units.position]


def _labels(checkpoint: Checkpoint, batch: Batch, row: np.ndarray, position: np.ndarray) -> dict[str, np.ndarray]:
    """Token id, role and outcome as numbers; of whole completions the outcome alone."""
    labels = {"outcome": batch.rollouts.success.long().numpy()[row]}
    if (position < 0).all():
        return labels
    labels["token"] = np.array([batch.completions[i][t] for i, t in zip(row, position)])
    if (found := roles(checkpoint, batch)) is not None:
        labels["role"] = np.unique([found[i][t] for i, t in zip(row, position)], return_inverse=True)[1]
    return labels


def unit_rows(checkpoint: Checkpoint, batch: Batch, units: Units) -> list[dict[str, Any]]:
    """What every unit is: prompt, rollout, position, token and log-probability; of a whole completion its length and
    outcome.
    """
    logprob, rollouts = batch.rollouts.score("logprob"), batch.rollouts
    found = []
    for row, position, prompt in zip(units.row.tolist(), units.position.tolist(), units.prompt.tolist()):
        about = {"prompt": prompt, "rollout": row, "success": bool(rollouts.success[row])}
        if position < 0:
            found.append(about | {"tokens": len(batch.completions[row]), "logprob": float(logprob[row].sum())})
        else:
            token = checkpoint.policy.tokens(batch.completions[row])[position]
            found.append(about | {"position": position, "token": token, "logprob": float(logprob[row, position])})
    return found
