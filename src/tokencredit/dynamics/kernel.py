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

Gradients are written down as they are made, parameter by parameter, and multiplied block by block: no more than a block
of them is in memory where they are in a file (`gradient_matrix`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencredit.dynamics.gradient_matrix import LIMIT, Matrix, blank, blocks, places, precision
from tokencredit.dynamics.optimizer import Moments, OptimizerState, Rule
from tokencredit.dynamics.passes import Passes
from tokencredit.dynamics.update import Update
from tokencredit.dynamics.vectors import Derived, Vector, scaled
from tokencredit.lm.exact import ELEMENTS, element_gradients

BLOCK = 1 << 14
"""Parameters whose products are added in the gradients' own precision; the sum over blocks is float64."""

Heard = Callable[[int], Any]


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
        return Derived(self.inverse, lambda name: self.inverse[name].sqrt())


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
    return Preconditioner(update.passes.kept(scaled(update.gain, 1 / f)), f)


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

    matrix: Matrix
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
    passes: Passes,
    preconditioner: Preconditioner,
    where: Tensor | None = None,
    *,
    limit: int = LIMIT,
    folder: Path | None = None,
    heard: Heard | None = None,
) -> Features:
    """P^-½ ∇log π of every token, or of those `where` [B, T] is true, in the order of rows and positions: one backward
    pass each.

    What would take more than `limit` bytes is in a file of `folder`, and without one refused with a ValueError. `heard`
    is told how many are made.
    """
    found = _prepare(passes, chosen(passes, where), "tokens", limit, folder)
    parameters = list(passes.parameters.values())
    place = torch.full((len(passes.batch),), -1)
    at = passes.place[0].cpu(), passes.place[1].cpu()
    place[_among(at, found)] = torch.arange(len(found))
    few = max(min(ELEMENTS // found.matrix.shape[1], 64), 1)
    store = _writer(found, preconditioner, passes)
    for logprob, keep in passes.by_row():
        target = place[keep.cpu()]
        for some in (target >= 0).nonzero()[:, 0].split(few):
            for name, g in zip(passes.parameters, element_gradients(logprob, parameters, some.to(logprob.device))):
                if g is not None:
                    store(target[some], name, g)
            if heard:
                heard(len(some))
    return found


def sequence_features(
    passes: Passes,
    preconditioner: Preconditioner,
    weight: Tensor | None = None,
    *,
    limit: int = LIMIT,
    folder: Path | None = None,
    heard: Heard | None = None,
) -> Features:
    """P^-½ Σₜ wₜ ∇log π(t) of every completion with a token of weight other than 0 (1 each by default): one reverse
    pass per completion. `limit`, `folder` and `heard` as of `token_features`.
    """
    weight = passes.grid(torch.ones(len(passes.batch), dtype=torch.float64)) if weight is None else weight
    rows = (weight != 0).any(1).nonzero()[:, 0]
    found = _prepare(passes, (rows, torch.full_like(rows, -1)), "completions", limit, folder)
    store = _writer(found, preconditioner, passes)
    for i, row in enumerate(rows.tolist()):

        def write(_: int, name: str, g: Tensor, i: int = i) -> None:
            store(torch.tensor([i]), name, g[None])

        passes.tell_gradients([[weight]], torch.arange(len(weight)) == row, write)
        if heard:
            heard(1)
    return found


def chosen(passes: Passes, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """(row, position) [N] of the tokens that are there and, with `where` [B, T], asked for."""
    there = passes.grid(torch.ones(len(passes.batch))) > 0
    return (there if where is None else there & where).nonzero(as_tuple=True)


def _among(at: tuple[Tensor, Tensor], found: Features) -> Tensor:
    """Which of the scored tokens are those of `found`."""
    width = int(at[1].max()) + 1
    return torch.isin(at[0] * width + at[1], found.row * width + found.position)


def _prepare(passes: Passes, units: tuple[Tensor, Tensor], what: str, limit: int, folder: Path | None) -> Features:
    """Features that are 0."""
    if not len(units[0]):
        raise ValueError(f"none of the {what} was asked for: a kernel needs at least one")
    return Features(blank(passes, len(units[0]), what, limit=limit, folder=folder), *units)


def _writer(found: Features, preconditioner: Preconditioner, passes: Passes) -> Callable[[Tensor, str, Tensor], None]:
    """Writes the gradients [n, ...] of a parameter into rows [n] of the features, scaled."""
    matrix, dtype, columns = found.matrix, precision(passes.parameters), places(passes.parameters)
    root = preconditioner.root if passes.large else dict(preconditioner.root)

    def store(rows: Tensor, name: str, gradients: Tensor) -> None:
        factor = root[name].flatten().to(gradients.device, dtype)
        matrix[rows.to(matrix.device), columns[name]] = gradients.flatten(1).to(dtype) * factor

    return store


def kernel(left: Features, right: Features | None = None) -> Tensor:
    """K [N, N'] float64 between two sets, or [N, N] within one: symmetric to the last digit."""
    other = left if right is None else right
    found = torch.zeros(len(left), len(other), dtype=torch.float64, device=left.matrix.device)
    for columns in blocks(left.matrix.shape[1], max(len(left), len(other)), BLOCK):
        some = left.matrix[:, columns]
        others = some if right is None else other.matrix[:, columns]
        for x, y in zip(some.split(BLOCK, 1), others.split(BLOCK, 1)):
            found += (x @ y.t()).double()
    return ((found + found.t()) / 2 if right is None else found).cpu()


def cosines(k: Tensor) -> Tensor:
    """K(t, t') / √(K(t, t) K(t', t')), and 0 where a gradient is 0."""
    scale = k.diagonal().clamp(min=0).rsqrt()
    scale = scale.masked_fill(~torch.isfinite(scale), 0)
    return k * scale[:, None] * scale


def contributions(k: Tensor, coefficient: Tensor, fresh: float, clip: float = 1.0) -> Tensor:
    """[N', N]: what each of N senders does to the log-probability of each of N' receivers, −f s K(t', t) κₜ; κ [N]."""
    return -fresh * clip * k * coefficient
