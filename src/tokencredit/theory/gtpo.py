"""The propositions of GTPO and GRPO-S (arXiv:2508.04349v6), put to tokencredit's own implementation and to exact
worlds.

    success  r̃ᵢₜ = α₁ + α₂ Hᵢₜ / H̄ₜ        failure  r̃ⱼₜ = −α₁ − α₂ Hⱼₜ⁻¹ / mean Hₜ⁻¹

The variance proposition has a module of its own, `means`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokencredit.credit import EntropyReward
from tokencredit.masked import row_mean
from tokencredit.methods import METHODS
from tokencredit.rollouts import Rollouts
from tokencredit.tasks.exact import Enumeration, ExactWorld
from tokencredit.theory.rows import SMALL, enumeration_of, rows_of, score_vectors, token_rows
from tokencredit.theory.statement import Check, Statement

ROUNDING = 1e-9
ALPHA = (1.0, 0.1)
"""The paper's α₁ and α₂."""


def random_rollouts(successes: int = 5, size: int = 8, longest: int = 12, groups: int = 20, seed: int = 0) -> Rollouts:
    """Groups of ragged rollouts with skewed entropies in nats, `successes` of `size` right in each."""
    generator = torch.Generator().manual_seed(seed)
    num = groups * size
    length = torch.randint(1, longest + 1, (num,), generator=generator)
    entropy = torch.rand(num, longest, generator=generator, dtype=torch.float64).pow(4) * 3 + 0.02
    reward = (torch.arange(num) % size < successes).double()
    return Rollouts(reward, torch.arange(num) // size, torch.arange(longest) < length[:, None], {"entropy": entropy})


def shaped(rollouts: Rollouts, **options) -> Tensor:
    """[B, T]: GTPO's shaped rewards."""
    return EntropyReward(**options)(torch.zeros(rollouts.mask.shape, dtype=torch.float64), rollouts)


def check_mass(mass: float = sum(ALPHA), level: str = "token", **options) -> Check:
    """At every position the shaped rewards of d living successes sum to mass · d, those of h failures to −mass · h.

    With level="sequence" every rollout has one reward, at every token: the first position has them all.
    """
    rollouts = random_rollouts()
    credit = shaped(rollouts, alpha=ALPHA, level=level, **options)
    last = 1 if level == "sequence" else credit.shape[1]
    worst = 0.0
    for group in rollouts.group.unique():
        for sign, side in ((1, rollouts.success), (-1, ~rollouts.success)):
            on = rollouts.mask & ((rollouts.group == group) & side)[:, None]
            error = (credit * on).sum(0) - sign * mass * on.sum(0).double()
            worst = max(worst, float(error[:last].abs().max()))
    own = row_mean(credit, rollouts.mask)[rollouts.success] / mass
    return Check(
        {
            "largest error of a position's sum": worst,
            "smallest mean reward of a success / (a1 + a2)": own.min(),
            "largest mean reward of a success / (a1 + a2)": own.max(),
        },
        {"mass is conserved": worst <= ROUNDING, "a rollout's own mass is not": bool((own - 1).abs().max() > 0.01)},
    )


def check_sign(method: str = "gtpo") -> Check:
    """Shaped rewards have the sign of the outcome; the credit of eq. 6 has it where successes are few, not where they
    dominate.
    """
    figures, opposed, kept = {}, {}, True
    for successes in (4, 8, 12, 15):
        rollouts = random_rollouts(successes, size=16)
        sign = torch.where(rollouts.success, 1.0, -1.0)[:, None].double()
        kept &= bool(((shaped(rollouts) * sign)[rollouts.mask] > 0).all())
        won = rollouts.mask & rollouts.success[:, None]
        opposed[successes] = float((METHODS[method].credit(rollouts)[won] < 0).double().mean())
        figures[f"share of success tokens with negative credit, {successes} of 16 right"] = opposed[successes]
    return Check(
        figures,
        {
            "shaped rewards keep the sign": kept,
            "credit keeps it with 4 of 16 right": opposed[4] == 0,
            "credit does not with 15 of 16 right": opposed[15] > 0.1,
        },
    )


def check_consistency(ratio: float = 2.0) -> Check:
    """r̃ − r = α₂ (H/H̄ − 1) vanishes where entropies become alike; where they go to 0 at a fixed ratio it stays."""

    def bias(*entropy: float) -> float:
        """max |r̃ − r| / α₂ of two successes with these entropies, α₁ + α₂ = 1."""
        scores = {"entropy": torch.tensor(entropy, dtype=torch.float64)[:, None]}
        pair = Rollouts(torch.ones(2), torch.zeros(2, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool), scores)
        return float((shaped(pair, alpha=(0.9, 0.1)) - 1).abs().max()) / 0.1

    kept = [bias(eps, ratio * eps) for eps in (1.0, 1e-4, 1e-8)]
    margins = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)
    slow, fast = (
        torch.special.entr(torch.softmax(torch.stack([m, 0 * m], 1), 1)).sum(1) for m in (margins, 2 * margins)
    )
    return Check(
        {
            "|r~ - r| / a2 at H = (1, 1 + 1e-8)": bias(1, 1 + 1e-8),
            f"|r~ - r| / a2 at H = (1e-8, {ratio:g}e-8)": kept[-1],
            "ratio of entropies, logit margins 2 and 1": fast[0] / slow[0],
            "ratio of entropies, logit margins 40 and 20": fast[2] / slow[2],
        },
        {
            "alike entropies: the bias vanishes": bias(1, 1 + 1e-8) < 1e-7,
            "entropies that only go to 0: it stays": min(kept) > 0.1,
            "growing softmax margins drive entropies apart": (
                bool((fast / slow).diff().max() < 0) and float(fast[2] / slow[2]) < 1e-6
            ),
        },
    )


def pair_update(exact: Enumeration, g: Tensor, alpha: tuple[float, float], compare: str = "column") -> Tensor:
    """E Σₜ r̃ᵢₜ gᵢₜ of one rollout, exact over all groups of two; g [N, T, ...] are the gradients of every completion's
    tokens.
    """
    _, mask, chance, reward = exact.completions
    row, _ = token_rows(exact)
    entropy = rows_of(exact).scores["entropy"][row.clamp(min=0)]
    both = torch.cartesian_prod(torch.arange(len(chance)), torch.arange(len(chance)))
    each = both.flatten()
    rollouts = Rollouts(
        reward[each], torch.arange(len(both)).repeat_interleave(2), mask[each], {"entropy": entropy[each]}
    )
    credit = chance[both].prod(1)[:, None] * shaped(rollouts, alpha=alpha, floor=1e-9, compare=compare)[::2]
    weight = torch.zeros(mask.shape, dtype=torch.float64).index_add(0, both[:, 0], credit)
    return torch.einsum("nt,nt...->...", weight, g)


def check_optimum(least_factor: float = 2.0, compare: str = "column") -> Check:
    """In a table GTPO's update is ∇J with row x times a factor ≥ least_factor · α₁; with a shared parameter its optimum
    is another.
    """
    exact = enumeration_of(SMALL)
    vectors, true = score_vectors(exact), rows_of(exact).gradient
    factor, residual = _as_rows(pair_update(exact, vectors, (1.0, 1.0), compare), true)
    _, own_rollout = _as_rows(pair_update(exact, vectors, (1.0, 1.0), "row"), true)
    at_j, at_gtpo = (_root(slope) for slope in (_slope_of_success, _slope_of_gtpo))
    lost = float(tug_of_war(at_j).success - tug_of_war(at_gtpo).success)
    return Check(
        {
            "smallest factor of a row / a1": factor.min(),
            "largest factor of a row / a1": factor.max(),
            "largest residual of a row": residual.max(),
            "largest residual where H is compared within the rollout": own_rollout.max(),
            "shared parameter: where J is best": at_j,
            "shared parameter: where GTPO rests": at_gtpo,
            "J lost there": lost,
        },
        {
            "rows are parallel to the gradient's": bool(residual.max() <= ROUNDING),
            "factors are large enough": bool(factor.min() >= least_factor - ROUNDING),
            "compared within the rollout they are not parallel": bool(own_rollout.max() > 1e-3),
            "a shared parameter rests elsewhere": abs(at_j - at_gtpo) > 1e-3 and lost > 0,
        },
    )


def _as_rows(update: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of an update [P, V] as factor · ∇J's row: the factors, and what is left of the row, relative to it."""
    size = true.square().sum(1)
    factor = (update * true).sum(1) / size
    return factor, (update - factor[:, None] * true).norm(dim=1) / update.norm(dim=1)


def tug_of_war(theta: float, margin: float = 4.0) -> Enumeration:
    """Two tokens, one parameter: after 0 (70 %) token 1 is right and has probability σ(θ), after 1 (30 %) token 0, with
    σ(margin − θ).
    """

    def policy(prefixes: Tensor) -> Tensor:
        first = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log()
        if prefixes.shape[1] == 0:
            return first
        logit = torch.where(prefixes[:, 0] == 0, theta, theta - margin).double()
        return torch.stack([torch.zeros_like(logit), logit], 1)

    return ExactWorld(2, 2, lambda completions: (completions[:, 0] != completions[:, 1]).double()).enumerate(policy)


def _slopes(exact: Enumeration) -> Tensor:
    """[N, T, 1]: ∂ log π / ∂θ of every token: 0 for the first, [token = 1] − p(1) for the second."""
    sequences, _, _, _ = exact.completions
    second = sequences[:, 1].double() - exact.log_probs[1].exp()[sequences[:, 0], 1]
    return torch.stack([torch.zeros_like(second), second], 1)[..., None]


def _slope_of_gtpo(theta: float) -> float:
    exact = tug_of_war(theta)
    return float(pair_update(exact, _slopes(exact), ALPHA))


def _slope_of_success(theta: float) -> float:
    exact = tug_of_war(theta)
    _, _, chance, reward = exact.completions
    return float((chance * reward) @ _slopes(exact).sum((1, 2)))


def _root(function: Callable[[float], float], low: float = 0.0, high: float = 4.0) -> float:
    """Where a function that is positive at `low` and negative at `high` changes sign."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


STATEMENTS = (
    Statement(
        "GTPO-2.2",
        "The shaped rewards of the successes alive at t sum to d_t if α₁ + α₂ = 1",
        "true",
        "GTPO (arXiv:2508.04349v6) prop. 2.2",
        "They sum to (α₁ + α₂) d_t, those of failures to −(α₁ + α₂) h_t; per position, arithmetic means. A rollout's"
        " own total is not kept",
        check_mass,
    ),
    Statement(
        "GTPO-B.5",
        "GRPO-S's shaped rewards of successes sum to n if β₁ + β₂ = 1",
        "true",
        "GRPO-S (arXiv:2508.04349v6) prop. B.5",
        "They sum to (β₁ + β₂) n, those of failures to −(β₁ + β₂) m",
        lambda: check_mass(level="sequence"),
    ),
    Statement(
        "GTPO-2.3",
        "The gradient bias of shaping vanishes as training goes on",
        "true if entropies of successes become alike, which need not be",
        "GTPO (arXiv:2508.04349v6) prop. 2.3",
        "r̃ − r = α₂ (H/H̄ − 1) depends on ratios of entropies: that they all go to 0 does not make them alike",
        check_consistency,
    ),
    Statement(
        "GTPO-2.4",
        "GTPO has the same global optimum as DAPO",
        "true in a table, false with shared parameters",
        "GTPO (arXiv:2508.04349v6) theorem 2.4",
        "In a table the expected update is the true gradient with row x times c⁺(x) + c⁻(x) ≥ 2α₁, entropy being a"
        " score of the prefix; conservation of mass is not the reason, and with shared parameters the balance of"
        " prefixes moves",
        check_optimum,
    ),
    Statement(
        "GTPO-2.5",
        "The shaping is sign-consistent with the outcome",
        "true of the shaped rewards, false of the credit",
        "GTPO (arXiv:2508.04349v6) remark 2.5",
        "eq. 6 subtracts a mean over all tokens: where successes hold more than about α₁/(α₁ + α₂) of a group's tokens,"
        " the less uncertain ones get negative credit",
        check_sign,
    ),
)
