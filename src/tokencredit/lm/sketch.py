"""Every token's gradient at once: random directions pushed forward through the model.

    s = ∇log p_t · u        E s² = ‖∇log p_t‖²        q = uᵀ F u        E q = tr F        for E[u uᵀ] = I

One forward pass per direction serves all tokens of a batch. The LM head's part is exact, ‖e_t − p‖² ‖h‖² (Σᵥ pᵥ(1−pᵥ)
‖h‖² for the Fisher trace), and only the body is sketched; its position-local part is known exactly too and serves as a
control variate (local.py). Where the body uses the head's weight as well (tied embeddings), the same direction goes
through both uses and 2 s_body s_head is added: its mean is twice the product of the two uses' gradients. The relative
error of a sketched norm is 1/√(2K) for Gaussian directions and little more for these.

Forward mode gives the tangents of the hidden states exactly; finite differences (h(θ + εu) − h(θ))/ε need no derivative
of any attention kernel, and are taken with routings and thresholds held as they are (decisions.py). Source: Hutchinson
1990 for the estimator; the split and the rank-one directions are measured in the docs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencredit.lm.attention import differentiable_attention
from tokencredit.lm.decisions import Decisions, num_experts
from tokencredit.lm.directions import Coverage, Directions, Moved
from tokencredit.lm.local import local_part
from tokencredit.lm.readout import Readout, Sequences, check_finite
from tokencredit.lm.tangents import Tangents, head_gradient, head_norms, head_tangents
from tokencredit.masked import wide

TARGET = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Relative change of the hidden states that a finite difference aims at: below it rounding grows, above it curvature.
Half: 0.05.
"""
AGREES = 0.05
"""Largest relative difference between a finite difference and the exact derivative along the same direction."""
GOOD = 0.02
"""The same, from which on no other step is tried. A float64 model may compute norms or rotations in float32 and need
that one's step.
"""
RETRIES = {torch.float64: (1e2, 1e3, 1e4)}
HALF_AGREES = 0.5
"""AGREES where half precision limits both sides."""
JUMPS = 10.0
"""Times a token's median tangent from which on one is taken again with half the step: a jump doubles."""


@dataclass(frozen=True)
class DifferenceStep:
    """The step of a finite difference; its relative error along one direction, and what it was compared with."""

    eps: float
    central: bool
    error: float
    against: str


@dataclass(frozen=True, eq=False)
class Sketch:
    """Tangents along K directions, [K, N]; what is known exactly of the head and of the position-local gradient, [N],
    and the latter's tangents, [K, N]; `step` of a finite difference."""

    tangents: Tangents
    head_norm2: Tensor
    head_fisher: Tensor
    local_norm2: Tensor
    local_logprob: Tensor
    method: str
    step: DifferenceStep | None

    def norm2(self) -> Tensor:
        """[K, N]: unbiased samples of ‖∇log p_t‖²."""
        t = self.tangents
        body = self.local_norm2 + t.logprob.square() - self.local_logprob.square()
        return self.head_norm2 + (body if t.head_logprob is None else body + 2 * t.logprob * t.head_logprob)

    def fisher(self) -> Tensor:
        """[K, N]: unbiased samples of tr F. ValueError where traces were left out."""
        t = self.tangents
        if t.variance is None:
            raise ValueError("this sketch has no Fisher traces: make it with traces=True")
        return self.head_fisher + (t.variance if t.covariance is None else t.variance + 2 * t.covariance)


def sketch(
    readout: Readout,
    coverage: Coverage,
    batch: Sequences,
    *,
    num_directions: int,
    seed: int,
    method: str,
    tokens: int,
    norms: bool = True,
    traces: bool = True,
    whole: Sequences | None = None,
) -> Sketch:
    """Tangents of every scored token of `batch` along `num_directions` directions; method "jvp" or "finite_difference".

    norms=False leaves the control variate out, which is of use for norms alone; traces=False what Fisher traces alone
    need: a product with the vocabulary for every direction. `whole` is the batch that this one is a part of: the
    step of a finite difference is chosen on it. RuntimeError or NotImplementedError
    where the model has no forward-mode derivative ("jvp"), ValueError where its hidden states are not finite.
    """
    directions = Directions(coverage, num_directions, seed)
    trial = {"input_ids": batch.ids[:1, :2], "attention_mask": batch.attention[:1, :2], "use_cache": False}
    moved = Moved(readout.body, coverage, **trial)
    step = calibrate(readout, moved, directions, whole or batch) if method == "finite_difference" else None
    push = _forward_mode if step is None else _differences(step)
    parts, order = [], []
    for part, keep in batch.chunks(tokens):
        hidden, tangents = push(readout, moved, directions, part)
        check_finite(hidden, "hidden states")
        through, known, states = _through_head(readout, coverage, directions, part, hidden, tangents, traces)
        none = wide(hidden).new_zeros(len(part)), wide(hidden).new_zeros(num_directions, len(part))
        local = local_part(readout, moved, directions, part, states) if norms else none
        parts.append((*head_norms(hidden, readout.head, part.target, coverage, known), *local, through))
        order.append(keep)
    back = torch.cat(order).argsort()
    norm2, traces, local_norm2, local_logprob, pieces = zip(*parts)
    tangents = Tangents(*(None if x[0] is None else torch.cat(x, 1)[:, back] for x in zip(*pieces)))
    known = (
        torch.cat(norm2)[back],
        torch.cat(traces)[back],
        torch.cat(local_norm2)[back],
        torch.cat(local_logprob, 1)[:, back],
    )
    return Sketch(tangents, *known, method, step)


def _through_head(
    readout: Readout,
    coverage: Coverage,
    directions: Directions,
    part: Sequences,
    hidden: Tensor,
    tangents: Tensor,
    traces: bool,
) -> tuple[Tangents, tuple[Tensor, Tensor] | None, Tensor | None]:
    """(tangents of the head's outputs, norms in the logits and ∂log p_t/∂h where they were made on the way)."""
    name, head = coverage.name_of(readout.head.weight), readout.head
    factors = None if name is None else directions.factors[name]
    used = any(p is head.weight for p in readout.body.parameters())
    tied = (factors["r"], factors["c"]) if factors and used else None
    if traces:
        return head_tangents(hidden, tangents, head, part.target, tied), None, None
    found = head_gradient(hidden, head, part.target, tied[0] if tied else None)
    s = torch.einsum("knd,nd->kn", wide(tangents), found.states)
    own = tied and found.along * (tied[1].to(found.states.dtype) @ wide(hidden).t())
    return Tangents(s, head_logprob=own), (found.norm2, found.trace), found.states


def _picked(readout: Readout, part: Sequences, body: Callable[..., Any] | None = None) -> Tensor:
    """[N, D]: the hidden states that predict the scored tokens."""
    return readout.hidden(part.ids, part.attention, body)[part.row, part.position]


def _moved_states(readout: Readout, moved: Moved, part: Sequences, eps: Any, direction: dict) -> Tensor:
    return _picked(readout, part, lambda **inputs: moved(eps, direction, **inputs))


def _unmoved(readout: Readout, part: Sequences) -> tuple[Tensor, Decisions]:
    """(hidden states [N, D], what was decided on the way). ValueError for a mixture of experts whose routing is not
    seen.
    """
    decisions = Decisions()
    with decisions.recorded():
        hidden = _picked(readout, part)
    experts = num_experts(readout.model.config)
    if experts > 1 and not decisions.routed:
        raise ValueError(
            f"{type(readout.model).__name__} is a mixture of {experts} experts, and its routing (a top-k, a sort or a"
            " maximum) was not seen: a finite difference may cross its borders; use method='jvp' or 'exact'"
        )
    return hidden, decisions


def _tangent(readout: Readout, moved: Moved, part: Sequences, direction: dict) -> tuple[Tensor, Tensor]:
    zero = torch.zeros((), dtype=next(readout.body.parameters()).dtype, device=part.ids.device)
    return torch.func.jvp(
        lambda eps: _moved_states(readout, moved, part, eps, direction), (zero,), (torch.ones_like(zero),)
    )


@torch.no_grad()
def _forward_mode(readout: Readout, moved: Moved, directions: Directions, part: Sequences) -> tuple[Tensor, Tensor]:
    """(hidden [N, D], tangents [K, N, D]): all directions together where the model's operations allow it, one by one
    otherwise.
    """
    with differentiable_attention(readout.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            hidden, tangents = torch.func.vmap(lambda u: _tangent(readout, moved, part, u), out_dims=0)(
                directions.factors
            )
            return hidden[0], tangents
        except (RuntimeError, ValueError, NotImplementedError):
            found = [_tangent(readout, moved, part, directions[k]) for k in range(directions.num)]
    return found[0][0], torch.stack([tangent for _, tangent in found])


def _differences(step: DifferenceStep):
    @torch.no_grad()
    def push(readout, moved, directions, part):
        hidden, decisions = _unmoved(readout, part)

        def along(k: int, eps: float) -> Tensor:
            return _difference(readout, moved, part, directions[k], eps, step.central, hidden, decisions)

        tangents = torch.stack([along(k, step.eps) for k in range(directions.num)])
        _refuse_jumps(readout, tangents, step.eps, along)
        return hidden, tangents

    return push


def _refuse_jumps(readout: Readout, tangents: Tensor, eps: float, along: Callable[[int, float], Tensor]) -> None:
    """ValueError where a tangent [K, N, D] stands out among its token's and changes with the step: a decision that was
    not seen.
    """
    size = tangents.norm(dim=2)
    suspect = size > JUMPS * size.median(0).values
    for k in suspect.any(1).nonzero()[:, 0].tolist():
        change = (along(k, eps / 2) - tangents[k]).norm(dim=1)
        if (change[suspect[k]] > 0.5 * size[k, suspect[k]]).any():
            raise ValueError(
                f"{type(readout.model).__name__} is not smooth where finite differences of step {eps:.1e} look (a"
                " routing or a threshold in a kernel of its own?): use method='jvp' or 'exact'"
            )


def _difference(readout, moved, part, direction, eps: float, central: bool, hidden: Tensor, given: Decisions) -> Tensor:
    with given.given():
        ahead = wide(_moved_states(readout, moved, part, eps, direction))
    behind = wide(hidden)
    if central:
        with given.given():
            behind = wide(_moved_states(readout, moved, part, -eps, direction))
    return (ahead - behind) / (eps * (1 + central))


@torch.no_grad()
def calibrate(readout: Readout, moved: Moved, directions: Directions, batch: Sequences) -> DifferenceStep:
    """The step that changes hidden states by about TARGET, checked on one short row and direction against forward mode.

    Where the model has no forward mode, against twice the step. Where the error exceeds GOOD, smaller and larger steps
    are tried. ValueError where none agrees.
    """
    small, u = _short(batch), directions[0]
    hidden, decisions = _unmoved(readout, small)
    check_finite(hidden, "hidden states")
    central = hidden.dtype not in TARGET
    eps = _step_size(readout, moved, small, u, hidden, decisions, TARGET.get(hidden.dtype, 0.05))

    def along(step: float) -> Tensor:
        change = _difference(readout, moved, small, u, step, central, hidden, decisions)
        return _logprob_tangent(readout, small, hidden, change)

    truth = _true_tangent(readout, moved, small, u, hidden)
    against = "twice the step" if truth is None else "forward mode"

    def error(step: float) -> float:
        return _relative(along(step), along(2 * step) if truth is None else truth)

    errors = {eps: error(eps)}
    if not errors[eps] <= GOOD:
        errors |= {eps * factor: error(eps * factor) for factor in RETRIES.get(hidden.dtype, (0.1, 10.0))}
    best = min(errors, key=errors.get)
    if not errors[best] <= (HALF_AGREES if central else AGREES):
        raise ValueError(
            f"finite differences disagree with {against} by {errors[best]:.0%} at the best step {best:.1e}: use"
            " method='jvp'"
        )
    return DifferenceStep(best, central, errors[best], against)


def _true_tangent(readout: Readout, moved: Moved, small: Sequences, u: dict, hidden: Tensor) -> Tensor | None:
    """[N]: s along u by forward mode; None where the model has none."""
    try:
        with differentiable_attention(readout.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _logprob_tangent(readout, small, hidden, _tangent(readout, moved, small, u)[1])
    except (RuntimeError, ValueError, NotImplementedError):
        return None


def _step_size(readout, moved, small, u, hidden: Tensor, decisions: Decisions, target: float) -> float:
    eps, scale = target * 1e-2, wide(hidden).norm()
    for _ in range(6):
        with decisions.given():
            ahead = _moved_states(readout, moved, small, eps, u)
        change = float((wide(ahead) - wide(hidden)).norm() / scale)
        if target / 3 < change < target * 3:
            return eps * target / change
        eps *= min(max(target / change if change > 0 else 100.0, 1e-2), 100.0)
    return eps


def _logprob_tangent(readout: Readout, small: Sequences, hidden: Tensor, tangent: Tensor) -> Tensor:
    return head_tangents(hidden, wide(tangent)[None], readout.head, small.target).logprob[0]


def _relative(found: Tensor, truth: Tensor) -> float:
    """Root mean square difference over the root mean square; 0 where both are 0."""
    scale = float(truth.norm())
    return float((found - truth).norm()) / scale if scale > 0 else float(found.norm())


def _short(batch: Sequences, most: int = 32) -> Sequences:
    """One row of a batch, up to `most` tokens behind its first scored one."""
    row = int(batch.row.mode().values)
    mine = batch.row == row
    end = int(batch.position[mine].min()) + most
    keep = (mine & (batch.position < end)).nonzero()[:, 0]
    width = int(batch.position[keep].max()) + 2
    return Sequences(
        batch.ids[row : row + 1, :width],
        batch.attention[row : row + 1, :width],
        torch.zeros_like(batch.row[keep]),
        batch.position[keep],
        batch.target[keep],
        tuple(x[keep] for x in batch.origin),
        batch.shape,
    )
