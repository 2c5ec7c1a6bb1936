"""The distribution that samples, and draws from it: temperature, top-k and top-p, and uniforms that belong to a
request, not to a batch.

    π(v) ∝ exp(zᵥ / T) on the kept tokens, 0 elsewhere        u = hash(seed, step) ∈ [0, 1)
                                                                                     token = min {v : Σ_{w≤v} π(w) > u}

A uniform is a function of (seed, step) alone (splitmix64, a counter-based generator), so a request draws the same
numbers in any batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_CELLS = 1 << 24  # elements of the float64 cumulative sum held at once


@dataclass(frozen=True)
class Settings:
    """How a policy is sampled. temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"a sampler needs temperature ≥ 0, top_k ≥ 0 and 0 < top_p ≤ 1, not {self}")

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def log_probs(logits: Tensor, settings: Settings) -> Tensor:
    """log π [..., V], float32 or better, normalised over the kept tokens; −inf elsewhere. ValueError where logits are
    NaN or all −inf.

    The filters are those of transformers, in its order: temperature, then top-k (ties are kept), then top-p (at least
    one token stays).
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    if settings.temperature == 0:
        _check(z.amax(-1))
        return torch.full_like(z, -torch.inf).scatter(-1, z.argmax(-1, keepdim=True), 0.0)
    z = z / settings.temperature
    if 0 < settings.top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(settings.top_k).values[..., -1:], -torch.inf)
    if settings.top_p < 1:
        ordered, index = z.sort(-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        drop[..., -1] = False
        z = z.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
    total = z.logsumexp(-1, keepdim=True)
    _check(total)
    return z - total


def _check(total: Tensor) -> None:
    if not bool(torch.isfinite(total).all()):
        raise ValueError(
            "the model gave logits that are NaN or infinite: nothing can be sampled from them. Look at its weights and"
            " dtype"
        )


def entropy(log_p: Tensor) -> Tensor:
    """−Σ p log p in nats [...], of the distribution that samples."""
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """One token per row [n] by inverting the cumulative distribution: log_p [n,V], uniform [n] float64."""
    rows = max(1, _CELLS // log_p.shape[-1])
    found = []
    for some, u in zip(log_p.split(rows), uniform.split(rows)):
        mass = some.double().exp_().cumsum(-1)
        # The product stays below the total, so that the token found has probability > 0 even when the sum is not quite
        # 1.
        point = torch.minimum(u * mass[:, -1], torch.nextafter(mass[:, -1], torch.zeros_like(u)))
        found.append(torch.searchsorted(mass, point[:, None], right=True)[:, 0])
    return torch.cat(found)


def uniforms(seeds: Tensor, step: Tensor) -> Tensor:
    """float64 in [0, 1) [n]: the number that request `seeds` [n] (int64) uses at `step` [n] (int64)."""
    bits = _splitmix(_splitmix(seeds) + (step + 1) * _GOLDEN)
    return _shift(bits, 11).double() * 2.0**-53


def _splitmix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def seed_of(*parts: int | str | bytes) -> int:
    """A 63-bit seed from anything that names a request: equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1
