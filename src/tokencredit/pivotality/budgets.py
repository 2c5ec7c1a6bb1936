"""How many rollouts each token gets: fixed, in two stages, by expected variance and cost; and what that will give,
before it is spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokencredit.pivotality.allocation import Design
from tokencredit.pivotality.estimands import PathMap
from tokencredit.pivotality.estimator import Effect

ESTIMANDS = ("replace", "before_after")
"""What tokens can be selected by: the effects that are linear in the values of the alternatives."""


@dataclass(frozen=True)
class Fixed:
    """`num` rollouts for every token that has alternatives.

    skip_below   a token whose alternatives together have less probability than this gets none. The values before it are
                 then biased by at most Σ (1 − π) of the skipped tokens, which is reported and widens the intervals
    control      share of those tokens that is sampled all the same, at random, so that they are not missing from a
                 study
    """

    num: int = 8
    skip_below: float = 0.0
    control: float = 0.05

    def __post_init__(self) -> None:
        if self.num < 2 or not 0 <= self.skip_below < 1 or not 0 <= self.control <= 1:
            raise ValueError(
                f"a budget needs num ≥ 2 (a standard error does), 0 ≤ skip_below < 1 and 0 ≤ control ≤ 1, not {self}"
            )


@dataclass(frozen=True)
class TwoStage:
    """`screen` everywhere; then `confirm` fresh rollouts, on average, for each selected token and for a random control
    set.

    select    share of the tokens that is selected: those whose |estimand| may be largest by the interval of the
              screening (`Effect.at_most`), which is used for nothing else. By the estimate, a token whose few rollouts
              happened to agree would be 0. Give more than the share of tokens that matter: an unselected one has two
              rollouts
    control   chance of any other token to get fresh rollouts as well: its inclusion probability (1 for a selected
              token)
    estimand  what is to be found, and measured well: one of `ESTIMANDS`. By |replace| a copied digit is selected, by
              |before_after| it is not

    The second stage spreads its rollouts by `allocate`, so tokens after a chosen one get some: its V rests on fresh
    rollouts alone.
    """

    screen: int = 8
    confirm: int = 64
    select: float = 0.3
    control: float = 0.05
    skip_below: float = 0.0
    estimand: str = ESTIMANDS[0]

    def __post_init__(self) -> None:
        check_estimand(self.estimand)
        if (
            self.screen < 2
            or self.confirm < 2
            or not 0 < self.select <= 1
            or not 0 <= self.control <= 1
            or not 0 <= self.skip_below < 1
        ):
            raise ValueError(
                "two stages need screen, confirm ≥ 2, 0 < select ≤ 1, 0 ≤ control ≤ 1 and 0 ≤ skip_below < 1, not"
                f" {self}"
            )

    @property
    def first(self) -> Fixed:
        return Fixed(self.screen, self.skip_below, self.control)


Budget = Fixed | TwoStage


def check_estimand(name: str) -> None:
    """ValueError for an estimand that no budget is spent by."""
    if name not in ESTIMANDS:
        raise ValueError(f"a budget is spent by one of {', '.join(ESTIMANDS)}, not by {name!r}")


def skip(rest: np.ndarray, budget: Fixed, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(skipped [T], inclusion probability [T]) for alternatives of probability rest [T]; uniform [T] is for the control
    set.
    """
    near_certain = (rest < budget.skip_below) & (rest > 0)
    inclusion = np.where(near_certain, budget.control, 1.0)
    return near_certain & (uniform >= budget.control), inclusion


def choose(
    effects: Sequence[Effect], budget: TwoStage, uniform: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per trace (chosen [T], inclusion probability [T]) from screened effects [T] (NaN: undefined, never chosen).

    The selected share is kept to the token: of effects that may be equally large, those with the larger estimate.
    """
    most, size = (np.concatenate(parts) for parts in ([e.at_most for e in effects], [np.abs(e.value) for e in effects]))
    known = ~np.isnan(size)
    order = np.lexsort((np.where(known, size, -1.0), np.where(known, most, -1.0)))
    selected = np.zeros(len(size), bool)
    selected[order[len(size) - int(np.ceil(budget.select * known.sum())) :]] = True
    coin = np.concatenate(list(uniform)) < budget.control
    chosen = selected | (known & coin)
    inclusion = np.where(selected, 1.0, np.where(known, budget.control, 0.0))
    ends = np.cumsum([len(e.value) for e in effects])[:-1]
    return np.split(chosen, ends), np.split(inclusion, ends)


def allocate(
    paths: Sequence[PathMap],
    weights: Sequence[np.ndarray],
    sigma: Sequence[np.ndarray],
    cost: Sequence[np.ndarray],
    total: int,
    *,
    sampled: Sequence[np.ndarray],
    least: int = 2,
    estimand: str = ESTIMANDS[0],
) -> list[np.ndarray]:
    """Rollouts [T] per trace that minimise Σ weight · Var(estimand) at the cost of `total` rollouts, at least `least`
    where `sampled`.

        nⱼ ∝ σⱼ √(cⱼ / costⱼ)        cⱼ = Σᵢ weightᵢ Aᵢⱼ²,  A the map from V₋ to the estimand

    sigma [T]  expected standard deviation of a rollout's reward; cost [T]  expected tokens of a rollout
    """
    need = [w @ path.linear(estimand)[0] ** 2 for w, path in zip(weights, paths)]
    share = np.concatenate([s * np.sqrt(c / k) for s, c, k in zip(sigma, need, cost)])
    where = np.concatenate(list(sampled))
    share = np.where(where, share, 0.0)
    spare = max(0, total - least * int(where.sum()))
    extra = spare * share / share.sum() if share.sum() > 0 else np.zeros(len(share))
    num = np.where(where, least + np.floor(extra).astype(int), 0)
    return np.split(num, np.cumsum([len(w) for w in weights])[:-1])


@dataclass(frozen=True)
class Forecast:
    """What a budget will cost and give. Standard errors are of the estimand, over tokens with alternatives, for rewards
    of variance V(1−V).
    """

    tokens: int
    undefined: int
    skipped: int
    rollouts: int
    generated: int
    seconds: float
    standard_error_median: float
    standard_error_worst: float
    bias_worst: float


def plan(
    designs: Sequence[Design],
    budget: Budget,
    *,
    tokens_per_second: float,
    success: float = 0.5,
    estimand: str = ESTIMANDS[0],
) -> Forecast:
    """Predicted from the sampler's distribution along the traces alone. A rollout is taken to be as long as the rest of
    its trace.

    designs   at the first stage's number of rollouts
    success   the success rate to assume for alternatives; 0.5, the default, gives an upper bound
    estimand  whose standard errors; with two stages that of the budget
    """
    estimand = budget.estimand if isinstance(budget, TwoStage) else estimand
    errors, rollouts, generated, bias = [], 0, 0.0, 0.0
    more = 0.0
    if isinstance(budget, TwoStage):
        more = budget.confirm * (budget.select + budget.control * (1 - budget.select))
    for d in designs:
        remaining = np.arange(len(d.pi) - 1, -1, -1)
        rollouts += int(d.num.sum())
        generated += float(d.num @ remaining[d.position])
        second = more * d.defined
        rollouts += round(float(second.sum()))
        generated += float(second @ remaining)
        errors.append(_errors(d, budget, success, estimand))
        bias = max(bias, float(d.bias.max(initial=0.0)))
    flat = np.concatenate(errors)
    flat = flat[~np.isnan(flat)]
    middle, worst = (float(np.median(flat)), float(flat.max())) if len(flat) else (float("nan"),) * 2
    return Forecast(
        sum(len(d.pi) for d in designs),
        int(sum((d.rest <= 0).sum() for d in designs)),
        int(sum(d.skipped.sum() for d in designs)),
        rollouts,
        round(generated),
        generated / tokens_per_second,
        middle,
        worst,
        bias,
    )


def _errors(d: Design, budget: Budget, success: float, estimand: str) -> np.ndarray:
    """Predicted standard errors [T]: of every token, or with two stages of a token if it is among the chosen."""
    sampled = d.defined
    path = PathMap.of(np.where(sampled, d.pi, 1.0), np.where(sampled, d.rest, 0.0))
    W = np.zeros((len(d.pi), len(d.num)))
    W[d.position, np.arange(len(d.num))] = d.weight
    var = success * (1 - success) / np.maximum(d.num, 1) @ (W**2).T
    A = path.linear(estimand)[0]
    scale = np.ones_like(A)
    if isinstance(budget, TwoStage):
        scale[np.arange(len(A)), np.arange(len(A))] = budget.screen / budget.confirm
    return np.where(sampled, np.sqrt((A**2 * scale * var).sum(-1)), np.nan)
