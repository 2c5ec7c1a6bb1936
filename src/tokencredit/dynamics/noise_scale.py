"""The gradient noise scale: how many prompts a batch needs before its gradient is more signal than noise.

    B = tr Σ / |G|²          G = E[X], Σ = Cov(X), X the gradient that one prompt with its K rollouts gives

The unit is the prompt, because credit that compares siblings couples the rollouts of a group. A batch is the mean over
P prompts, so E|batch gradient|² = |G|² + tr Σ / P, and at P = B half of it is noise. Both parts are estimated without
bias and without clamping: |G|² from products of different prompts alone, tr Σ as what is left of the squares. Their
ratio is taken last (a ratio of averages).

Source: McCandlish et al. (arXiv:1812.06162) eq. 2.8 and app. A.1, with prompts for examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencredit.stats import Estimate, jackknife, jackknife_ratio

FLIPS = 4000


@dataclass(frozen=True)
class NoiseScale:
    """What the gradients of P prompts say.

    signal   |G|², squared norm of the expected gradient; an estimate may come out below 0
    noise    tr Σ, of one prompt's gradient
    scale    their ratio, in prompts; without an upper end where |G|² may be 0
    p_noise  how often noise alone, G = 0, would give a |G|² this large: from 0.05 up, |G|² is not resolved
    """

    signal: Estimate
    noise: Estimate
    scale: Estimate
    p_noise: float

    @property
    def resolved(self) -> bool:
        return self.p_noise < 1 - self.scale.level


def noise_scale(gram: Tensor, *, level: float = 0.95, seed: int = 0) -> NoiseScale:
    """The noise scale from the products X_p · X_q [P, P] of the prompts' gradients, each the mean over the prompt's
    rollouts.

    Intervals: jackknife over prompts, Fieller's for the ratio. `p_noise` flips the signs of whole prompts at random
    (`seed`).
    """
    gram = gram.double()
    signal, signals = signal_of(gram)
    noise, noises = _noise_of(gram, signal, signals)
    ratio = jackknife_ratio(noise, signal, (noises, signals), level)
    return NoiseScale(jackknife(signal, signals, level), jackknife(noise, noises, level), ratio, _p_noise(gram, seed))


def signal_of(gram: Tensor) -> tuple[float, np.ndarray]:
    """(|G|², [P] the same without one prompt each): the U-statistic Σ_{p≠q} X_p · X_q / (P(P − 1)) of products [P,
    P].
    """
    num = len(gram)
    if gram.shape != (num, num) or num < 3:
        raise ValueError(
            "a noise scale with an interval needs the products [P, P] of at least 3 prompts, got shape"
            f" {list(gram.shape)}"
        )
    square, row = gram.diagonal(), gram.sum(1)
    pairs = row.sum() - square.sum()
    left = (pairs - 2 * (row - square)) / ((num - 1) * (num - 2))
    return float(pairs / (num * (num - 1))), left.numpy()


def mean_without(values: Tensor) -> tuple[float, np.ndarray]:
    """(mean, [P] mean without one each) of values [P]."""
    values = values.double()
    return float(values.mean()), ((values.sum() - values) / (len(values) - 1)).numpy()


def _noise_of(gram: Tensor, signal: float, signals: np.ndarray) -> tuple[float, np.ndarray]:
    square, squares = mean_without(gram.diagonal())
    return square - signal, squares - signals


def _p_noise(gram: Tensor, seed: int) -> float:
    """Share of sign flips of whole prompts, the batch as it is included, whose |G|² is at least that of the batch."""
    signs = torch.randint(0, 2, (FLIPS, len(gram)), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    flipped = ((signs @ gram) * signs).sum(1)
    return float((1 + (flipped >= gram.sum() * (1 - 1e-12)).sum()) / (1 + FLIPS))


def from_pieces(squares: Sequence[float], sizes: Sequence[float], total: float) -> tuple[float, float]:
    """(|G|², tr Σ) from the squared norms of gradients that add up: J pieces gⱼ of nⱼ prompts each, and their sum.

        |G|² = (|Σ gⱼ|² − Σ|gⱼ|²) / (n² − Σ nⱼ²)        tr Σ = (Σ|gⱼ|² − |G|² Σ nⱼ²) / n

    gⱼ is the sum of its prompts' X_p. Needs no product of gradients, so pieces can come one after the other; no prompt
    may be in two. With equal pieces these are eqs. A.2 and A.3 of the paper (its B_big and B_small), with pieces of one
    prompt the U-statistic above.
    """
    n, square = np.asarray(sizes, float), float(np.asarray(squares, float).sum())
    if (n > 0).sum() < 2:
        raise ValueError(f"two pieces with prompts are the least, got sizes {n.tolist()}")
    num, own = n.sum(), (n**2).sum()
    signal = (total - square) / (num**2 - own)
    return float(signal), float((square - signal * own) / num)
