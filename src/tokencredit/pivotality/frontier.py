"""The growing edge of a prefix tree: next-token logits for many prefixes of one length, with a shared key-value
cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokencredit.lm.models import CausalModel


class Frontier:
    """Prefixes of equal length under one model. `start` gives the logits after the prompts, `advance` those one token
    later.

    model       called as model(input_ids=[n,t], cache=cache, use_cache=True), answering `.logits` [n,t,V] as
                in transformers
    prompts     [P,L] token ids
    batch       rows per forward pass
    use_cache   False calls model(input_ids=whole prefixes) instead: slower, and asks nothing of the model but `.logits`
    """

    def __init__(self, model: CausalModel, prompts: Tensor, batch: int, use_cache: bool) -> None:
        if prompts.numel() == 0:
            raise ValueError("a prompt needs at least one token, such as <bos>, for the model to predict from")
        self.model, self.batch, self.use_cache = model, batch, use_cache
        self.device = getattr(model, "device", torch.device("cpu"))
        self.prompts = prompts
        self._ids = prompts
        self._caches: list[tuple[Any, int]] = []  # (cache, number of rows), in row order

    def start(self) -> Tensor:
        """Logits after each prompt [P,V], float64."""
        return self._recompute(self.prompts) if not self.use_cache else self._prefill()

    def advance(self, parent: Tensor, token: Tensor) -> Tensor:
        """Logits [n,V], float64, of the prefixes made by adding token[i] to row parent[i] (ascending) of the last
        call.
        """
        if not self.use_cache:
            return self._recompute(torch.cat([self._ids[parent], token[:, None]], 1))
        caches, self._caches, logits = self._caches, [], []
        bounds = torch.tensor([0, *(rows for _, rows in caches)]).cumsum(0)
        stops = torch.searchsorted(parent, bounds).tolist()
        for k, (cache, rows) in enumerate(caches):
            pieces = [slice(i, min(i + self.batch, stops[k + 1])) for i in range(stops[k], stops[k + 1], self.batch)]
            for piece in pieces:
                mine = cache if piece is pieces[-1] else copy.deepcopy(cache)
                chosen = parent[piece] - bounds[k]
                if len(chosen) != rows or bool((chosen != torch.arange(rows)).any()):
                    mine.batch_select_indices(chosen.to(self.device))
                logits.append(self._forward(token[piece, None], mine))
                self._caches.append((mine, len(chosen)))
        return torch.cat(logits)

    def _prefill(self) -> Tensor:
        from transformers import DynamicCache

        logits = []
        for ids in self.prompts.split(self.batch):
            cache = DynamicCache(config=self.model.config)
            logits.append(self._forward(ids, cache))
            self._caches.append((cache, len(ids)))
        return torch.cat(logits)

    def _forward(self, ids: Tensor, cache: Any) -> Tensor:
        from tokencredit.lm.key_values import cached

        return self._last(self.model(input_ids=ids.to(self.device), **cached(self.model, cache)))

    def _recompute(self, ids: Tensor) -> Tensor:
        self._ids = ids
        return torch.cat([self._last(self.model(input_ids=piece.to(self.device))) for piece in ids.split(self.batch)])

    @staticmethod
    def _last(output: Any) -> Tensor:
        return output.logits[:, -1].double().cpu()


@contextmanager
def measuring(model: CausalModel) -> Iterator[None]:
    """No gradients and no dropout inside; the model's own mode afterwards."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.train()
