"""Exact per-token gradients: one backward pass per token, several at a time where memory allows. The reference of every
sketch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tokencredit.lm.directions import Coverage
from tokencredit.lm.readout import Readout, Sequences, check_finite

ELEMENTS = 1 << 25
"""Gradient elements that are held at once (128 MiB in float32)."""


@contextmanager
def differentiating(coverage: Coverage) -> Iterator[list[Tensor]]:
    """The covered parameters with gradients switched on inside (frozen base weights of a PEFT model too); `.grad` is
    left alone.
    """
    frozen = [p for p in coverage.named.values() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield list(coverage.named.values())
    finally:
        for p in frozen:
            p.requires_grad_(False)


def gradient_norms2(readout: Readout, coverage: Coverage, batch: Sequences) -> Tensor:
    """[N]: ‖∇_θ log p(t)‖² over the covered parameters, for every scored token."""
    found = torch.zeros(len(batch), dtype=torch.float64, device=batch.ids.device)
    with differentiating(coverage) as parameters:
        for part, keep in batch.chunks(1):
            log_p = _log_probs(readout, part)
            chosen = log_p.gather(1, part.target[:, None])[:, 0]
            found[keep] = _squared(chosen, parameters, range(len(chosen)))
    return found


def fisher_traces(readout: Readout, coverage: Coverage, batch: Sequences) -> Tensor:
    """[N]: tr F = Σᵥ pᵥ ‖∇_θ log pᵥ‖², one backward pass per token and vocabulary entry."""
    found = torch.zeros(len(batch), dtype=torch.float64, device=batch.ids.device)
    with differentiating(coverage) as parameters:
        for part, keep in batch.chunks(1):
            log_p = _log_probs(readout, part)
            norms2 = _squared(log_p.flatten(), parameters, range(log_p.numel())).view(log_p.shape)
            found[keep] = (norms2 * log_p.detach().double().exp()).sum(1)
    return found


def _log_probs(readout: Readout, part: Sequences) -> Tensor:
    """[n, V] of one row's scored tokens, with a graph; from the hidden states on in float64, as 1 − p of a near-certain
    token needs it.
    """
    hidden = readout.hidden(part.ids, part.attention)[part.row, part.position]
    check_finite(hidden, "hidden states")
    return torch.log_softmax(readout.head.logits(hidden.double()), -1)


def _squared(values: Tensor, parameters: list[Tensor], which: range) -> Tensor:
    """[len(which)]: squared gradient norms of some elements of a vector, in float64."""
    chunk = max(min(ELEMENTS // sum(p.numel() for p in parameters), 64), 1)
    found = []
    for start in range(which.start, which.stop, chunk):
        some = torch.arange(start, min(start + chunk, which.stop), device=values.device)
        found.append(_squared_chunk(values, parameters, some))
    return torch.cat(found) if found else values.new_zeros(0, dtype=torch.float64)


def _squared_chunk(values: Tensor, parameters: list[Tensor], some: Tensor) -> Tensor:
    grads = [g for g in element_gradients(values, parameters, some) if g is not None]
    return sum(torch.linalg.vector_norm(g.flatten(1), dim=1).double().square() for g in grads)


def element_gradients(values: Tensor, parameters: list[Tensor], some: Tensor) -> list[Tensor | None]:
    """[len(some), ...] for every parameter: the gradients of some elements of a vector; None for a parameter that has
    no part in it.
    """
    options = {"retain_graph": True, "allow_unused": True}
    if len(some) > 1:
        basis = torch.nn.functional.one_hot(some, len(values)).to(values.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return list(torch.autograd.grad(values, parameters, basis, is_grads_batched=True, **options))
        except (RuntimeError, NotImplementedError):
            pass
    rows = [torch.autograd.grad(values[i], parameters, **options) for i in some.tolist()]
    return [
        None if all(g is None for g in each) else torch.stack([torch.zeros_like(p) if g is None else g for g in each])
        for p, each in zip(parameters, zip(*rows))
    ]
