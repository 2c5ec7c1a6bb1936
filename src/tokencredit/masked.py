"""Masked and grouped arithmetic: the only place where padding, empty rows and groups are handled.

Shapes: x, mask are [B, T]; row values are [B]; `index` [B] numbers the population of each row (its group, or 0 for the
whole batch). Padding may hold anything, NaN included: it is replaced by zero before it is touched. Sums of nothing are
0, means of nothing are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zero_off(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is on, 0 elsewhere; safe for NaN padding, unlike x · mask."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def wide(x: Tensor) -> Tensor:
    """x in float32 or better: ratios and statistics are never taken in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def over(numerator: Tensor, denominator: Tensor, empty: float = 0.0) -> Tensor:
    """numerator / denominator, and `empty` where the denominator is 0."""
    none = denominator == 0
    return torch.where(none, torch.full_like(numerator, empty), numerator / denominator.masked_fill(none, 1))


def row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B]: mean over each row's tokens."""
    return over(zero_off(x, mask).sum(1), mask.sum(1).to(x.dtype))


def row_min_max(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """([B], [B]): smallest and largest value of each row's tokens; 0 for an empty row."""
    if not x.shape[1]:
        return x.new_zeros(len(x)), x.new_zeros(len(x))
    empty = ~mask.any(1)
    low = x.masked_fill(~mask, torch.inf).amin(1)
    high = x.masked_fill(~mask, -torch.inf).amax(1)
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def pool(values: Tensor, index: Tensor) -> Tensor:
    """Sum over the rows of each population, given back to every row: [B, ...] -> [B, ...]."""
    sums = values.new_zeros((int(index.max()) + 1 if index.numel() else 0, *values.shape[1:]))
    return sums.index_add_(0, index, values)[index]


def pool_mean(x: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    """[B, 1]: mean over all tokens of each population."""
    total = pool(zero_off(x, mask).sum(1), index)
    return over(total, pool(mask.sum(1).to(x.dtype), index))[:, None]


def pool_deviation(x: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    """[B, T]: x minus its population's mean, 0 off the mask.

    The mean is taken of differences from one member, so the deviations of equal numbers are exactly 0 however many they
    are. Values that differ by no more than roundings upstream count as equal too: a population without spread must not
    get one that a division by its standard deviation would blow up.
    """
    shifted = zero_off(x - _pool_max(x, mask, index), mask)
    deviation = zero_off(shifted - pool_mean(shifted, mask, index), mask)
    size = _pool_max(x.abs(), mask, index)
    return deviation.masked_fill(deviation.abs() <= 8 * torch.finfo(x.dtype).eps * size, 0)


def pool_std(deviation: Tensor, mask: Tensor, index: Tensor, ddof: int = 1) -> Tensor:
    """[B, 1]: standard deviation of each population from its deviations; 0 where at most `ddof` values count."""
    count = pool(mask.sum(1).to(deviation.dtype), index)
    return over(pool(deviation.square().sum(1), index), (count - ddof).clamp(min=0)).sqrt()[:, None]


def pool_standardise(x: Tensor, mask: Tensor, index: Tensor, eps: float, ddof: int = 1) -> Tensor:
    """[B, T]: (x − mean) / (std + eps) over all tokens of each population, 0 off the mask and where nothing varies."""
    deviation = pool_deviation(x, mask, index)
    return over(deviation, pool_std(deviation, mask, index, ddof) + eps)


def pool_min_max(x: Tensor, mask: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """([B, 1], [B, 1]): smallest and largest value over all tokens of each population; 0 where it has none."""
    return -_pool_max(-x, mask, index), _pool_max(x, mask, index)


def _pool_max(x: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    """[B, 1]: largest value over all tokens of each population; 0 where it has none."""
    rows = x.masked_fill(~mask, -torch.inf).amax(1) if x.shape[1] else x.new_full((len(x),), -torch.inf)
    best = x.new_full((int(index.max()) + 1 if index.numel() else 0,), -torch.inf)
    best = best.scatter_reduce_(0, index, rows, "amax")[index][:, None]
    return best.masked_fill(best == -torch.inf, 0)


def column_mean(x: Tensor, mask: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """[B, T]: mean over the rows of a population that are alive at the same position, by `weight` >= 0 [B, T] where any
    of it is not 0.
    """
    alike = mask.to(x.dtype)
    if weight is not None:
        weight = zero_off(weight, mask)
        alike = torch.where(pool(weight, index) > 0, weight, alike)
    return over(pool(zero_off(x, mask) * alike, index), pool(alike, index))


def column_deviation(x: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    """[B, T]: x minus the mean of its population's rows that are alive at the same position, 0 off the mask; exactly 0
    where those are equal but for roundings, as in `pool_deviation`.
    """
    shifted = zero_off(x - _column_max(x, mask, index), mask)
    deviation = zero_off(shifted - column_mean(shifted, mask, index), mask)
    size = _column_max(x.abs(), mask, index)
    return deviation.masked_fill(deviation.abs() <= 8 * torch.finfo(x.dtype).eps * size, 0)


def _column_max(x: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    """[B, T]: largest value of a population's living rows at each position; 0 where none is alive."""
    best = x.new_full((int(index.max()) + 1 if index.numel() else 0, x.shape[1]), -torch.inf)
    best = best.scatter_reduce_(0, index[:, None].expand_as(x), x.masked_fill(~mask, -torch.inf), "amax")[index]
    return best.masked_fill(best == -torch.inf, 0)
