"""The logged credit, and what methods would have given on the same rollouts: how far they agree, where they go against
the outcome, and where their mass goes.

    against the outcome   Σ |c| over tokens whose credit has not the outcome's sign, over Σ |c|
    agreement             cosine Σ c c' / √(Σ c² Σ c'²), and how often two credits have one sign

Intervals are over prompts (groups).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.agreement.ranks import share_of_top
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.method import Method
from tokencredit.studies.book import Book
from tokencredit.studies.inspect.sample import LoggedStep

LOGGED = "logged"
DRAWN = 20_000_000
"""Draws times tokens of a bootstrap, at most; never fewer than 200 draws."""
TOP = 0.2


def credits(steps: Sequence[LoggedStep], methods: Sequence[Method]) -> tuple[list[dict[str, Tensor]], dict[str, str]]:
    """({name: [B, T]} of every step, the logged one first where there is one; {method: why it is left out})."""
    found: list[dict[str, Tensor]] = [{} for _ in steps]
    if all(step.credit is not None for step in steps):
        for own, step in zip(found, steps):
            own[LOGGED] = step.credit
    left_out = {}
    for method in methods:
        try:
            for own, step in zip(found, steps):
                own[method.name] = method.credit(step.rollouts).double()
        except (KeyError, ValueError) as error:
            left_out[method.name] = str(error.args[0] if error.args else error)
            for own in found:
                own.pop(method.name, None)
    return found, left_out


def credit_block(
    steps: Sequence[LoggedStep], found: Sequence[Mapping[str, Tensor]], book: Book, bootstraps: int, seed: int
) -> dict[str, Any]:
    """Figures of every credit over the tokens of the sampled steps."""
    flat = {name: np.concatenate([own[name][s.mask].numpy() for own, s in zip(found, steps)]) for name in found[0]}
    mask = [step.mask for step in steps]
    first = np.cumsum([0, *(step.num_prompts for step in steps)])
    cluster = np.concatenate([(step.rollouts.group_index + int(start))[:, None].expand_as(m)[m].numpy()
                              for step, start, m in zip(steps, first, mask)])  # fmt: skip
    success = np.concatenate([step.rollouts.success[:, None].expand_as(m)[m].numpy() for step, m in zip(steps, mask)])
    places = np.concatenate([_place(m)[m].numpy() for m in mask])
    boot = Bootstrap(cluster, max(200, min(bootstraps, DRAWN // max(len(cluster), 1))), seed)
    entropy = _entropy(steps)
    block: dict[str, Any] = {"tokens": len(cluster), "groups": boot.num_clusters, "methods": {}}
    for name, x in flat.items():
        block["methods"][name] = _one(name, x, success, places, entropy, boot, book)
        if LOGGED in flat and name != LOGGED:
            block["methods"][name] |= _beside(name, x, flat[LOGGED], boot, book)
    return block


def _place(mask: Tensor) -> Tensor:
    """[B, T]: where a token stands in its completion, 0 the first and 1 the last."""
    count = mask.cumsum(1).double()
    return (count - 1) / (count[:, -1:] - 1).clamp(min=1)


def _entropy(steps: Sequence[LoggedStep]) -> np.ndarray | None:
    if any("entropy" not in step.rollouts.scores for step in steps):
        return None
    return np.concatenate([step.rollouts.score("entropy")[step.mask].numpy() for step in steps])


def _one(
    name: str,
    x: np.ndarray,
    success: np.ndarray,
    places: np.ndarray,
    entropy: np.ndarray | None,
    boot: Bootstrap,
    book: Book,
) -> dict[str, str]:
    """Where one credit goes: shares of Σ |c|, and of tokens."""
    size, over = np.abs(x), {"over": "groups"}
    against = (x != 0) & ((x > 0) != success)
    parts = {
        "tokens with credit": ((x != 0).astype(float), np.ones_like(x)),
        "against the outcome": (size * against, size),
        "on successes": (size * success, size),
        "on the last fifth of a completion": (size * (places >= 0.8), size),
    }
    found = {
        what: book.enter(f"credit/{name}/{what}", boot.estimate(_ratio(boot.sums(a), boot.sums(b))), "share", **over)
        for what, (a, b) in parts.items()
    }
    tops = {"its own top 2 %": (size, 0.02)} | ({} if entropy is None else {"the top 20 % by entropy": (entropy, TOP)})
    for what, (by, share) in tops.items():
        draws = share_of_top(by, size, share, boot.weights, per_token=False)
        found[what] = book.enter(f"credit/{name}/{what}", boot.estimate(draws), "share of Σ |credit|", **over)
    return found


def _beside(name: str, x: np.ndarray, logged: np.ndarray, boot: Bootstrap, book: Book) -> dict[str, str]:
    both = ((x != 0) | (logged != 0)).astype(float)
    same = both * (np.sign(x) == np.sign(logged))
    top, a, b = boot.sums(np.stack([x * logged, x * x, logged * logged], 1)).T
    cosine = _ratio(top, np.sqrt(a * b))
    found = {"cosine with the logged": cosine, "same sign as the logged": _ratio(boot.sums(same), boot.sums(both))}
    return {
        what: book.enter(f"credit/{name}/{what}", boot.estimate(draws), "1", over="groups")
        for what, draws in found.items()
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)


def disagreements(step: LoggedStep, credit: Tensor, num: int = 10) -> list[dict[str, Any]]:
    """The rollouts with the most credit against their outcome: place, outcome, and how much of it."""
    rollouts = step.rollouts
    sign = torch.where(rollouts.success, 1.0, -1.0)[:, None]
    wrong = (credit.abs() * (credit.sign() == -sign)).sum(1)
    order = torch.argsort(-wrong, stable=True)[:num].tolist()
    return [
        {"place": step.encoded.logged[i].place, "success": bool(rollouts.success[i]), "against": float(wrong[i])}
        for i in order
        if wrong[i] > 0
    ]
