"""Tokens that appear and vanish: in how many of a prompt's rollouts a token stands, late in the log less early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from tokencredit.stats import difference_of_units, holm
from tokencredit.studies.book import Book
from tokencredit.studies.inspect.sample import LoggedStep

SHOWN = 10
FEW = 8
"""Groups of either end below which nothing is said."""
CANDIDATES = 2000
"""Tokens that are tested: those that most rollouts have."""


def presence(steps: Sequence[LoggedStep]) -> tuple[list[str], np.ndarray]:
    """(tokens, [G, tokens]): the share of a group's rollouts that have each token."""
    place: dict[str, int] = {}
    groups: dict[tuple[int, int], list[set[int]]] = {}
    for step in steps:
        for own, group in zip(step.pieces, step.encoded.group):
            found = {place.setdefault(piece.strip(), len(place)) for piece in own if piece.strip()}
            groups.setdefault((step.step, group), []).append(found)
    shares = np.zeros((len(groups), len(place)), np.float32)
    for row, members in zip(shares, groups.values()):
        for found in members:
            row[list(found)] += 1 / len(members)
    return list(place), shares


def changed_words(early: Sequence[LoggedStep], late: Sequence[LoggedStep], book: Book) -> list[dict[str, Any]]:
    """The tokens whose share changed most, those alone whose change holds after Holm over all that were looked at."""
    (first, before), (second, after) = presence(early), presence(late)
    if min(len(before), len(after)) < FEW:
        return []
    names = sorted({*first, *second})
    both = [_columns(own, shares, names) for own, shares in ((first, before), (second, after))]
    tested = np.argsort(-(both[0].mean(0) + both[1].mean(0)), kind="stable")[:CANDIDATES]
    adjusted = holm(_p(both[1][:, tested], both[0][:, tested]))
    gap = both[1].mean(0) - both[0].mean(0)
    kept = sorted(((float(p), k) for p, k in zip(adjusted, tested) if p < 0.05), key=lambda each: -abs(gap[each[1]]))
    found = []
    for p, k in kept[:SHOWN]:
        change = difference_of_units(both[1][:, k], both[0][:, k])
        figure = book.enter(f"log/token {names[k]!r}", change, "share of rollouts", over="groups", holm=p)
        early, late = (float(x[:, k].mean()) for x in both)
        found.append({"token": names[k], "figure": figure, "early": early, "late": late})
    return found


def _columns(own: Sequence[str], shares: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """[G, names]: the shares, 0 for a token that is not there."""
    found = np.zeros((len(shares), len(names)))
    place = {name: k for k, name in enumerate(names)}
    found[:, [place[name] for name in own]] = shares
    return found


def _p(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[K]: Welch's two-sided p of every column; columns that never vary differ or do not."""
    gap = x.mean(0) - y.mean(0)
    parts = [each.var(0, ddof=1) / len(each) for each in (x, y)]
    variance, scale = sum(parts), sum(part**2 / (len(each) - 1) for part, each in zip(parts, (x, y)))
    varies = variance > 1e-12
    freedom = np.divide(variance**2, scale, out=np.ones_like(gap), where=varies)
    t = np.divide(np.abs(gap), np.sqrt(variance), out=np.zeros_like(gap), where=varies)
    return np.where(varies, 2 * stats.t.sf(t, freedom), np.where(np.abs(gap) > 1e-6, 0.0, 1.0))
