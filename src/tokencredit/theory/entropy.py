"""What the entropy of a next-token distribution says about its gradients: the collision bound, L1 and L2.

    H = −Σ p log p        G = 1 − Σ p²        g(v) = ∇ log p(v) = φ(v) − E_p φ   for p ∝ exp(θ·φ)

D is the diameter of the features, max ‖φ(u) − φ(v)‖. One-hot features are the logits themselves: then D = √2 and tr F =
E‖g‖² = G. Proofs: docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import exp, log

import torch
from torch import Tensor

from tokencredit.theory.statement import Check, Statement

ROUNDING = 1e-12
"""Sums of at most 1,000 terms in float64, each of size at most 7: errors stay below 1,000 · 7 · 2⁻⁵²."""

RARE = (1e-1, 1e-2, 1e-4, 1e-8)
SHARP_L2 = 4 * log(2)


def others(p: Tensor) -> Tensor:
    """[V]: 1 − p, to full relative precision also where p is nearly 1."""
    rest, top = 1 - p, int(p.argmax())
    rest[top] = p[:top].sum() + p[top + 1 :].sum()
    return rest


def collision(p: Tensor) -> Tensor:
    """G = Σ p (1 − p), which loses no digits where 1 − Σ p² does."""
    return p @ others(p)


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def collision_bound(h: float) -> float:
    """min(H / (2 ln 2), 1 − e^−H): the largest known G at entropy H; both are attained by the fair coin."""
    return min(h / (2 * log(2)), 1 - exp(-h))


def rare_token(eps: float, others: int = 1) -> Tensor:
    """1 − eps on one token, eps spread evenly over `others`."""
    return torch.cat(
        [torch.tensor([1 - eps], dtype=torch.float64), torch.full((others,), eps / others, dtype=torch.float64)]
    )


def distributions(largest: int = 1000, seed: int = 0) -> Iterator[Tensor]:
    """Fair coins and dice, rare tokens, and Dirichlet draws from nearly certain to nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    yield from (torch.full((sides,), 1 / sides, dtype=torch.float64) for sides in (2, 3, 5, 20))
    yield from (rare_token(eps, others) for eps in RARE for others in (1, 7))
    for size in (each for each in (2, 3, 16, 64, 1000) if each <= largest):
        for spread in (8.0, 3.0, 1.0, 0.3):
            yield from torch.softmax(spread * torch.randn(20, size, generator=generator, dtype=torch.float64), -1)


def features(size: int, seed: int = 0) -> list[Tensor]:
    """[size, d] features: one-hot, and Gaussian in 3 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.eye(size, dtype=torch.float64), torch.randn(size, 3, generator=generator, dtype=torch.float64)]


def diameter(phi: Tensor) -> float:
    # Direct differences: cdist's matrix product loses the digits of small distances.
    return float((phi[:, None] - phi).norm(dim=-1).max())


def score(p: Tensor, phi: Tensor) -> Tensor:
    """[V, d]: g(v) = Σᵤ p(u) (φ(v) − φ(u)), which loses no digits where φ(v) − E_p φ does."""
    return torch.einsum("u,vud->vd", p, phi[:, None] - phi)


def check_collision(slack: Callable[[float, float], float] = lambda g, h: collision_bound(h) - g) -> Check:
    """slack(G, H) ≥ 0 for every distribution, and 0 for one."""
    found = [(float(collision(p)), float(entropy(p))) for p in distributions()]
    left = [slack(g, h) for g, h in found]
    rare = rare_token(1e-6, 100_000)
    return Check(
        {
            "largest G / bound": max(g / collision_bound(h) for g, h in found),
            "largest G / H": max(g / h for g, h in found),
            "1 / (2 ln 2)": 1 / (2 * log(2)),
            "G / H, 1e-6 spread over 1e5 tokens": float(collision(rare) / entropy(rare)),
        },
        {
            "holds": min(left) >= -ROUNDING,
            "attained": min(left) <= ROUNDING,
            "bound <= 1 - exp(-H) <= min(H, 1)": all(
                collision_bound(h) <= 1 - exp(-h) + ROUNDING <= min(h, 1) + 2 * ROUNDING for _, h in found
            ),
        },
    )


def check_log_linear(
    constant: float = 0.5, pointwise: Callable[[Tensor, Tensor], Tensor] = lambda p, h: others(p)
) -> Check:
    """E‖g‖² ≤ constant · D² G with equality somewhere; ‖g(v)‖ ≤ D · pointwise(p(v), H) for every token."""
    square, at_token, at_mode, wrong_gradient = [], [], [], 0.0
    for p in distributions(largest=64):
        h = entropy(p)
        for phi in features(len(p)):
            d, norm = diameter(phi), score(p, phi).norm(dim=-1)
            square.append(float(p @ norm.square() / (constant * d**2 * collision(p))))
            at_token.append(float((norm / d - pointwise(p, h)).max()))
            at_mode.append(float(norm[p.argmax()] / d + torch.expm1(-h)))
            wrong_gradient = max(wrong_gradient, _gradient_error(p, phi))
    pointwise_ratio, mean_ratio = {}, {}
    for eps in RARE:
        p = rare_token(eps)
        norm, h = score(p, features(2)[0]).norm(dim=-1), entropy(p)
        pointwise_ratio[eps], mean_ratio[eps] = float(norm[1] / h.sqrt()), float((p @ norm.square() / h).sqrt())
    return Check(
        {
            "largest E|g|^2 / (constant D^2 G)": max(square),
            "largest |g|/D - pointwise": max(at_token),
            **{f"|g|/sqrt(H) at the rare token, eps = {eps:g}": ratio for eps, ratio in pointwise_ratio.items()},
            **{f"rms|g|/sqrt(H), eps = {eps:g}": ratio for eps, ratio in mean_ratio.items()},
        },
        {
            "g is the gradient": wrong_gradient <= ROUNDING,
            "mean square holds": max(square) <= 1 + ROUNDING,
            "mean square attained": max(square) >= 1 - ROUNDING,
            "pointwise holds": max(at_token) <= ROUNDING,
            "mode: |g| <= D (1 - exp(-H))": max(at_mode) <= ROUNDING,
            "|g|/sqrt(H) is unbounded": (
                list(pointwise_ratio.values()) == sorted(pointwise_ratio.values()) and pointwise_ratio[1e-8] > 1e3
            ),
        },
    )


def _gradient_error(p: Tensor, phi: Tensor) -> float:
    """|∇_θ log p(v) − g(v)| at the likeliest token v, by automatic differentiation; the base measure makes the policy p
    at θ = 0.
    """
    theta = torch.zeros(phi.shape[1], dtype=torch.float64, requires_grad=True)
    v = int(p.argmax())
    (gradient,) = torch.autograd.grad(torch.log_softmax(p.log() + phi @ theta, -1)[v], theta)
    return float((gradient - score(p, phi)[v]).abs().max())


def check_trace_bound(threshold: float = SHARP_L2) -> Check:
    """tr F ≤ |V| H for every p exactly if D² ≤ threshold · |V|."""

    def ratio(p: Tensor, phi: Tensor, width: float) -> float:
        """tr F / (|V| H) with the features scaled to D² = width · |V|."""
        scale = width * len(p) / diameter(phi) ** 2
        return float(p @ score(p, phi).square().sum(-1) * scale / (len(p) * entropy(p)))

    inside = [ratio(p, phi, threshold) for p in distributions(largest=64) for phi in features(len(p))]
    coin = torch.zeros(40, dtype=torch.float64)
    coin[:2] = 0.5
    logits = torch.eye(40, dtype=torch.float64)
    return Check(
        {
            "largest tr F / (|V| H) at the threshold": max(inside),
            "tr F, one-hot features times 10, two of 40 tokens": float(100 * collision(coin)),
            "|V| H, the same": float(40 * entropy(coin)),
            "tr F / (|V| H) of logits, the same p": ratio(coin, logits, 2 / 40),
        },
        {
            "holds up to the threshold": max(inside) <= 1 + ROUNDING,
            "broken 1 % above it": ratio(coin, logits, 1.01 * threshold) > 1,
        },
    )


STATEMENTS = (
    Statement(
        "G",
        "1 − ‖p‖² ≤ 1 − e^−H ≤ min(H, 1)",
        "true",
        "collision probability and entropy (Jensen)",
        "G ≤ min(H / (2 ln 2), 1 − e^−H), both attained by the fair coin; no bound from below: G / H can be any small"
        " number",
        check_collision,
    ),
    Statement(
        "L1",
        "‖∇ log π(v)‖ = O(√H) under a log-linear policy",
        "true in root mean square, false pointwise",
        "the proposal, lemma 1",
        "E‖g‖² ≤ (D²/2) G ≤ (D²/2) min(H / (2 ln 2), 1 − e^−H); pointwise ‖g(v)‖ ≤ D (1 − p(v)) ≤ D · min(surprisal,"
        " 1); at the likeliest token ‖g‖ ≤ D (1 − e^−H)",
        check_log_linear,
    ),
    Statement(
        "L2",
        "tr F ≤ |V| H",
        "vacuous in logit space, false in parameter space",
        "the proposal, lemma 2",
        "tr F ≤ (D²/2) G; tr F ≤ |V| H for every p exactly if D² ≤ 4 ln 2 · |V|. In logit space tr F = G ≤ H / (2 ln"
        " 2): |V| is idle",
        check_trace_bound,
    ),
)
