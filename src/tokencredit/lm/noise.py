"""How much a token's probability varies when the model is perturbed, by sampling: Gaussian noise on the weights, or
dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tokencredit.lm.directions import Coverage
from tokencredit.lm.head import chosen_logprob
from tokencredit.lm.readout import Readout, Sequences
from tokencredit.masked import wide

SCALES = {"gaussian": 1e-3, "dropout": 0.1}
"""Kinds of perturbation that are sampled, and how strong one is unless told."""


def scale_of(kind: str, scale: float | None) -> float:
    """The strength of a sampled perturbation. ValueError for one that perturbs nothing, or drops everything."""
    found = SCALES[kind] if scale is None else scale
    if not found > 0 or (kind == "dropout" and found >= 1):
        raise ValueError(f"{kind} perturbs by a scale above 0{' and below 1' * (kind == 'dropout')}, not {found:g}")
    return found


@torch.no_grad()
def sampled_variance(
    readout: Readout, coverage: Coverage, batch: Sequences, *, num: int, seed: int, kind: str, scale: float, tokens: int
) -> tuple[Tensor, Tensor]:
    """(variance of p(t) over `num` perturbed models, its standard error), each [N].

    kind "gaussian": θ + σ z over the covered parameters, z standard normal, σ = scale; the variance is divided by σ²,
    so that it tends to p² ‖∇log p‖² as σ → 0. kind "dropout": inputs of the covered linear layers dropped at rate
    `scale`, one draw per position; not divided. The standard error is √((m₄ − m₂²)/num) with the sample's central
    moments.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(num):
        with (
            _noisy(coverage, scale, generator) if kind == "gaussian" else _dropped(readout, coverage, scale, generator)
        ):
            found.append(_probabilities(readout, batch, tokens))
    p = torch.stack(found).double()
    deviation = p - p.mean(0)
    second, fourth = deviation.square().mean(0), deviation.pow(4).mean(0)
    unit = scale**2 if kind == "gaussian" else 1.0
    error = ((fourth - second.square()).clamp(min=0) / num).sqrt()
    return second * (num / (num - 1)) / unit, error * (num / (num - 1)) / unit


def _probabilities(readout: Readout, batch: Sequences, tokens: int) -> Tensor:
    found = torch.zeros(len(batch), device=batch.ids.device, dtype=torch.float64)
    for part, keep in batch.chunks(tokens):
        hidden = wide(readout.hidden(part.ids, part.attention)[part.row, part.position])
        found[keep] = chosen_logprob(hidden, readout.head, part.target).double().exp()
    return found


@contextmanager
def _noisy(coverage: Coverage, sigma: float, generator: torch.Generator) -> Iterator[None]:
    kept = {name: p.detach().clone() for name, p in coverage.named.items()}
    try:
        for p in coverage.named.values():
            p.add_(torch.randn(p.shape, generator=generator).to(p.device, p.dtype), alpha=sigma)
        yield
    finally:
        for name, p in coverage.named.items():
            p.copy_(kept[name])


@contextmanager
def _dropped(readout: Readout, coverage: Coverage, rate: float, generator: torch.Generator) -> Iterator[None]:
    covered = {id(p) for p in coverage.named.values()}

    def drop(module, args):
        keep = torch.rand(args[0].shape, generator=generator) >= rate
        return (args[0] * keep.to(args[0].device, args[0].dtype) / (1 - rate), *args[1:])

    layers = [m for m in readout.body.modules() if isinstance(m, nn.Linear) and id(m.weight) in covered]
    if not layers:
        raise ValueError("dropout needs linear layers among the covered parameters")
    handles = [m.register_forward_pre_hook(drop) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
