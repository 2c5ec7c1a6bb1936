"""Random draws that belong to a row and a step, not to a batch or a process."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencredit.lm.distribution import seed_of, uniforms


def uniform_draws(seed: int, step: int, row: Tensor, width: int) -> Tensor:
    """[B, width] uniform in [0, 1), a function of seed, step, row [B] and position."""
    return uniforms((seed_of("uniform", seed, step) + row)[:, None], torch.arange(width)).float()
