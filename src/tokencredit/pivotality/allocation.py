"""Which alternatives are sampled at a token, and how often: likely ones as strata of their own, the others together.

The n rollouts at a token estimate V₋ = Σᵥ qᵥ V(v), qᵥ = πᵥ / (1 − π) over v ≠ y. An alternative with n qᵥ ≥ 2 is a
stratum with a fixed number of rollouts in proportion to qᵥ; all others form one stratum, whose tokens are drawn
independently. So V₋ = Σₕ wₕ pₕ with independent proportions pₕ: unbiased whatever n, with an unbiased variance, and
without the variance between strata that drawing every token would add.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

REST = -1  # the token of the stratum of all other alternatives


@dataclass(frozen=True)
class Design:
    """The strata of one trace. T tokens, H strata.

    pi, rest [T]   probability of each token under the sampler, and 1 − π as the sum over the others
    position [H]   the token index a stratum belongs to; token [H] its alternative, or REST; weight [H] its share of 1 −
                   π; num [H] rollouts
    skipped [T]    tokens left without rollouts by a rule: their V₋ is not estimated and the values before them are
                   biased, see `bias`
    others         per position with rollouts, (token ids, cumulative probability) of the stratum REST
    """

    pi: np.ndarray
    rest: np.ndarray
    position: np.ndarray
    token: np.ndarray
    weight: np.ndarray
    num: np.ndarray
    skipped: np.ndarray
    others: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    @property
    def defined(self) -> np.ndarray:
        """[T] tokens with alternatives under this sampler that were sampled."""
        return (self.rest > 0) & ~self.skipped

    @property
    def bias(self) -> np.ndarray:
        """[T+1] a bound on |E V̂ᵢ − Vᵢ| (rewards in [0, 1]): Σ over skipped tokens after i of the chance to leave the
        trace there.
        """
        pi, rest = self.pi, np.where(self.skipped, self.rest, 0.0)
        bound = np.zeros(len(pi) + 1)
        for i in range(len(pi) - 1, -1, -1):
            bound[i] = rest[i] + (1.0 if self.skipped[i] else pi[i]) * bound[i + 1]
        return bound

    def draw_rest(self, position: int, uniform: np.ndarray) -> np.ndarray:
        """Tokens of the stratum REST at a position, by inverting its cumulative distribution."""
        tokens, cumulative = self.others[position]
        return tokens[np.minimum(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), len(tokens) - 1)]


def trace_probabilities(log_p: Tensor, completion: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pi [T], rest [T], p [T,V] with the trace's tokens left out), float64. ValueError where a token could not have
    been sampled.
    """
    p = log_p.double().exp().numpy()
    rows = np.arange(len(completion))
    pi = p[rows, list(completion)].copy()
    if not np.isfinite(pi).all() or (pi <= 0).any():
        where = int(np.flatnonzero(~(pi > 0))[0])
        raise ValueError(
            f"token {where} of a trace (id {completion[where]}) has probability 0 under this sampler: the trace was "
            "sampled with other settings (temperature, top-k, top-p) or by another model"
        )
    p[rows, list(completion)] = 0.0
    rest = p.sum(-1)
    total = pi + rest  # 1 but for the float32 in which the log-probs were computed
    return pi / total, rest / total, p / total[:, None]


def make_design(
    log_p: Tensor, completion: tuple[int, ...], num: np.ndarray, skipped: np.ndarray | None = None
) -> Design:
    """Strata for `num` [T] rollouts at each token. Tokens without alternatives get none; a token with num 0 must be
    skipped.
    """
    pi, rest, p = trace_probabilities(log_p, completion)
    skipped = np.zeros(len(pi), bool) if skipped is None else skipped & (rest > 0)
    columns: list[tuple[int, int, float, int]] = []
    others = {}
    for i in np.flatnonzero((rest > 0) & ~skipped):
        if num[i] < 1:
            raise ValueError(
                f"token {i} has alternatives but no rollouts: its value would be missing from all values before it"
            )
        named, counts, left = _strata(p[i] / rest[i], int(num[i]))
        columns += [(i, v, p[i, v] / rest[i], n) for v, n in zip(named, counts)]
        if left:
            tokens = np.flatnonzero(p[i])
            tokens = tokens[~np.isin(tokens, named)]
            columns.append((i, REST, p[i, tokens].sum() / rest[i], left))
            others[int(i)] = tokens, p[i, tokens].cumsum()
    position, token, weight, counts = (np.array(c) for c in zip(*columns)) if columns else (np.zeros(0, int),) * 4
    return Design(pi, rest, position, token, weight.astype(float), counts, skipped, others)


def _strata(q: np.ndarray, num: int) -> tuple[list[int], list[int], int]:
    """(alternatives with a stratum of their own, their numbers of rollouts, number of the others)."""
    order = np.argsort(-q, kind="stable")
    named = [int(v) for v in order[: num // 2 + 1] if num * q[v] >= 2]
    support = int((q > 0).sum())
    if len(named) < support:  # the others need two rollouts as well, or the smallest strata join them
        while named and num * max(0.0, 1 - q[named].sum()) < 2:
            named.pop()
    ideal = [num * q[v] for v in named] + ([num * (1 - q[named].sum())] if len(named) < support else [])
    counts = np.floor(ideal).astype(int)
    short = np.argsort(-(np.array(ideal) - counts), kind="stable")[: num - counts.sum()]
    counts[short] += 1
    return named, counts[: len(named)].tolist(), int(counts[-1]) if len(named) < support else 0
