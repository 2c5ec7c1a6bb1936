"""The bootstrap over prompts, once for all statistics: the same draws everywhere, so that differences are paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tokencredit.stats import Estimate, holm


@dataclass(frozen=True)
class Bootstrap:
    """`num` draws of whole clusters (prompts) with replacement. Row 0 of every array is the sample as it is.

    cluster [N]   the prompt of every token; tokens and completions of one prompt are dependent, prompts are not
    """

    cluster: np.ndarray
    num: int = 1000
    seed: int = 0
    level: float = 0.95

    @cached_property
    def index(self) -> np.ndarray:
        """[N]: clusters numbered from 0 in ascending order."""
        return np.unique(self.cluster, return_inverse=True)[1]

    @cached_property
    def num_clusters(self) -> int:
        return int(self.index.max()) + 1 if len(self.index) else 0

    @cached_property
    def cluster_weights(self) -> np.ndarray:
        """[1 + num, C]: how often every cluster was drawn."""
        rng, count = np.random.default_rng(self.seed), self.num_clusters
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=self.num) if count else np.zeros((self.num, 0))
        return np.concatenate([np.ones((1, count)), drawn])

    @cached_property
    def weights(self) -> np.ndarray:
        """[1 + num, N]: the weight of every token."""
        return self.cluster_weights[:, self.index].astype(np.float32)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[1 + num, ...]: weighted sums over tokens of values [N, ...]: what statistics made of sums need, fast."""
        flat = values.reshape(len(values), -1)
        by_cluster = np.zeros((self.num_clusters, flat.shape[1]))
        np.add.at(by_cluster, self.index, flat)
        return (self.cluster_weights @ by_cluster).reshape(1 + self.num, *values.shape[1:])

    def estimate(self, draws: np.ndarray) -> Estimate:
        """Row 0 with the percentile interval of the others; draws where the statistic is undefined are left out.

        With more than a tenth of the draws undefined, or a single cluster, there is no honest interval: it is NaN.
        """
        others = draws[1:][np.isfinite(draws[1:])]
        if self.num_clusters < 2 or len(others) < 0.9 * self.num or not np.isfinite(draws[0]):
            return Estimate(float(draws[0]), np.nan, np.nan, self.num_clusters, self.level)
        low, high = np.quantile(others, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Estimate(float(draws[0]), float(low), float(high), self.num_clusters, self.level)

    def p_value(self, draws: np.ndarray) -> float:
        """Two-sided, of the statistic being 0: twice the smaller share of draws beyond 0, never below 2 / (num + 1).
        NaN of a single cluster.
        """
        others = draws[1:][np.isfinite(draws[1:])]
        if self.num_clusters < 2 or not len(others):
            return np.nan
        tail = min((others <= 0).sum(), (others >= 0).sum())
        return float(min(1.0, 2 * (tail + 1) / (len(others) + 1)))


def compare(bootstrap: Bootstrap, draws: Mapping[str, np.ndarray], baseline: str) -> dict[str, dict]:
    """Every other proxy against `baseline` on the same draws: {"difference": Estimate, "p": float, "holm": float}.

    `holm` is adjusted over all comparisons made here (`tokencredit.stats.holm`); an undefined statistic has none.
    """
    others: Sequence[str] = [name for name in draws if name != baseline and np.isfinite(draws[name][0])]
    if baseline not in draws or not np.isfinite(draws[baseline][0]) or not others:
        return {}
    differences = {name: draws[name] - draws[baseline] for name in others}
    p_values = [bootstrap.p_value(differences[name]) for name in others]
    return {
        name: {"difference": bootstrap.estimate(differences[name]), "p": p, "holm": float(adjusted)}
        for name, p, adjusted in zip(others, p_values, holm(p_values))
    }
