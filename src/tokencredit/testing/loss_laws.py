"""The laws of methods: of their credit as a whole, of their loss, and of how they are written down."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokencredit.credit import GroupCenter, LeaveOneOut, PolarityCenter
from tokencredit.methods import Method, Plan, parse
from tokencredit.rollouts import Rollouts
from tokencredit.testing.batches import logprobs_like, rollouts_strategy
from tokencredit.testing.laws import check_laws, differ, run_checks, widen, widened

METHOD_LAWS = {
    "needs": (
        "the credit depends on the scores in `needs` and on no other, a missing one is a KeyError that names it, and a"
        " surrogate that plans coefficients declares `plans`"
    ),
    "ties": "rollouts of a group that agree in reward and length get no credit, where the chain compares within groups",
    "additive": "with slices of the batch's plan, losses and gradients of micro-batches add up to those of the batch",
    "loss_padding": "neither the width of the padding nor what it holds changes the loss or its gradient",
    "gradient_off_mask": "the gradient is finite, and exactly 0 in the padding",
    "only_logprob": "the gradient reaches logprob alone: not old_logprob, not the credit, not the scores",
    "idle_rows": "with the sliced plan, rows without credit and without coefficients may be dropped",
    "stats": "stats are finite 0-dim tensors without gradient",
    "after": (
        "the method of the next batch does not depend on the order of rows or on padding, and its state gives it back"
    ),
    "round_trip": "repr, read by methods.parse, gives the method back",
    "pickles": "pickle gives the method back",
}


def check_method(
    method: Method,
    *,
    examples: int = 25,
    seed: int = 0,
    laws: Collection[str] | None = None,
    batches: st.SearchStrategy[Rollouts] | None = None,
) -> None:
    """Check a method: the laws of its credit chain, and METHOD_LAWS, on random ragged batches. AssertionError names the
    law.

    laws     only these of METHOD_LAWS, and none of the chain's
    batches  a strategy for rollouts of your own (float64, with the scores that the method needs)

    >>> check_method(METHODS["gtpo"])
    """
    batches = rollouts_strategy(sorted(method.needs)) if batches is None else batches
    checks = {name: check for name, check in _CHECKS.items() if laws is None or name in laws}
    written = {name: check for name, check in _WRITTEN.items() if laws is None or name in laws}
    for name, check in written.items():
        fault = check(method)
        if fault:
            raise AssertionError(f"{name}: {fault}, in {method!r}")
    run_checks(method, checks, batches, examples, seed)
    if laws is None:
        check_laws(method.chain, examples=examples, seed=seed, batches=batches)


def group_relative(method: Method) -> bool:
    """Whether the chain compares rollouts with their group, from what only reward and length tell apart, and then keeps
    signs.
    """
    parts = method.chain.parts
    at = [k for k, part in enumerate(parts) if isinstance(part, (GroupCenter, LeaveOneOut, PolarityCenter))]
    if not at or not all("keeps_sign" in part.laws for part in parts[at[-1] + 1 :]):
        return False
    return isinstance(parts[at[-1]], PolarityCenter) or not any(part.needs for part in parts[: at[-1]])


def _needs(method, rollouts, seed):
    decoy = torch.rand(rollouts.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=rollouts.reward.dtype)
    bare = replace(rollouts, scores={name: rollouts.scores[name] for name in method.needs})
    expected = method.credit(bare)
    for other in sorted({"entropy", "logprob", "decoy"} - method.needs):
        fault = differ(method.credit(replace(bare, scores={**bare.scores, other: decoy})), expected, rollouts.mask)
        if fault:
            return f'the score "{other}" is not in needs but changes the credit: {fault}'
    for name in method.needs:
        try:
            method.credit(replace(bare, scores={n: x for n, x in bare.scores.items() if n != name}))
            return f'the score "{name}" is in needs, but its absence is no error'
        except KeyError as error:
            if name not in str(error):
                return f'the error for the missing score "{name}" does not name it: {error}'
    if _case(method, bare, seed)[3].coefficient is not None and not method.surrogate.plans:
        return f"{type(method.surrogate).__name__} plans coefficients but does not declare `plans`"


def _ties(method, rollouts, seed):
    if not group_relative(method):
        return None
    # The first group alone: every row takes the reward and the number of tokens of its first row.
    rows = rollouts.rows(rollouts.group_index == 0) if len(rollouts) else rollouts
    mask = rows.mask[:1].expand_as(rows.mask).clone()
    scores = {
        name: torch.where(rows.mask, x, x[rows.mask].mean() if rows.mask.any() else 0)
        for name, x in rows.scores.items()
    }
    tied = Rollouts(rows.reward[:1].expand_as(rows.reward).clone(), rows.group, mask, scores, rows.success_above)
    if (method.credit(tied) != 0).any():
        return "a group whose rewards and lengths are all equal has credit"


def _loss(method: Method, rollouts: Rollouts, credit: Tensor, logprob: Tensor, old: Tensor, plan: Plan | None = None):
    """(loss, gradient, stats) at a fresh leaf."""
    leaf = logprob.detach().clone().requires_grad_()
    loss, stats = method.loss(logprob=leaf, old_logprob=old, credit=credit, rollouts=rollouts, plan=plan)
    loss.backward()
    return loss.detach(), leaf.grad, stats


def _case(method: Method, rollouts: Rollouts, seed: int) -> tuple[Tensor, Tensor, Tensor, Plan]:
    credit = method.credit(rollouts)
    logprob, old = logprobs_like(rollouts, seed)
    return credit, logprob, old, method.plan(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts)


def _same_loss(loss: Tensor, expected: Tensor) -> str | None:
    return differ(loss.view(1, 1), expected.view(1, 1), torch.ones(1, 1, dtype=torch.bool))


def _additive(method, rollouts, seed):
    credit, logprob, old, plan = _case(method, rollouts, seed)
    loss, gradient, _ = _loss(method, rollouts, credit, logprob, old)
    part = torch.randint(0, 3, (len(rollouts),), generator=torch.Generator().manual_seed(seed))
    total, pieces = torch.zeros_like(loss), torch.zeros_like(gradient)
    for keep in (part == k for k in range(3)):
        some, pieces[keep], _ = _loss(
            method, rollouts.rows(keep), credit[keep], logprob[keep], old[keep], plan.rows(keep)
        )
        total = total + some
    fault = _same_loss(total, loss) or differ(pieces, gradient, rollouts.mask)
    return fault and f"three micro-batches do not add up to the batch: {fault}"


def _loss_padding(method, rollouts, seed):
    credit, logprob, old, _ = _case(method, rollouts, seed)
    loss, gradient, _ = _loss(method, rollouts, credit, logprob, old)
    for fill in (torch.nan, 1e6):
        wide = [widen(x, rollouts.mask, fill) for x in (credit, logprob, old)]
        wide_loss, wide_gradient, _ = _loss(method, widened(rollouts, fill), *wide)
        fault = _same_loss(wide_loss, loss) or differ(wide_gradient[:, : gradient.shape[1]], gradient, rollouts.mask)
        if fault:
            return f"three more columns of padding that hold {fill} change the loss or its gradient: {fault}"


def _gradient_off_mask(method, rollouts, seed):
    _, gradient, _ = _loss(method, rollouts, *_case(method, rollouts, seed))
    if (gradient[~rollouts.mask] != 0).any():
        return "the padding of logprob has a gradient"
    if not torch.isfinite(gradient).all():
        return "NaN or infinite gradient"


def _only_logprob(method, rollouts, seed):
    scores = {name: x.clone().requires_grad_() for name, x in rollouts.scores.items()}
    carrying = replace(rollouts, scores=scores)
    credit, logprob, old, _ = _case(method, carrying, seed)
    credit, old = credit.requires_grad_(), old.requires_grad_()
    leaf = logprob.requires_grad_()
    plan = method.plan(logprob=leaf, old_logprob=old, credit=credit, rollouts=carrying)
    if plan.weight.requires_grad:
        return "the weights of the plan require a gradient"
    loss, _ = method.loss(logprob=leaf, old_logprob=old, credit=credit, rollouts=carrying, plan=plan)
    reached = torch.autograd.grad(loss, [leaf, old, credit, *scores.values()], allow_unused=True)
    for name, gradient in zip(("old_logprob", "credit", *scores), reached[1:]):
        if gradient is not None and gradient.numel():
            return f"{name} gets a gradient"


def _idle_rows(method, rollouts, seed):
    credit, logprob, old, plan = _case(method, rollouts, seed)
    silent = torch.rand(len(rollouts), generator=torch.Generator().manual_seed(seed)) < 0.5
    credit = credit.masked_fill(silent[:, None], 0)
    plan = method.plan(logprob=logprob, old_logprob=old, credit=credit, rollouts=rollouts)
    keep = (credit != 0).any(1)
    keep = keep if plan.coefficient is None else keep | plan.coefficient.any(1)
    loss, gradient, _ = _loss(method, rollouts, credit, logprob, old, plan)
    kept, _, _ = _loss(method, rollouts.rows(keep), credit[keep], logprob[keep], old[keep], plan.rows(keep))
    if (gradient[rollouts.mask & ~keep[:, None]] != 0).any():
        return "a row without credit or coefficients has a gradient"
    fault = _same_loss(kept, loss)
    return fault and f"dropping rows without credit or coefficients changes the loss: {fault}"


def _stats(method, rollouts, seed):
    for name, x in _loss(method, rollouts, *_case(method, rollouts, seed))[2].items():
        if x.requires_grad or x.dim() or not torch.isfinite(x):
            return f'stat "{name}" is {x!r}'


def _after(method, rollouts, seed):
    then = method.after(rollouts)
    if method.replace(**then.state(method)) != then:
        return f"replace(**state) gives {method.replace(**then.state(method))!r} instead of {then!r}"
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(seed))
    for name, other in (("reordering the rows", rollouts.rows(order)), ("wider padding", widened(rollouts, torch.nan))):
        if method.after(other) != then:
            return f"{name} gives {method.after(other).state(method)} instead of {then.state(method)}"


def _round_trip(method: Method) -> str | None:
    known: dict[str, type] = {}
    _classes(method, known)
    try:
        back = parse(repr(method), **known)
    except (ValueError, TypeError) as error:
        return f"repr cannot be read back: {error}"
    if back != method:
        return f"repr reads back as {back!r}"
    return None
    return None


def _classes(part: Any, known: dict[str, type]) -> None:
    known[type(part).__name__] = type(part)
    for inner in (getattr(part, f.name) for f in fields(part)):
        for one in inner if isinstance(inner, tuple) else (inner,):
            if is_dataclass(one):
                _classes(one, known)


def _pickles(method):
    try:
        back = pickle.loads(pickle.dumps(method))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return f"it cannot be pickled: {error}"
    if back != method or repr(back) != repr(method):
        return f"pickle gives back {back!r}"


_WRITTEN = {"round_trip": _round_trip, "pickles": _pickles}
_CHECKS = {
    "needs": _needs,
    "ties": _ties,
    "additive": _additive,
    "loss_padding": _loss_padding,
    "gradient_off_mask": _gradient_off_mask,
    "only_logprob": _only_logprob,
    "idle_rows": _idle_rows,
    "stats": _stats,
    "after": _after,
}
