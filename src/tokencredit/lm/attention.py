"""Attention kernels: the switch that forward mode needs, and the attention that each token receives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokencredit.lm.models import CausalModel
from tokencredit.lm.readout import Readout, Sequences


def implementation(model: CausalModel) -> str:
    """The attention implementation of a Hugging Face model: "eager", "sdpa", "flash_attention_2", ..."""
    return getattr(model.config, "_attn_implementation", None) or "eager"


@contextmanager
def attention_as(model: CausalModel, name: str) -> Iterator[None]:
    """Another attention implementation inside, the former one after. ValueError where the model has none of that
    name.
    """
    former = implementation(model)
    if former == name:
        yield
        return
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"{type(model).__name__} cannot switch its attention from {former} to {name}")
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot switch its attention from {former} to {name}: {error}"
        ) from error
    try:
        yield
    finally:
        model.set_attn_implementation(former)


@contextmanager
def differentiable_attention(model: CausalModel) -> Iterator[None]:
    """Attention with forward-mode derivatives inside: sdpa keeps its implementation with the math kernel, other kernels
    become eager.
    """
    if implementation(model) == "sdpa":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        with attention_as(model, "eager"):
            yield


@torch.no_grad()
def attention_received(readout: Readout, batch: Sequences, tokens: int) -> Tensor:
    """[N]: the attention that a token receives from later tokens.

        aⱼ = 1/(n−j) Σ_{i>j} Σ_heads A_ij        averaged over the layers that report attention weights; 0 for a row's
                                                 last token

    n − j is the number of later queries. Memory is quadratic in the length, so rows are taken a few at a time, with
    eager attention.
    """
    found = torch.zeros(len(batch), device=batch.ids.device)
    with attention_as(readout.model, "eager"):
        for part, keep in batch.chunks(min(tokens, 2048)):
            # As in Readout.hidden, the padding on the right is not masked: no token sees it.
            out = readout.body(
                input_ids=part.ids,
                attention_mask=torch.ones_like(part.attention),
                use_cache=False,
                output_attentions=True,
            )
            layers = [a for a in getattr(out, "attentions", None) or () if a is not None and a.dim() == 4]
            if not layers:
                raise ValueError(
                    f"{type(readout.model).__name__} reports no attention weights [B, heads, L, L]: nothing to sum"
                )
            for depth, weights in enumerate(layers):
                _check_weights(readout, depth, weights.float(), part.attention.bool())
            length = part.attention.sum(1)
            width = part.ids.shape[1]
            later = torch.ones(width, width, device=found.device).tril(-1) * part.attention[:, :, None]
            total = sum((a.float().sum(1) * later).sum(1) for a in layers) / len(layers)
            count = (length[:, None] - 1 - torch.arange(width, device=found.device)).clamp(min=1)
            found[keep] = (total / count)[part.row, part.position + 1]
    return found


def _check_weights(readout: Readout, depth: int, weights: Tensor, there: Tensor) -> None:
    """ValueError where the reported weights [B, heads, L, L] are not those of causal attention: not a distribution over
    earlier tokens (or less, where a sink takes its part), or with weight on later ones.
    """
    name = type(readout.model).__name__
    if weights.shape[-2:] != (there.shape[1], there.shape[1]):
        raise ValueError(
            f"{name} reports attention weights {list(weights.shape)}, not [B, heads, L, L]: nothing to sum"
        )
    rows = weights.transpose(1, 2)[there]
    ahead = float(weights.triu(1).transpose(1, 2)[there].sum(-1).max())
    if not ahead <= 1e-3:
        raise ValueError(
            f"{name} has no attention proxy: in layer {depth} a token gives {ahead:.2g} of its reported attention to"
            " later tokens. The switch to eager attention did not take effect; load the model with"
            " attn_implementation='eager'"
        )
    total = rows.sum(-1)
    if not bool(torch.isfinite(rows).all() & (rows >= 0).all() & (total <= 1.01).all() & (total > 0).all()):
        raise ValueError(
            f"{name} has no attention proxy: what layer {depth} reports are not weights that add up to 1 for a query"
            f" (from {float(total.min()):.3g} to {float(total.max()):.3g})"
        )
