"""A step taken apart: which of its logged tokens move entropy, reward, length and truncation in the update that they
make, and what other methods would have done with the same rollouts.

The update is the one that the logged credit makes from the checkpoint, with its optimizer or a fresh one, as the first
step on these rollouts: the policy that sampled is taken to be the checkpoint. What it changes is estimated on logged
rollouts of other prompts; on the update's own, where the log has no others, an estimate is optimistic, for the same
noise is in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit import checkpoints
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.dynamics.attribution import (
    PARTS,
    Attribution,
    attribute,
    changes,
    goals_on,
)
from tokencredit.dynamics.batch import Batch
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.counterfactual import Coefficients
from tokencredit.dynamics.optimizer import read_optimizer
from tokencredit.dynamics.update import coefficients_of, step_along
from tokencredit.dynamics.vectors import norm
from tokencredit.limits import memory
from tokencredit.lm.directions import select_parameters
from tokencredit.lm.load import resolve_model
from tokencredit.lm.policy import Policy
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts
from tokencredit.stats import mean_of_units
from tokencredit.studies.book import Book
from tokencredit.studies.inspect.sample import LoggedStep
from tokencredit.studies.inspect.source import Missing
from tokencredit.train_config import RATES, TrainConfig

UNITS = {"entropy": "nats per token", "reward": "reward", "length": "tokens", "truncation": "share of rollouts"}
VECTORS = 12
"""Vectors as long as the parameters, in float64, that an autopsy holds at once."""
LARGEST = 0.5
"""Of the machine's memory."""
SAME = 1e-3
"""Changes that differ by less than this share of the largest are one: trainers add 1e-4 or so to a deviation."""
LONG = "‖Δθ‖"
TYPES = 8
LIST = 10
FEW = 3


def open_at(policy: Policy, parameters: str, optimizer: str | None, learning_rate: float | None) -> Checkpoint:
    """The checkpoint of a policy with the optimizer that its folder has, or a fresh one; `parameters` are those that
    the update moves. Missing where their vectors do not fit into memory.
    """
    path = Path(resolve_model(policy.name))
    state = None
    if optimizer is None:
        try:
            state = read_optimizer(path, policy.model)
        except FileNotFoundError:
            state = None
        except ValueError as error:
            raise Missing(f"{error}. A fresh optimizer is had with --optimizer adamw or --optimizer sgd") from error
    policy.model.float()  # derivatives along a step drown in the rounding of less
    try:
        moved = select_parameters(policy.model, parameters).named
    except ValueError as error:
        raise Missing(f"--parameters: {error}") from error
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(name in moved)
    size = sum(p.numel() for p in moved.values())
    if VECTORS * 8 * size > LARGEST * memory():
        raise Missing(
            f"the update of {size:,} parameters takes about {VECTORS * 8 * size / 2**30:,.0f} GiB, and this machine has"
            f" {memory() / 2**30:,.0f}: name fewer, like --parameters '*.{_last(policy)}.*' for the last block"
        )
    rate = learning_rate or RATES.get(policy.task.name, 1e-6)
    config = TrainConfig(task=policy.task.name, model=policy.name, learning_rate=rate, temperature=policy.temperature)
    found = Checkpoint(path, checkpoints.step_of(path) or 0, policy, config, state, 1.0)
    return found if state else found.fresh(optimizer or "adamw")


def _last(policy: Policy) -> int:
    return getattr(policy.model.config, "num_hidden_layers", 1) - 1


def batch_of(step: LoggedStep, limit: int) -> Batch:
    """The step as a batch of the checkpoint's rollouts, scored by it."""
    rollouts, encoded = step.rollouts, step.encoded
    cut = [len(ids) >= limit if flag is None else flag for ids, flag in zip(encoded.completion_ids, step.truncated)]
    scores = {**rollouts.scores, **step.scores}
    scores["entropy"] = scores["entropy"].clamp(min=0)
    own = Rollouts(rollouts.reward, rollouts.group, rollouts.mask, scores, rollouts.success_above)
    return Batch(
        [{"prompt": prompt} for prompt in step.prompts],
        list(encoded.prompt_ids),
        [tuple(ids) for ids in encoded.completion_ids],
        cut,
        [each.place for each in encoded.logged],
        own,
    )


def in_groups(batch: Batch) -> Batch:
    """The rollouts that have another one of their prompt."""
    group = batch.rollouts.group_index
    return batch.take(torch.bincount(group)[group] > 1)


@dataclass(frozen=True, eq=False)
class Autopsy:
    """What was computed: the attribution of the step that the credit makes; and {method: {goal: [P]}} of what the
    rollouts add under each, by evaluation prompt, with the length `LONG` of its step; the credit's own first.
    """

    attribution: Attribution
    methods: Mapping[str, Mapping[str, np.ndarray]]
    left_out: Mapping[str, str]
    optimistic: bool


def take_apart(
    checkpoint: Checkpoint,
    batch: Batch,
    name: str,
    credit: Tensor,
    loss: Method,
    methods: Sequence[Method],
    evaluation: Batch,
    optimistic: bool,
) -> Autopsy:
    """The step that a credit [B, T], called `name`, makes through the loss of a method; and those of other methods.
    Missing where the credit moves nothing.
    """
    value, _ = coefficients_of(loss, batch.rollouts, credit)
    if not value.any():
        raise Missing("no token of the step has a gradient: in every group the credit is 0. Choose another, --step N")
    goals, left_out = goals_on(checkpoint, evaluation)
    update = step_along(checkpoint, batch, value, credit)
    made = attribute(update, goals)
    found = {name: {LONG: np.array(norm(update.fresh))} | {g: made.parts["tokens"][g] for g in goals}}
    for method in (each for each in methods if each.name != name):
        try:
            own = Coefficients.of(method, batch)
        except (KeyError, ValueError) as error:
            left_out[method.name] = str(error.args[0] if error.args else error)
            continue
        fresh = step_along(checkpoint, own.batch, own.value, own.credit).fresh
        found[method.name] = {LONG: np.array(norm(fresh))} | changes([fresh], goals)[0]
    return Autopsy(made, found, left_out, optimistic)


def autopsy_block(a: Autopsy, step: LoggedStep, book: Book, bootstraps: int, seed: int) -> dict[str, Any]:
    """Parts of the change of every goal, who makes it, and other methods at the length of the same step."""
    update, rollouts = a.attribution.update, a.attribution.update.batch.rollouts
    mask = rollouts.mask
    row = rollouts.group_index[:, None].expand_as(mask)[mask].numpy()
    boot = Bootstrap(row, max(200, min(bootstraps, 20_000_000 // max(len(row), 1))), seed)
    success = rollouts.success[:, None].expand_as(mask)[mask].numpy()
    pieces = np.array(
        [piece for own, flags in zip(step.pieces, step.encoded.mask) for piece, kept in zip(own, flags) if kept]
    )
    goals: dict[str, Any] = {}
    for name, share in a.attribution.shares.items():
        unit, flat = UNITS[name], share[mask].numpy()
        parts = {
            part: book.enter(
                f"autopsy/{name}/{part}", a.attribution.estimate(name, part), unit, over="evaluation prompts"
            )
            for part in ("total", *PARTS)
        }
        sums = {
            what: book.enter(
                f"autopsy/{name}/{what}", boot.estimate(boot.sums(flat * inside)), unit, over="the step's prompts"
            )
            for what, inside in (("successes", success), ("failures", ~success))
        }
        goals[name] = {
            "parts": parts | sums,
            "types": _types(name, flat, pieces, boot, book),
            "half": _half(flat, pieces),
            "tokens": _largest(step, share),
        }
    return {
        "optimistic": a.optimistic,
        "lr": update.lr,
        "clip": update.clip,
        "rollouts": len(update.batch),
        "prompts": update.batch.num_prompts,
        "goals": goals,
        "methods": _methods(a, book),
        "left_out": dict(a.left_out),
    }


def _types(goal: str, share: np.ndarray, pieces: np.ndarray, boot: Bootstrap, book: Book) -> list[dict[str, Any]]:
    """The kinds of token that do most, with their sums."""
    kinds, index, count = np.unique(pieces, return_inverse=True, return_counts=True)
    sums = np.bincount(index, share, len(kinds))
    found = []
    for k in np.argsort(-np.abs(sums), kind="stable")[:TYPES].tolist():
        figure, token = boot.estimate(boot.sums(share * (index == k))), str(kinds[k])
        name = book.enter(f"autopsy/{goal}/token {token!r}", figure, UNITS[goal], over="the step's prompts")
        found.append({"token": token, "count": int(count[k]), "figure": name})
    return found


def _half(share: np.ndarray, pieces: np.ndarray) -> int:
    """The fewest kinds of token whose sums make half of Σ |sum|."""
    kinds, index = np.unique(pieces, return_inverse=True)
    sizes = np.sort(np.abs(np.bincount(index, share, len(kinds))))[::-1]
    return int(np.searchsorted(np.cumsum(sizes), sizes.sum() / 2)) + 1


def _largest(step: LoggedStep, share: Tensor) -> list[dict[str, Any]]:
    order = torch.argsort(share.abs().flatten(), descending=True, stable=True)[:LIST].tolist()
    width = share.shape[1]
    return [
        {
            "place": step.encoded.logged[at // width].place,
            "position": at % width,
            "token": step.pieces[at // width][at % width],
            "before": "".join(step.pieces[at // width][max(0, at % width - 8) : at % width]),
            "share": float(share[at // width, at % width]),
        }
        for at in order
        if share[at // width, at % width] != 0
    ]


def _methods(a: Autopsy, book: Book) -> list[dict[str, Any]]:
    """What the rollouts add under every method, at the length of the logged credit's step."""
    [first, *_], found = a.methods, []
    base = a.methods[first]
    for name, arrays in a.methods.items():
        factor = float(base[LONG]) / float(arrays[LONG]) if arrays[LONG] else 1.0
        entry: dict[str, Any] = {"name": name, "length": 1 / factor, "goals": {}, "differences": {}}
        for goal in a.attribution.shares:
            fresh, own = factor * arrays[goal], base[goal]
            over = {"over": "evaluation prompts"}
            entry["goals"][goal] = book.enter(
                f"autopsy/method {name}/{goal}", mean_of_units(fresh), UNITS[goal], **over
            )
            if name != first and np.abs(fresh - own).max() > SAME * np.abs(own).max():
                entry["differences"][goal] = book.enter(
                    f"autopsy/method {name}/{goal} minus {first}", mean_of_units(fresh - own), UNITS[goal], **over
                )
        found.append(entry)
    return found
