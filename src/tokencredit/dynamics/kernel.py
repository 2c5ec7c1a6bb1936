"""The Fisher kernel: how much one step on a token moves the log-probability of another.

    K(t, t') = ∇log π(t)ᵀ P⁻¹ ∇log π(t')

    δ log π(t') = −f s Σₜ K(t', t) κₜ + ∇log π(t')·(μ + δ)          κₜ = ∂L/∂log π(t), s the clipping of the gradient

to first order in the step, the identity being exact for the forward derivative along it. P is diagonal: the identity
for SGD; for AdamW its D after the batch's own gradient has entered v, and f what a fresh gradient gets of one step
besides:

    P = D = √v′ / √(1 − β₂ᵗ) + ε          f = η (1 − β₁) / (1 − β₁ᵗ)
                                                                          f P⁻¹ = a, the gain of `optimizer.step_parts`

Three things that are not AdamW's influence: the product of two preconditioned gradients, which is P⁻²; D without its
bias correction; and leaving out f. For a whole completion log π is the sum over its tokens, and so are the kernel's
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencredit.dynamics.optimizer import Moments, OptimizerState, Rule
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.update import Update
from tokencredit.dynamics.vectors import Vector, scaled
from tokencredit.lm.exact import ELEMENTS, element_gradients
from tokencredit.masked import wide

LIMIT = 2 << 30
"""Bytes of gradients that are held at once."""
BLOCK = 1 << 14
"""Parameters whose products are added in the gradients' own precision; the sum over blocks is float64."""


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """P⁻¹ > 0 by parameter name, and f: what a step makes of a gradient g is −f P⁻¹ g, besides momentum and decay."""

    inverse: Vector
    fresh: float

    def __post_init__(self) -> None:
        if odd := [name for name, x in self.inverse.items() if not (torch.isfinite(x).all() and (x > 0).all())]:
            raise ValueError(f"P⁻¹ has to be positive and finite; it is not for {', '.join(odd[:3])}")

    @property
    def root(self) -> Vector:
        """P^-½."""
        return {name: x.sqrt() for name, x in self.inverse.items()}


def identity(parameters: Mapping[str, Tensor], lr: float = 1.0) -> Preconditioner:
    """P = I: plain gradient descent at rate `lr`."""
    return Preconditioner(
        {name: torch.ones(p.shape, dtype=torch.float64, device=p.device) for name, p in parameters.items()}, lr
    )


def of_update(update: Update, optimizer: OptimizerState) -> Preconditioner:
    """The preconditioner of the step itself: v′ holds the batch's gradient. f P⁻¹ is the update's gain, elementwise.

    Where groups of parameters differ in η, β₁ or the number of steps, f is the largest of their factors and P⁻¹ holds
    the rest.
    """
    rate = update.lr / optimizer.lr
    f = max(
        (_fresh(optimizer.rules[name], optimizer.moments[name], gain, rate) for name, gain in update.gain.items()),
        key=abs,
    )
    return Preconditioner(scaled(update.gain, 1 / f), f)


def of_state(optimizer: OptimizerState) -> Preconditioner:
    """AdamW's D of the state as it is, without any batch: the kernel between completions that are not a training batch.

    f is that of the next step. ValueError where the optimizer has made no step, for it has no v then.
    """
    inverse, factors = {}, []
    for name, rule in optimizer.rules.items():
        moments = optimizer.moments[name]
        if rule.kind == "sgd" or moments.second is None or moments.step < 1:
            raise ValueError(
                f"{name} has no second moment: AdamW's preconditioner without a batch needs the state of an Adam that"
                " has made a step. Take that of an update (`of_update`), or the identity"
            )
        second = moments.second if moments.largest is None else moments.largest
        inverse[name] = 1 / (second.double().sqrt() / (1 - rule.betas[1] ** moments.step) ** 0.5 + rule.eps)
        factors.append(_fresh(rule, moments, inverse[name]))
    return Preconditioner(inverse, max(factors, key=abs))


def _fresh(rule: Rule, moments: Moments, gain: Tensor, rate: float = 1.0) -> float:
    """f of one parameter at `rate` times the rule's η; SGD's gain is the same everywhere and is all of it."""
    if rule.kind == "sgd":
        return float(gain.flatten()[0])
    return (
        rate * rule.lr * (1 - rule.betas[0]) / (1 - rule.betas[0] ** (moments.step + 1)) * (-1 if rule.maximize else 1)
    )


@dataclass(frozen=True, eq=False)
class Features:
    """Φ [N, M] with K = Φ Φᵀ: scaled gradients, or a sketch of them.

    row, position   [N]: which completion and which of its tokens; position −1 for a whole completion
    noise           standard error of a cosine that is 0: 1/√directions of a sketch, 0 of exact gradients
    """

    matrix: Tensor
    row: Tensor
    position: Tensor
    noise: float = 0.0

    def __len__(self) -> int:
        return len(self.matrix)

    def by_row(self, weight: Tensor) -> Features:
        """Those of completions from those of tokens: Σₜ w Φ(t) over each row's tokens, weight [N]."""
        rows, index = torch.unique(self.row, return_inverse=True)
        found = self.matrix.new_zeros(len(rows), self.matrix.shape[1]).index_add_(
            0, index, self.matrix * weight.to(self.matrix)[:, None]
        )
        return Features(found, rows, torch.full_like(rows, -1), self.noise)


def token_features(
    passes: Passes, preconditioner: Preconditioner, where: Tensor | None = None, *, limit: int = LIMIT
) -> Features:
    """P^-½ ∇log π of every token, or of those `where` [B, T] is true, in the order of rows and positions: one backward
    pass each.

    ValueError where they would take more than `limit` bytes.
    """
    found, parameters = _prepare(passes, chosen(passes, where), "tokens", limit)
    place = torch.full((len(passes.batch),), -1)
    at = passes.place[0].cpu(), passes.place[1].cpu()
    place[_among(at, found)] = torch.arange(len(found))
    few = max(min(ELEMENTS // found.matrix.shape[1], 64), 1)
    store = _writer(found.matrix, preconditioner.root, passes)
    for logprob, keep in passes.by_row():
        target = place[keep.cpu()]
        for some in (target >= 0).nonzero()[:, 0].split(few):
            store(target[some], element_gradients(logprob, parameters, some.to(logprob.device)))
    return found


def sequence_features(
    passes: Passes, preconditioner: Preconditioner, weight: Tensor | None = None, *, limit: int = LIMIT
) -> Features:
    """P^-½ Σₜ wₜ ∇log π(t) of every completion with a token of weight other than 0 (1 each by default): one reverse
    pass per completion.
    """
    weight = passes.grid(torch.ones(len(passes.batch), dtype=torch.float64)) if weight is None else weight
    rows = (weight != 0).any(1).nonzero()[:, 0]
    found, _ = _prepare(passes, (rows, torch.full_like(rows, -1)), "completions", limit)
    store = _writer(found.matrix, preconditioner.root, passes)
    for i, row in enumerate(rows.tolist()):
        gradient = passes.reverse(torch.zeros_like(weight).index_copy_(0, torch.tensor([row]), weight[row : row + 1]))
        store(torch.tensor([i]), [gradient[name][None] for name in passes.parameters])
    return found


def chosen(passes: Passes, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """(row, position) [N] of the tokens that are there and, with `where` [B, T], asked for."""
    there = passes.grid(torch.ones(len(passes.batch))) > 0
    return (there if where is None else there & where).nonzero(as_tuple=True)


def _among(at: tuple[Tensor, Tensor], found: Features) -> Tensor:
    """Which of the scored tokens are those of `found`."""
    width = int(at[1].max()) + 1
    return torch.isin(at[0] * width + at[1], found.row * width + found.position)


def _prepare(passes: Passes, units: tuple[Tensor, Tensor], what: str, limit: int) -> tuple[Features, list[Tensor]]:
    parameters = list(passes.parameters.values())
    num, size = len(units[0]), sum(p.numel() for p in parameters)
    dtype = wide(torch.empty(0, dtype=parameters[0].dtype)).dtype
    needed = num * size * dtype.itemsize
    if not num:
        raise ValueError(f"none of the {what} was asked for: a kernel needs at least one")
    if needed > limit:
        raise ValueError(
            f"{num:,} {what} × {size:,} parameters are {needed / 2**30:.1f} GiB of gradients, more than the "
            f"{limit / 2**30:.1f} GiB that an exact kernel may hold. Take fewer prompts or rollouts, whole completions "
            "(--sequences), or a sketch (--directions 512)"
        )
    return Features(torch.zeros(num, size, dtype=dtype, device=parameters[0].device), *units), parameters


def _writer(
    matrix: Tensor, root: Mapping[str, Tensor], passes: Passes
) -> Callable[[Tensor, list[Tensor | None]], None]:
    """Writes gradients [n, ...] of every parameter into rows of the matrix, scaled."""
    factors = [root[name].flatten().to(matrix) for name in passes.parameters]
    offsets = [0]
    for factor in factors:
        offsets.append(offsets[-1] + len(factor))

    def store(rows: Tensor, gradients: list[Tensor | None]) -> None:
        for start, end, factor, gradient in zip(offsets, offsets[1:], factors, gradients):
            if gradient is not None:
                matrix[rows.to(matrix.device), start:end] = gradient.flatten(1).to(matrix) * factor

    return store


def kernel(left: Features, right: Features | None = None) -> Tensor:
    """K [N, N'] float64 between two sets, or [N, N] within one: symmetric to the last digit."""
    other = left if right is None else right
    found = torch.zeros(len(left), len(other), dtype=torch.float64, device=left.matrix.device)
    for start in range(0, left.matrix.shape[1], BLOCK):
        found += (left.matrix[:, start : start + BLOCK] @ other.matrix[:, start : start + BLOCK].t()).double()
    return ((found + found.t()) / 2 if right is None else found).cpu()


def cosines(k: Tensor) -> Tensor:
    """K(t, t') / √(K(t, t) K(t', t')), and 0 where a gradient is 0."""
    scale = k.diagonal().clamp(min=0).rsqrt()
    scale = scale.masked_fill(~torch.isfinite(scale), 0)
    return k * scale[:, None] * scale


def contributions(k: Tensor, coefficient: Tensor, fresh: float, clip: float = 1.0) -> Tensor:
    """[N', N]: what each of N senders does to the log-probability of each of N' receivers, −f s K(t', t) κₜ; κ [N]."""
    return -fresh * clip * k * coefficient
