"""The bias and the variance of weighting a token's credit: shrinkage, baselines, and which weights bias what.

    MSE(w) = ‖Σ (1 − wᵢ) mᵢ‖² + Σ wᵢ² vᵢ        mᵢ, vᵢ: mean and variance of the i-th part of the gradient estimate

All of it on exact worlds; a part is a prefix's row, so parts are orthogonal.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from tokencredit.tasks.exact import Enumeration
from tokencredit.theory.rows import (
    POLICIES,
    SMALL,
    Rows,
    enumeration_of,
    rows_of,
    score_vectors,
    token_rows,
    wide_rows,
)
from tokencredit.theory.statement import Check, Statement

EXACT = 1e-12
ROLLOUTS = 16
"""Rollouts per gradient estimate in the figures."""


def check_shrinkage(
    factor: Callable[[Tensor, Tensor], Tensor] = lambda signal, noise: signal / (signal + noise),
) -> Check:
    """w = factor(‖m‖², v) is the deterministic weight per prefix with the least MSE."""
    exact = enumeration_of(SMALL)
    rows = rows_of(exact)
    signal, noise = signal_and_noise(rows, num=2)
    w = factor(signal, noise)
    claimed, least = mse(w, signal, noise), float((signal * noise / (signal + noise)).sum())
    brute = [
        (mse(each, signal, noise), _mse_of_pairs(exact, rows, each))
        for each in (torch.ones_like(w), w, rows.scores["entropy"])
    ]
    edge = (signal - noise) / (signal + noise)
    change = [(1 - each).square() * signal + each.square() * noise - noise for each in (edge + 1e-3, edge - 1e-3)]
    generator = torch.Generator().manual_seed(0)
    steps = torch.logspace(-3, 0, 150, dtype=torch.float64)[:, None] * torch.randn(
        150, len(w), generator=generator, dtype=torch.float64
    )
    near = [mse(w + step, signal, noise) for step in steps]
    return Check(
        _relative_errors(),
        {
            "MSE = bias^2 + variance, all pairs of rollouts": all(abs(a - b) <= EXACT for a, b in brute),
            "claimed weights reach the least MSE": abs(claimed - least) <= EXACT,
            "no other weights are better": claimed <= min(near) + EXACT,
            "a weight below 1 helps exactly above (s - v)/(s + v)": bool(
                (change[0] < 0).all() and (change[1] > 0).all()
            ),
        },
    )


def signal_and_noise(rows: Rows, num: int) -> tuple[Tensor, Tensor]:
    """(‖m‖² [P], v [P]) of the mean over `num` rollouts of (R − J) ∇ log π, J the baseline."""
    signal = rows.gradient.square().sum(1)
    return signal, (rows.energy(rows.success) - signal) / num


def mse(weight: Tensor, signal: Tensor, noise: Tensor) -> float:
    return float((1 - weight).square() @ signal + weight.square() @ noise)


def _mse_of_pairs(exact: Enumeration, rows: Rows, weight: Tensor) -> float:
    """E‖ĝ − ∇J‖² over all pairs of rollouts, ĝ their mean of Σ w (R − J) ∇ log π."""
    _, _, chance, reward = exact.completions
    each = ((reward - rows.success)[:, None, None] * score_vectors(exact).sum(1) * weight[:, None]).flatten(1)
    error = (each[:, None] + each[None]) / 2 - rows.gradient.flatten()
    return float(chance @ error.square().sum(2) @ chance)


def _relative_errors() -> dict[str, float]:
    """MSE over that of weight 1, at ROLLOUTS rollouts: every shape of weights with its best scale, mean over the random
    policies.
    """
    found: dict[str, list[float]] = {}
    for rows in wide_rows():
        signal, noise = signal_and_noise(rows, ROLLOUTS)
        plain = float(noise.sum())
        shapes = {
            "one factor": rows.scores["one"],
            "w ~ H": rows.scores["entropy"],
            "w ~ sqrt(tr F) (T)": rows.scores["root_fisher"],
            "w ~ spread^2": rows.scores["spread"].square(),
            "w = s/(s + v)": signal / (signal + noise),
        }
        for name, u in shapes.items():
            best = float((u @ signal) / (u.square() @ (signal + noise)))
            found.setdefault(f"MSE / plain MSE, best multiple of {name}", []).append(
                mse(best * u, signal, noise) / plain
            )
    return {name: sum(each) / len(each) for name, each in found.items()}


def check_baseline(formula: str = "full") -> Check:
    """b(x) by the formula minimises the variance of Σ (R − b(x)) g, with a row per prefix and with one row shared by
    all prefixes.
    """
    figures: dict[str, float] = {}
    conditions = {}
    for kind in ("tabular", "shared"):
        reached = []
        for seed in range(POLICIES):
            exact = enumeration_of(SMALL, seed)
            vectors = score_vectors(exact)
            found = _variances(exact, vectors.flatten(2) if kind == "tabular" else vectors.sum(2))
            least = found.pop("least")
            reached.append(abs(found[formula] / least - 1) <= 1e-9)
            for name, each in found.items():
                key = f"variance / least, {kind}, b = {name}"
                figures[key] = figures.get(key, 0) + each / least / POLICIES
        conditions[f"{kind}: formula reaches the least variance"] = all(reached)
    return Check(figures, conditions)


def _variances(exact: Enumeration, g: Tensor) -> dict[str, float]:
    """Total variance of Σᵢ (R − b(xᵢ)) gᵢ of one rollout, by baseline; g [N, T, d] are the score vectors of every
    completion's tokens.
    """
    rows, (_, _, chance, reward), (row, _) = rows_of(exact), exact.completions, token_rows(exact)
    on, at = row >= 0, row.clamp(min=0)
    weight = chance[:, None]

    def mean_at(value: Tensor) -> Tensor:
        """Σ over all tokens at x of chance · value [N, T] -> [P]."""
        return torch.zeros(len(rows.reach), dtype=torch.float64).index_add(0, row[on], (weight * value)[on])

    def by_position(value: Tensor, energy: Tensor) -> Tensor:
        return ((weight * value).sum(0) / (weight * energy).sum(0)).expand_as(row)

    energy, whole, r = g.square().sum(2), (g * g.sum(1, keepdim=True)).sum(2), reward[:, None]
    so_far = energy.cumsum(1) * on
    baselines = {
        "0": torch.zeros_like(energy),
        "J": torch.full_like(energy, rows.success),
        "V": rows.value[at],
        "E[R|g|^2]/E|g|^2": (mean_at(r * energy) / mean_at(energy))[at],
        "full": (mean_at(r * whole) / mean_at(energy))[at],
        "full, by position": by_position(r * whole, energy),
        "running sum of |g|^2, by position": by_position(r * so_far, so_far),
        "least": _least_squares(len(rows.reach), g, row, chance, reward)[at],
    }
    return {name: _variance(b, g, chance, reward) for name, b in baselines.items()}


def _least_squares(size: int, g: Tensor, row: Tensor, chance: Tensor, reward: Tensor) -> Tensor:
    """[P]: the b(x) that minimise E‖R Σ gᵢ − Σ b(xᵢ) gᵢ‖², solved as they stand."""
    design = torch.zeros(*g.shape[::2], size, dtype=torch.float64)
    n, t = (row >= 0).nonzero(as_tuple=True)
    for i, j in zip(n.tolist(), t.tolist()):
        design[i, :, row[i, j]] += g[i, j]
    scale = chance.sqrt()[:, None]
    target = scale * reward[:, None] * g.sum(1)
    return torch.linalg.lstsq((scale[..., None] * design).flatten(0, 1), target.flatten()[:, None]).solution[:, 0]


def _variance(b: Tensor, g: Tensor, chance: Tensor, reward: Tensor) -> float:
    estimate = ((reward[:, None] - b)[..., None] * g).sum(1)
    return float(chance @ estimate.square().sum(1) - (chance @ estimate).square().sum())


def check_weighting(unbiased: tuple[str, ...] = ("entropy", "root_fisher")) -> Check:
    """Weights that depend on the prefix alone rescale its row, whatever the baseline; the others turn the baseline into
    bias.
    """
    exact = enumeration_of(SMALL)
    rows = rows_of(exact)
    _, mask, chance, reward = exact.completions
    row, token = token_rows(exact)
    at, on = row.clamp(min=0), (row >= 0).double()
    picked = token.clamp(min=0)
    weights = {name: rows.scores[name][at] for name in ("entropy", "root_fisher")}
    weights |= {"surprisal": -rows.p[at, picked].log(), "gradient norm": rows.norms2[at, picked].sqrt()}
    weights["1/length"] = (1 / mask.sum(1, keepdim=True)).expand_as(on)
    g, figures, conditions = score_vectors(exact), {}, {}

    def update(w: Tensor, outcome: Tensor) -> Tensor:
        return torch.einsum("n,nt,ntpv->pv", chance * outcome, w * on, g)

    for name, w in weights.items():
        drift = float(update(w, torch.ones_like(reward)).norm() / update(w, reward).norm())
        figures[f"|E w g| / |E w R g|, w = {name}"] = drift
        conditions[f"{name}: a baseline {'cannot' if name in unbiased else 'can'} bias it"] = (drift <= EXACT) == (
            name in unbiased
        )
    rescaled = (update(weights["entropy"], reward) - rows.scores["entropy"][:, None] * rows.gradient).abs().max()
    conditions["a weight of the prefix rescales its row"] = float(rescaled) <= EXACT
    figures |= {f"uphill component, two tokens, w = {name}": _two_tokens(w) for name, w in _TWO.items()}
    conditions["a weight of the chosen token can go downhill"] = all(
        _two_tokens(w) < 0 for name, w in _TWO.items() if name != "1"
    )
    conditions["without a weight it goes uphill there"] = _two_tokens(_TWO["1"]) > 0
    return Check(figures, conditions)


_TWO = {
    "1": lambda p: torch.ones_like(p),
    "surprisal": lambda p: -p.log(),
    "gradient norm": lambda p: sqrt(2) * (1 - p),
}


def _two_tokens(weight: Callable[[Tensor], Tensor]) -> float:
    """⟨E w (Q − b) g, ∇J⟩ / (‖·‖ ‖·‖) at p = (0.9, 0.1), Q = (0.4, 0.5), where the prompt's mean reward b = 0.6 is the
    baseline.
    """
    p, q, b = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.4, 0.5], dtype=torch.float64), 0.6
    g = torch.eye(2, dtype=torch.float64) - p
    true, found = (p * (q - p @ q)) @ g, (p * weight(p) * (q - b)) @ g
    return float(true @ found / (true.norm() * found.norm()))


STATEMENTS = (
    Statement(
        "shrinkage",
        "A deterministic per-token weight can lower the error of the gradient",
        "true",
        "the proposal: bias and variance of weighting",
        "With s = ‖mean‖² and v = variance of a part: best w = s/(s + v), which falls as v grows; w < 1 lowers the"
        " error exactly if w > (s − v)/(s + v), and w > 1 never does",
        check_shrinkage,
    ),
    Statement(
        "baseline",
        "The best baseline of a token is V, or E[R‖g‖²]/E‖g‖²",
        "the second where prefixes share no parameters, else neither",
        "optimal baselines (Greensmith et al. 2004); optimal token baseline (arXiv:2602.07078)",
        "b(x) = E[R ⟨gᵢ, Σⱼ gⱼ⟩ | x] / E[‖gᵢ‖² | x], with the sum over the whole rollout",
        check_baseline,
    ),
    Statement(
        "weighting",
        "Weighting credit leaves the direction of the gradient sound",
        "true for weights of the prefix in a table, false otherwise",
        "the proposal: bias and variance of weighting",
        "w(x) rescales row x of the gradient and is blind to the baseline; a weight that depends on the chosen token or"
        " on what follows it (surprisal, gradient norm, 1/length, a norm over the rollout) turns b ≠ V into bias and"
        " can point downhill",
        check_weighting,
    ),
)
