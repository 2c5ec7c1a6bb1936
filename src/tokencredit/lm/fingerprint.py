"""A model by its contents: two that are called alike need not be the same."""

from __future__ import annotations

import hashlib

import torch

from tokencredit.lm.models import CausalModel


def model_hash(model: CausalModel) -> str:
    """32 hex digits of a model's parameters and buffers, names included, and of its architecture."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
