"""Measures of agreement between two columns of tokens, each under many weightings at once.

Arrays: x, y, label [N] over tokens; weights [R,N], one row per weighting (row 0 all ones gives the plain value); every
measure answers [R], NaN where it is undefined. A token of weight 2 counts as two tokens, so a bootstrap over prompts is
a matrix of weights.
"""

from __future__ import annotations

import numpy as np

ROWS = 128  # weightings at a time, which bounds the memory at a few arrays [ROWS, N]
PAIRS = 512  # tokens at a time where all pairs are compared


def _ties(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order [N], first place of every group of equal values [G], group of every token [N]), ascending."""
    order = np.argsort(x, kind="stable")
    new = np.r_[True, np.diff(x[order]) > 0]
    group = np.empty(len(x), int)
    group[order] = np.cumsum(new) - 1
    return order, np.flatnonzero(new), group


def midranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R,N]: rank of every token, ties in the middle, in the sample where token i occurs weights[r, i] times.

    Equals scipy's average rank − ½ when the weights are ones.
    """
    order, starts, group = _ties(x)
    totals = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(totals, axis=1) - totals / 2)[:, group]


def covariances(columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R,K,K]: weighted covariances of columns [K,R,N] (or [K,N], the same under all weightings)."""
    total = weights.sum(1)
    columns = np.broadcast_to(columns[:, None], (len(columns), *weights.shape)) if columns.ndim == 2 else columns
    centred = columns - ((columns * weights).sum(-1) / total)[..., None]
    return np.einsum("krn,rn,lrn->rkl", centred, weights, centred, optimize=True) / total[:, None, None]


def correlations(covariance: np.ndarray) -> np.ndarray:
    """[R,K,K] covariances to correlations; NaN where a column is constant, whose variance rounding may put below 0."""
    scale = np.sqrt(np.maximum(np.einsum("rkk->rk", covariance), 0))
    scale = np.where(scale > 1e-9, scale, np.nan)
    return covariance / scale[:, :, None] / scale[:, None, :]


def _in_blocks(weights: np.ndarray, measure) -> np.ndarray:
    return np.concatenate([measure(weights[start : start + ROWS]) for start in range(0, len(weights), ROWS)])


def spearman_matrix(columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R,K,K]: Spearman's correlation of every pair of columns [K,N]."""
    return _in_blocks(
        weights, lambda some: correlations(covariances(np.stack([midranks(x, some) for x in columns]), some))
    )


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R]: Pearson's correlation of the ranks."""
    return spearman_matrix(np.stack([x, y]), weights)[:, 0, 1]


def pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R]: the correlation of the values."""
    return _in_blocks(weights, lambda some: correlations(covariances(np.stack([x, y]), some))[:, 0, 1])


def partial_spearman(x: np.ndarray, y: np.ndarray, controls: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R]: correlation of the ranks of x and y after the ranks of the controls [K,N] were regressed out of both.

    C = S_aa − S_ab S_bb⁺ S_ba      a = (x, y), b = controls
    """

    def measure(some: np.ndarray) -> np.ndarray:
        s = covariances(np.stack([midranks(each, some) for each in (x, y, *controls)]), some)
        rest = s[:, :2, :2] - s[:, :2, 2:] @ np.linalg.pinv(s[:, 2:, 2:], hermitian=True) @ s[:, 2:, :2]
        # What is left of a column that the controls explain wholly is rounding error.
        left = np.einsum("rkk->rk", rest) > 1e-9 * np.einsum("rkk->rk", s[:, :2, :2])
        return np.where(left.all(1), correlations(rest)[:, 0, 1], np.nan)

    return _in_blocks(weights, measure)


def within_matrix(columns: np.ndarray, cluster: np.ndarray, cluster_weights: np.ndarray) -> np.ndarray:
    """[R,K,K]: Spearman within clusters (prompts): ranks, as shares of the cluster's size, are taken and centred inside
    each cluster.

        ρ = Σ_c w_c S_c(x, y) / √(Σ_c w_c S_c(x, x) · Σ_c w_c S_c(y, y))
                                                                           cluster_weights [R,C], S_c: sums of products

    Differences between prompts, such as their difficulty, cannot enter; a prompt where nothing varies adds nothing.
    `cluster` [N] are columns of the weights.
    """
    sums = []
    for members in np.split(
        np.argsort(cluster, kind="stable"), np.bincount(cluster, minlength=cluster_weights.shape[1]).cumsum()[:-1]
    ):
        ones = np.ones((1, len(members)))
        if not len(members):
            sums.append(np.zeros((len(columns), len(columns))))
            continue
        ranks = np.stack([midranks(x[members], ones)[0] for x in columns]) / len(members)
        ranks -= ranks.mean(1, keepdims=True)
        sums.append(ranks @ ranks.T)
    return correlations(np.einsum("rc,ckl->rkl", cluster_weights, np.stack(sums)))


def kendall(x: np.ndarray, y: np.ndarray, cluster: np.ndarray, cluster_weights: np.ndarray) -> np.ndarray:
    """[R]: Kendall's tau-b, whole clusters weighted by cluster_weights [R,C].

        τ_b = wᵀ K w / √(wᵀ X w · wᵀ Y w)       K_cd = Σ_{i∈c, j∈d} sgn(x_i − x_j) sgn(y_i − y_j),
                                                                                          X, Y: pairs that are not tied

    All pairs are compared once, whatever the number of weightings.
    """
    order = np.argsort(cluster, kind="stable")
    x, y, cluster = x[order], y[order], cluster[order]
    starts = np.flatnonzero(np.r_[True, np.diff(cluster) > 0])
    cluster_weights = cluster_weights[:, cluster[starts]]
    sums = np.zeros((3, len(starts), len(starts)))
    group = np.cumsum(np.r_[0, np.diff(cluster) > 0])
    for start in range(0, len(x), PAIRS):
        rows = slice(start, start + PAIRS)
        a = np.sign(x[rows, None] - x).astype(np.int8)
        b = np.sign(y[rows, None] - y).astype(np.int8)
        for which, product in enumerate((a * b, a * a, b * b)):
            by_column = np.add.reduceat(product, starts, axis=1, dtype=np.int32)
            np.add.at(sums[which], group[rows], by_column)
    agree, untied_x, untied_y = (
        np.einsum("rc,cd,rd->r", cluster_weights, each, cluster_weights, optimize=True) for each in sums
    )
    scale = np.sqrt(untied_x * untied_y)
    return np.divide(agree, scale, out=np.full(len(scale), np.nan), where=scale > 0)


def auroc(x: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R]: chance that a token drawn in proportion to `label` has the larger x than one drawn in proportion to 1 −
    label (ties half).

    `label` [N] in [0, 1] is a probability (soft) or 0 and 1 (confirmed).
    """
    order, starts, _ = _ties(x)

    def measure(some: np.ndarray) -> np.ndarray:
        yes = np.add.reduceat((some * label)[:, order], starts, axis=1)
        no = np.add.reduceat((some * (1 - label))[:, order], starts, axis=1)
        below = np.cumsum(no, axis=1) - no / 2
        return _ratio((yes * below).sum(1), yes.sum(1) * no.sum(1))

    return _in_blocks(weights, measure)


def average_precision(x: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R]: mean precision over the positives, tokens taken from the largest x down, tied tokens together; `label` as in
    `auroc`.
    """
    order, starts, _ = _ties(-x)

    def measure(some: np.ndarray) -> np.ndarray:
        yes = np.add.reduceat((some * label)[:, order], starts, axis=1)
        all_ = np.add.reduceat(some[:, order], starts, axis=1)
        taken = np.cumsum(all_, axis=1)
        precision = np.divide(np.cumsum(yes, axis=1), taken, out=np.zeros_like(taken), where=taken > 0)
        return _ratio((yes * precision).sum(1), yes.sum(1))

    return _in_blocks(weights, measure)


def share_of_top(
    x: np.ndarray, amount: np.ndarray, share: float, weights: np.ndarray, *, per_token: bool
) -> np.ndarray:
    """[R]: of the `share` of tokens with the largest x, the mean `amount` (precision at k, if amount is a label) or,
    unless `per_token`, their part of the total amount. Tokens tied at the border count in part.
    """
    order, starts, _ = _ties(-x)

    def measure(some: np.ndarray) -> np.ndarray:
        sums = np.add.reduceat((some * amount)[:, order], starts, axis=1)
        sizes = np.add.reduceat(some[:, order], starts, axis=1)
        wanted = share * sizes.sum(1, keepdims=True)
        part = np.clip(_ratio(wanted - (np.cumsum(sizes, axis=1) - sizes), sizes), 0, 1)
        top = (sums * np.nan_to_num(part)).sum(1)
        return _ratio(top, wanted[:, 0] if per_token else sums.sum(1))

    return _in_blocks(weights, measure)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)
