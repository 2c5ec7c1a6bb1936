"""Where the noise of a batch gradient comes from: prompts, rollouts, or pairs of siblings.

A batch of P prompts with K rollouts each has the variance tr Cov = V(K) / P,

    V(K) = τ + α / K + β / (K (K − 1))

    τ   between prompts: tr Cov(G_p), G_p the expected gradient of prompt p
    α   of single rollouts, β of pairs of siblings

Independent rollouts have β = 0: one-way random effects. Leave-one-out credit does not: its baseline is noisy too, and
its gradient is the U-statistic over pairs of siblings with kernel h_kj = ½ (R_k − R_j)(s_k − s_j), s_k = ∇ of the
rollout's weighted log-probability. By Hoeffding (1948), with E₀, E₁, E₂ the mean product of two kernels that share no,
one or both rollouts,

    α = 4 (E₁ − E₀)        β = 2 (E₂ − 2 E₁ + E₀)        E|G_p|² = E₀

so the split holds for every K, not only for the measured one. Where |s|² says nothing about R, β ≈ α and V(K) ≈ τ + α /
(K − 1): within a prompt, leave-one-out with K rollouts is then as noisy as K − 1 independent ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.noise_scale import mean_without, signal_of
from tokencredit.stats import Estimate, jackknife


@dataclass(frozen=True)
class VarianceSplit:
    """τ, α and β of one batch of prompts, measured at `group` rollouts each; estimates may come out below 0.

    left_out   [3, P]: the three without one prompt each
    smallest   the fewest rollouts of a prompt that the split holds for
    """

    between: Estimate
    rollout: Estimate
    pair: Estimate
    group: int
    left_out: np.ndarray
    smallest: int

    @property
    def parts(self) -> np.ndarray:
        return np.array([self.between.value, self.rollout.value, self.pair.value])

    def variance(self, prompts: int, group: int) -> Estimate:
        """tr Cov of the gradient of a batch of so many prompts and rollouts of each, with its jackknife interval."""
        if prompts < 1 or group < self.smallest:
            raise ValueError(
                f"a batch has at least 1 prompt and {self.smallest} rollouts of it, got {prompts} and {group}"
            )
        load = loads(group) / prompts
        return jackknife(load @ self.parts, load @ self.left_out, self.between.level)


def loads(group: np.ndarray | int) -> np.ndarray:
    """[..., 3]: what τ, α and β weigh in V(K). A group of one has no pair."""
    k = np.asarray(group, float)
    return np.stack([np.ones_like(k), 1 / k, np.where(k > 1, 1 / (k * np.maximum(k - 1, 1e-300)), 0.0)], -1)


def independent(gram: Tensor, group: Tensor, *, level: float = 0.95) -> VarianceSplit:
    """The split of rollouts that do not see each other, from the products [N, N] of their gradients and the prompt [N]
    of each.

        α_p = Σ_k |x_k − X_p|² / (K − 1)        |G_p|² = |X_p|² − α_p / K

    ValueError for groups of one or of different sizes.
    """
    blocks, prompts, size = _blocks(gram, group, 2)
    square = prompts.diagonal()
    rollout = (blocks.diagonal(dim1=1, dim2=2).sum(1) - size * square) / (size - 1)
    return _split(prompts, square - rollout / size, rollout, torch.zeros_like(rollout), size, 1, level)


def leave_one_out(gram: Tensor, reward: Tensor, group: Tensor, *, level: float = 0.95) -> VarianceSplit:
    """The split of leave-one-out credit, from the products s_k · s_j [N, N], the reward [N] and the prompt [N] of every
    rollout.

    s of a rollout whose group has equal rewards is never looked at (finite numbers in its place will do). ValueError
    for groups of fewer than 4: two pairs without a common rollout are needed to tell prompts from rollouts.
    """
    kernel, prompts, size = _pair_kernel(gram, reward, group)
    blocks, gaps = kernel
    squares = blocks.diagonal(dim1=1, dim2=2)
    both = (gaps.square() * (squares[:, :, None] + squares[:, None, :] - 2 * blocks)).sum((1, 2)) / 4
    sums = (torch.diag_embed(gaps.sum(2)) - gaps) / 2
    products = sums @ blocks @ sums.mT
    shared = products.diagonal(dim1=1, dim2=2).sum(1) - both
    apart = products.sum((1, 2)) - 4 * shared - 2 * both
    two, one, none = (x / _falling(size, k) for x, k in ((both, 2), (shared, 3), (apart, 4)))
    return _split(prompts, none, 4 * (one - none), 2 * (two - 2 * one + none), size, 2, level)


def leave_one_out_products(gram: Tensor, reward: Tensor, group: Tensor) -> Tensor:
    """[P, P]: products of the prompts' leave-one-out gradients, for `noise_scale`."""
    return _pair_kernel(gram, reward, group)[1]


def prompt_products(gram: Tensor, group: Tensor) -> Tensor:
    """[P, P]: products of the prompts' mean gradients from those [N, N] of their rollouts."""
    return _blocks(gram, group, 1)[1]


def _blocks(gram: Tensor, group: Tensor, least: int) -> tuple[Tensor, Tensor, int]:
    """(products [P, K, K] within prompts, products [P, P] of the prompts' means, K)."""
    size, order = _order(gram, group, least)
    ordered = gram.double()[order][:, order].unflatten(0, (-1, size)).unflatten(2, (-1, size))
    return ordered.diagonal(dim1=0, dim2=2).movedim(2, 0), ordered.mean((1, 3)), size


def _pair_kernel(gram: Tensor, reward: Tensor, group: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, int]:
    """((products of s [P, K, K], R_k − R_j [P, K, K]), products [P, P] of the prompts' leave-one-out gradients, K)."""
    blocks, _, size = _blocks(gram, group, 4)
    _, order = _order(gram, group, 4)
    value = reward.double()[order].unflatten(0, (-1, size))
    gaps = value[:, :, None] - value[:, None, :]
    credit = torch.zeros(len(gram), dtype=torch.float64).index_put_((order,), (gaps.sum(2) / (size - 1)).flatten())
    weighted = credit[:, None] * gram.double() * credit
    return (blocks, gaps), prompt_products(weighted, group), size


def _order(gram: Tensor, group: Tensor, least: int) -> tuple[int, Tensor]:
    """(K, the rows [N] prompt by prompt)."""
    if gram.shape != (len(group), len(group)):
        raise ValueError(f"products are [N, N] for the {len(group)} rollouts, got shape {list(gram.shape)}")
    sizes = torch.unique(group, return_counts=True)[1]
    if len(sizes.unique()) != 1:
        raise ValueError(
            f"every prompt needs the same number of rollouts, there are from {int(sizes.min())} to {int(sizes.max())}"
        )
    if int(sizes[0]) < least:
        raise ValueError(
            f"the split between prompts and rollouts needs groups of at least {least}, these have {int(sizes[0])}"
        )
    return int(sizes[0]), torch.argsort(group, stable=True)


def _falling(size: int, count: int) -> int:
    return int(np.prod(np.arange(size, size - count, -1)))


def _split(
    prompts: Tensor, own: Tensor, rollout: Tensor, pair: Tensor, size: int, smallest: int, level: float
) -> VarianceSplit:
    """From the products of the prompts' gradients and, per prompt, unbiased |G_p|², α and β [P]."""
    signal, signals = signal_of(prompts)
    (square, squares), *rest = (mean_without(x) for x in (own, rollout, pair))
    found = [(square - signal, squares - signals), *rest]
    return VarianceSplit(
        *(jackknife(*each, level) for each in found), size, np.stack([left for _, left in found]), smallest
    )
