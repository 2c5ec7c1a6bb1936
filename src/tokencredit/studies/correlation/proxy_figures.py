"""The figures of proxies against effects, as draws over prompts: of one estimand, from exact effects or from rollouts.

figures {measure: {proxy: draws [1 + num]}}      draw 0 is the value; the same draws everywhere, so that differences are
                                                 paired
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tokencredit.agreement import ranks
from tokencredit.agreement.controls import BudgetCurve, Null, budget_curve, permuted
from tokencredit.agreement.moments import Squares, corrected_draws, exact_draws, reliability
from tokencredit.agreement.posterior import Posterior, ceiling_draws
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.agreement.rollouts import AlternativeRollouts

Draws = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Tokens:
    """What is known of every token [N]: proxies by name, controls of the partial correlation, prompt, completion,
    groups.
    """

    proxies: Mapping[str, np.ndarray]
    controls: np.ndarray  # [K,N]
    prompt: np.ndarray
    trace: np.ndarray
    groups: Mapping[str, np.ndarray]  # name -> [N] bool

    def at(self, some: np.ndarray) -> Tokens:
        return Tokens(
            {name: x[some] for name, x in self.proxies.items()},
            self.controls[:, some],
            self.prompt[some],
            self.trace[some],
            {name: member[some] for name, member in self.groups.items()},
        )

    def bootstrap(self, num: int, seed: int) -> Bootstrap:
        return Bootstrap(self.prompt, num, seed)


def of_size(
    tokens: Tokens, size: np.ndarray, label: np.ndarray | None, boot: Bootstrap, *, top: float, few: float
) -> Draws:
    """Measures of rank with the size of an effect [N], and of retrieval of the labelled tokens (left out without a
    label).
    """
    names, columns = list(tokens.proxies), np.stack([*tokens.proxies.values(), size])
    pooled = ranks.spearman_matrix(columns, boot.weights)[:, :-1, -1]
    within = ranks.within_matrix(columns, boot.index, boot.cluster_weights)[:, :-1, -1]
    found: Draws = {"spearman": dict(zip(names, pooled.T)), "spearman_within": dict(zip(names, within.T))}
    measures = {
        "kendall": lambda x: ranks.kendall(x, size, boot.index, boot.cluster_weights),
        "partial": lambda x: ranks.partial_spearman(x, size, tokens.controls, boot.weights),
    }
    if label is not None:
        measures |= {
            "auroc": lambda x: ranks.auroc(x, label, boot.weights),
            "average_precision": lambda x: ranks.average_precision(x, label, boot.weights),
            "precision_few": lambda x: ranks.share_of_top(x, label, few, boot.weights, per_token=True),
            "precision_top": lambda x: ranks.share_of_top(x, label, top, boot.weights, per_token=True),
        }
        found["base_rate"] = {"labels": boot.sums(label) / boot.sums(np.ones_like(label))}
    return found | {
        name: {proxy: measure(x) for proxy, x in tokens.proxies.items()} for name, measure in measures.items()
    }


def captured(tokens: Tokens, square: np.ndarray, boot: Bootstrap, top: float) -> dict[str, np.ndarray]:
    """Share of Σ effect² that lies in the `top` tokens of each proxy. `square` [N] may be its unbiased estimate: sums
    need no more.
    """
    return {
        name: ranks.share_of_top(x, square, top, boot.weights, per_token=False) for name, x in tokens.proxies.items()
    }


def exact_figures(
    tokens: Tokens, effect: np.ndarray, boot: Bootstrap, *, threshold: float, top: float, few: float
) -> Draws:
    """Everything for effects [N] that are known."""
    size = np.abs(effect)
    found = of_size(tokens, size, (size >= threshold).astype(float), boot, top=top, few=few)
    found["captured"] = captured(tokens, effect**2, boot, top)
    found["captured"]["(best possible)"] = ranks.share_of_top(size, effect**2, top, boot.weights, per_token=False)
    for name, as_ranks in (("corrected", False), ("corrected_ranks", True)):
        found[name] = {proxy: exact_draws(x, effect, boot, ranks=as_ranks) for proxy, x in tokens.proxies.items()}
    return found


@dataclass(frozen=True)
class Sampled:
    """Figures from rollouts, and what is needed to judge them. `unresolved` proxies have no corrected figure."""

    figures: Draws
    noise_only: dict[str, Null]
    permuted: dict[str, Null]
    curve: BudgetCurve
    ceiling: Null | None
    reliability: dict[str, np.ndarray]
    resolved: bool


def sampled_figures(
    tokens: Tokens,
    rollouts: AlternativeRollouts,
    posterior: Posterior,
    estimand: str,
    defined: np.ndarray,
    boot: Bootstrap,
    *,
    nulls: Mapping[str, np.ndarray],
    threshold: float,
    top: float,
    few: float,
    seed: int,
) -> Sampled:
    """Everything for effects known from rollouts. `tokens` are those `defined` [N of rollouts]; `spread` has no
    posterior, so no labels; `nulls` are the draws of `controls.noise_only`."""
    size = rollouts.effects().size(estimand)[defined]
    label = None if estimand == "spread" else posterior.label(estimand, threshold)[defined]
    found = of_size(tokens, size, label, boot, top=top, few=few)
    squares = Squares.of(rollouts, (estimand,), seed)[estimand].at(defined)
    found["captured"] = captured(tokens, squares.whole, boot, top)
    for name, as_ranks in (("corrected", False), ("corrected_ranks", True)):
        each = {proxy: corrected_draws(x, squares, boot, ranks=as_ranks) for proxy, x in tokens.proxies.items()}
        found[name] = {proxy: draws for proxy, draws in each.items() if draws is not None}
    everywhere = everywhere_else_zero(tokens, defined)
    shuffled = permuted(tokens.trace, tokens.proxies, size, seed=seed)
    curve = budget_curve(
        rollouts, everywhere, estimand, defined, Bootstrap(tokens.prompt, min(boot.num, 300), seed), seed=seed
    )
    ceiling = None if estimand == "spread" else Null.of(ceiling_draws(rollouts, posterior, estimand, defined, seed))
    return Sampled(
        found,
        {name: Null.of(draws) for name, draws in nulls.items()},
        {name: Null.of(draws) for name, draws in shuffled.items()},
        curve,
        ceiling,
        reliability(rollouts, estimand, defined, boot),
        bool(found["corrected"]),
    )


def everywhere_else_zero(tokens: Tokens, defined: np.ndarray) -> dict[str, np.ndarray]:
    """The proxies of the tokens that are `defined`, as columns over all tokens [N]."""
    found = {}
    for name, x in tokens.proxies.items():
        found[name] = np.zeros(len(defined))
        found[name][defined] = x
    return found


def split_figures(
    tokens: Tokens,
    effect: np.ndarray,
    num: int,
    seed: int,
    *,
    min_tokens: int = 60,
    min_prompts: int = 12,
    top: float = 0.2,
) -> dict[str, dict]:
    """{group: {"spearman", "captured": {proxy: (draws, bootstrap)}, "tokens", "prompts"}} of known effects, group by
    group.

    Groups of too few tokens or prompts have no figures: they are there with their numbers.
    """
    found = {}
    for name, member in tokens.groups.items():
        here, values = tokens.at(member), effect[member]
        about = {"tokens": int(member.sum()), "prompts": len(np.unique(here.prompt))}
        if about["tokens"] < min_tokens or about["prompts"] < min_prompts:
            found[name] = about
            continue
        boot = here.bootstrap(num, seed)
        matrix = ranks.spearman_matrix(np.stack([*here.proxies.values(), np.abs(values)]), boot.weights)[:, :-1, -1]
        found[name] = about | {
            "bootstrap": boot,
            "spearman": dict(zip(here.proxies, matrix.T)),
            "captured": captured(here, values**2, boot, top),
        }
    return found
