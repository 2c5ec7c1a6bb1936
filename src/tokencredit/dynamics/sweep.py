"""A sweep over groups of rollouts, a reverse pass for each: how far it is, and what it has summed up so far, in a file,
so that one that was killed goes on within seconds of work and ends with the same numbers.

The sums may be as large as the model. They are stored when the work since they were is worth it: after `EVERY` seconds,
and `WORTH` times as long as storing them took. No number depends on when that is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokencredit.durable import replace_file
from tokencredit.lm.sampling import Progress
from tokencredit.stages import stored_arrays

EVERY, WORTH = 20.0, 20.0
ALL = 1 << 30
"""Directions at once where there is no limit: one time over the groups."""


class Sweep:
    """
    path       of the file, a .npz; None keeps nothing
    keys       names of the directions, as many as there are: a file that lacks one of them is of another sweep, and is
               not used
    progress   hears of every group, and first of how many are left
    """

    def __init__(self, path: Path | None = None, keys: Sequence[str] = (), progress: Progress | None = None) -> None:
        self.path, self.keys, self.progress = path, list(keys), progress
        self.stored_at, self.cost, self.at_once = time.perf_counter(), 0.0, ALL

    def begin(self, num: int, products: Tensor, sums: Sequence[Mapping[str, Tensor] | None], at_once: int = ALL) -> int:
        """How many of `num` groups are done; what came of them is put into the products [K, G] and the sums. Directions
        are taken `at_once`, and the next ones at another time over all groups: what was done in other times is not
        used.
        """
        self.at_once = at_once
        done = self._read(products, sums) if self.path is not None and self.path.exists() else 0
        self.stored_at = time.perf_counter()
        if self.progress:
            self.progress(0, total=num - done)
        return done

    def _read(self, products: Tensor, sums: Sequence[Mapping[str, Tensor] | None]) -> int:
        wanted = {f"{k}/{name}": x for k, each in enumerate(sums) for name, x in (each or {}).items()}
        with stored_arrays(self.path) as stored:
            place = {str(key): row for row, key in enumerate(stored["keys"])}
            if not place.keys() >= set(self.keys) or not set(stored) >= {*wanted, "at_once"}:
                return 0
            before = int(stored["at_once"])
            alike = before == self.at_once and list(place) == self.keys
            if not alike and min(before, self.at_once) < len(place):
                return 0
            products.copy_(torch.from_numpy(stored["products"][[place[key] for key in self.keys]]))
            for name, x in wanted.items():
                x.copy_(torch.from_numpy(stored[name]))
            return int(stored["done"])

    def heard(self, done: int, products: Tensor, sums: Sequence[Mapping[str, Tensor] | None]) -> None:
        """One more group is done, `done` of them in all."""
        if self.progress:
            self.progress(1)
        if self.path is None or time.perf_counter() - self.stored_at < max(EVERY, WORTH * self.cost):
            return
        start = time.perf_counter()
        arrays = {f"{k}/{name}": x.cpu().numpy() for k, each in enumerate(sums) for name, x in (each or {}).items()}
        arrays |= {"done": np.array(done), "keys": np.array(self.keys), "products": products.numpy()}
        arrays |= {"at_once": np.array(self.at_once)}
        replace_file(self.path, lambda file: np.savez(file, **arrays))
        self.stored_at = time.perf_counter()
        self.cost = self.stored_at - start
