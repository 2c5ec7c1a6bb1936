"""Who moves whom in the next step of a run: the kernel of the rollouts it learns from, and its influence on held-out
completions.

The rollouts that have credit send; they receive too, which is where the diagonal of the kernel is weighed against the
rest. Held-out completions, of other prompts, only receive: there the prediction meets real steps. A killed study goes
on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokencredit.dynamics.batch import Batch, roles
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
from tokencredit.stages import Stages
from tokencredit.studies.drawn import drawn
from tokencredit.studies.kernel.question import KernelConfig
from tokencredit.studies.study import Counting, Say, silent


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


def check_step(checkpoint: Checkpoint, preconditioner: str) -> None:
    """ValueError where there is no optimizer state to read AdamW's preconditioner from."""
    if preconditioner == "identity":
        return
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


def step_of(checkpoint: Checkpoint, batch: Batch, preconditioner: str) -> tuple[Update, Preconditioner]:
    """The step and its preconditioner. "identity": plain gradient descent whose step is as long as a sign step at the
    run's rate, η √P.

    ValueError as of `check_step`.
    """
    check_step(checkpoint, preconditioner)
    if preconditioner == "identity":
        plain = checkpoint.fresh("sgd")
        update = update_vector(plain, batch)
        size = sum(p.numel() for p in update.passes.parameters.values())
        lr = checkpoint.config.learning_rate * size**0.5 / (update.clip * norm(update.gradient))
        update = at_rate(update, plain.optimizer, lr)
        return update, of_update(update, plain.optimizer)
    update = update_vector(checkpoint, batch)
    return update, of_update(update, checkpoint.optimizer)


def measure(checkpoint: Checkpoint, config: KernelConfig, stages: Stages, say: Say = silent) -> KernelMeasurement:
    """Rollouts, step, kernel, influence. Every size and the level are named (`KernelConfig.fitted`)."""
    c, method = config, checkpoint.method
    heard = Counting(say, "sampling the step", "rollouts")
    batch = drawn(stages, "step", checkpoint, c.prompts, c.group, c.seed, needs=sorted(method.needs), progress=heard)
    update, preconditioner = step_of(checkpoint, batch, c.preconditioner)
    seed, heard = seed_of(c.seed, "held out"), Counting(say, "sampling held-out completions", "rollouts")
    held_batch = drawn(stages, "held_out", checkpoint, c.held_out, c.samples, seed, split="test", progress=heard)
    passes = held_batch.passes(checkpoint)
    found = stages.arrays("kernel", lambda: _Kernels(c, preconditioner, stages.folder, say).of(update, passes))
    units, held_units = (
        Units(
            found[f"{name}row"],
            found[f"{name}position"],
            of.rollouts.group_index.numpy()[found[f"{name}row"]],
            _labels(checkpoint, of, found[f"{name}row"], found[f"{name}position"]),
        )
        for name, of in (("", update.batch), ("held_", held_batch))
    )
    held = stages.arrays("steps", lambda: _steps(c, update, passes, held_units, say))
    k, own, cross = (torch.from_numpy(found[name]) for name in ("kernel", "own", "cross"))
    return KernelMeasurement(update, held_batch, units, held_units, k, own, cross, held, float(found["noise"]))


@dataclass(frozen=True, eq=False)
class _Kernels:
    """K of the senders and what they do to themselves and to held-out units; the features are gone when it is known."""

    config: KernelConfig
    preconditioner: Preconditioner
    folder: Path
    say: Say

    def of(self, update: Update, held: Passes) -> dict[str, np.ndarray]:
        """kernel, own, cross and noise as of `KernelMeasurement`; row and position of senders and held-out units."""
        there, every = update.coefficient != 0, held.grid(torch.ones(len(held.batch))) > 0
        if self.config.level == "tokens":
            sender, receiver = self._tokens(update.passes, there), self._tokens(held, every)
            sent, coefficient = sender, update.coefficient[sender.row, sender.position]
        else:
            rows = there.any(1, keepdim=True) & update.batch.rollouts.mask
            sender, sent, coefficient = self._senders(update, rows)
            receiver = self._completions(held, every.double())[0]
        self.say("products of gradients")
        k, cross, fresh = kernel(sender), kernel(receiver, sent), self.preconditioner.fresh
        own = contributions(k if sent is sender else kernel(sender, sent), coefficient, fresh, update.clip)
        return {
            "kernel": k.numpy(),
            "own": own.numpy(),
            "cross": contributions(cross, coefficient, fresh, update.clip).numpy(),
            "noise": np.array(sender.noise),
            "row": sender.row.numpy(),
            "position": sender.position.numpy(),
            "held_row": receiver.row.numpy(),
            "held_position": receiver.position.numpy(),
        }

    def _senders(self, update: Update, rows: torch.Tensor) -> tuple[Features, Features, torch.Tensor]:
        """Whole completions, what they send, and κ of each [N]: where κ is the same along every completion, that of its
        tokens, and what is sent is the completion itself.
        """
        coefficient = update.coefficient
        if ((coefficient == coefficient[:, :1]) | ~rows).all():
            sender = self._completions(update.passes, rows.double())[0]
            return sender, sender, coefficient[sender.row, 0]
        sender, sent = self._completions(update.passes, rows.double(), coefficient)
        return sender, sent, torch.ones(len(sent), dtype=torch.float64)

    def _tokens(self, passes: Passes, where: torch.Tensor) -> Features:
        if self.config.directions:
            return self._sketched(passes, where)
        return token_features(passes, self.preconditioner, where, **self._kept("tokens", int(where.sum())))

    def _completions(self, passes: Passes, *weights: torch.Tensor) -> list[Features]:
        """Features of completions under several weightings [B, T] of their tokens; a sketch is made once for all."""
        if self.config.directions:
            tokens = self._sketched(passes, weights[0] != 0)
            return [tokens.by_row(weight[tokens.row, tokens.position]) for weight in weights]
        kept = self._kept("completions", sum(int((weight != 0).any(1).sum()) for weight in weights))
        return [sequence_features(passes, self.preconditioner, weight, **kept) for weight in weights]

    def _sketched(self, passes: Passes, where: torch.Tensor) -> Features:
        num = self.config.directions
        heard = Counting(self.say, "sketching", "directions", num)
        return sketched_features(passes, self.preconditioner, num, self.config.seed, where, heard=heard)

    def _kept(self, what: str, num: int) -> dict[str, Any]:
        return {"folder": self.folder, "heard": Counting(self.say, f"gradients of {what}", what, num)}


def _steps(config: KernelConfig, update: Update, passes: Passes, units: Units, say: Say) -> dict[str, np.ndarray]:
    """Forward passes along the fresh part and the whole of the step, and the changes that real steps make, for the
    held-out units.
    """
    real = real_changes(passes, update, config.factors, Counting(say, "real steps", "rates", len(config.factors)))
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
