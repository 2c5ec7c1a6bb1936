"""The laws of transforms. Each takes (transform, rollouts, seed) and returns what is wrong, or None."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from tokencredit.credit import LAWS, Transform
from tokencredit.masked import zero_off
from tokencredit.rollouts import Rollouts
from tokencredit.testing.batches import credit_like, rollouts_strategy, seeds

UNIVERSAL = {
    "pure": "the same input gives the same output, and no input is modified",
    "no_gradient": "the output carries no gradient, whatever the input carries",
    "finite": "no NaN and no infinity, in float32 and float64",
    "zero_off_mask": "padding gets exactly 0",
    "padding_blind": "neither the width of the padding nor what it holds matters",
    "row_order": "reordering the rollouts reorders the credit",
    "group_names": "renaming the groups changes nothing",
}


def check_laws(
    transform: Transform,
    *,
    examples: int = 25,
    seed: int = 0,
    laws: Collection[str] | None = None,
    batches: st.SearchStrategy[Rollouts] | None = None,
) -> None:
    """Check the laws that every transform keeps, and those that this one declares in `.laws`, on random ragged batches.

    laws     only these, whether declared or not
    batches  a strategy for rollouts of your own (float64, with the scores that the transform needs)

    AssertionError names the law; hypothesis adds the smallest batch it found.

    >>> check_laws(GroupCenter())
    """
    unknown = sorted(transform.laws - set(LAWS))
    if unknown:
        raise ValueError(f"{type(transform).__name__}.laws holds {', '.join(unknown)}; there are: {', '.join(LAWS)}")
    names = [n for n in _CHECKS if (n in UNIVERSAL or n in transform.laws if laws is None else n in laws)]
    batches = rollouts_strategy(sorted(transform.needs)) if batches is None else batches
    run_checks(transform, {n: _CHECKS[n] for n in names}, batches, examples, seed)


def run_checks(
    subject: object, checks: Mapping[str, Callable], batches: st.SearchStrategy, examples: int, seed: int
) -> None:
    """Run check(subject, rollouts, seed) -> fault or None over random batches; AssertionError "law: fault" at the first
    fault.
    """

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        report_multiple_bugs=False,
        derandomize=False,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(batches, seeds)
    def hold(rollouts, number):
        for law, check in checks.items():
            fault = check(subject, rollouts, number)
            if fault:
                raise AssertionError(f"{law}: {fault}, in {subject!r}")

    hold()


def _pure(transform, rollouts, seed):
    credit = credit_like(rollouts, seed)
    given = {
        "credit": credit,
        "reward": rollouts.reward,
        "group": rollouts.group,
        "mask": rollouts.mask,
        **rollouts.scores,
    }
    before = {name: x.clone() for name, x in given.items()}
    first, second = transform(credit, rollouts), transform(credit, rollouts)
    for name, x in given.items():
        if not torch.equal(torch.nan_to_num(x), torch.nan_to_num(before[name])):
            return f"{name} was modified in place"
    if not torch.equal(torch.nan_to_num(first), torch.nan_to_num(second)):
        return "two calls with the same input differ"


def _no_gradient(transform, rollouts, seed):
    with torch.enable_grad():
        credit = credit_like(rollouts, seed).requires_grad_()
        scores = {name: x.clone().requires_grad_() for name, x in rollouts.scores.items()}
        carrying = replace(rollouts, reward=rollouts.reward.clone().requires_grad_(), scores=scores)
        if transform(credit, carrying).requires_grad:
            return "the output requires a gradient"


def _finite(transform, rollouts, seed):
    for dtype in (torch.float64, torch.float32):
        cast = replace(
            rollouts, reward=rollouts.reward.to(dtype), scores={n: x.to(dtype) for n, x in rollouts.scores.items()}
        )
        if not torch.isfinite(transform(credit_like(cast, seed), cast)[cast.mask]).all():
            return f"NaN or infinite credit in {dtype}"


def _zero_off_mask(transform, rollouts, seed):
    if (transform(credit_like(rollouts, seed), rollouts)[~rollouts.mask] != 0).any():
        return "padding has credit"


def _padding_blind(transform, rollouts, seed):
    credit = credit_like(rollouts, seed)
    expected = transform(credit, rollouts)
    for fill in (torch.nan, 1e6):
        wide_credit, wide = widen(credit, rollouts.mask, fill), widened(rollouts, fill)
        fault = differ(transform(wide_credit, wide)[:, : credit.shape[1]], expected, rollouts.mask)
        if fault:
            return f"three more columns of padding that hold {fill} change the credit: {fault}"


def _row_order(transform, rollouts, seed):
    credit = credit_like(rollouts, seed)
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(seed))
    moved = transform(credit[order], rollouts.rows(order))
    return differ(moved, transform(credit, rollouts)[order], rollouts.mask[order])


def _group_names(transform, rollouts, seed):
    credit = credit_like(rollouts, seed)
    names = torch.randperm(len(rollouts) + 1, generator=torch.Generator().manual_seed(seed)) * 3 - 5
    return differ(
        transform(credit, replace(rollouts, group=names[rollouts.group_index])),
        transform(credit, rollouts),
        rollouts.mask,
    )


def _keeps_total(transform, rollouts, seed):
    credit = credit_like(rollouts, seed, constant=True)
    after = zero_off(transform(credit, rollouts), rollouts.mask).sum(1, keepdim=True)
    return differ(after, zero_off(credit, rollouts.mask).sum(1, keepdim=True), torch.ones_like(after, dtype=torch.bool))


def _keeps_sign(transform, rollouts, seed):
    before = credit_like(rollouts, seed)
    after = transform(before, rollouts)
    turned = rollouts.mask & (after != 0) & (after.sign() != before.sign())
    if turned.any():
        row, column = torch.nonzero(turned)[0].tolist()
        return f"row {row}, token {column} had {before[row, column].item():.6g} and has {after[row, column].item():.6g}"


def _local(transform, rollouts, seed, index):
    credit = credit_like(rollouts, seed)
    together = transform(credit, rollouts)
    for population in torch.unique(index):
        rows = index == population
        fault = differ(transform(credit[rows], rollouts.rows(rows)), together[rows], rollouts.mask[rows])
        if fault:
            return f"rows {torch.nonzero(rows)[:, 0].tolist()} alone get another credit: {fault}"


def _row_local(transform, rollouts, seed):
    return _local(transform, rollouts, seed, torch.arange(len(rollouts)))


def _group_local(transform, rollouts, seed):
    return _local(transform, rollouts, seed, rollouts.group_index)


def _idempotent(transform, rollouts, seed):
    once = transform(credit_like(rollouts, seed), rollouts)
    return differ(transform(once, rollouts), once, rollouts.mask)


def differ(got: Tensor, expected: Tensor, mask: Tensor, tolerance: float = 1e-8) -> str | None:
    """Where the two differ most on the mask, or None. Equal NaNs and infinities count as equal: finiteness is a law of
    its own.
    """
    if got.shape != expected.shape:
        return f"shape {list(got.shape)} instead of {list(expected.shape)}"
    off = mask & ~torch.isclose(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    if off.any():
        row, column = torch.nonzero(off)[0].tolist()
        return (
            f"row {row}, token {column} has {got[row, column].item():.9g} instead of {expected[row, column].item():.9g}"
        )
    return None


def widen(x: Tensor, mask: Tensor, fill: float) -> Tensor:
    """x with three more columns, and `fill` everywhere off the mask."""
    return torch.cat([torch.where(mask, x, fill), x.new_full((len(x), 3), fill)], 1)


def widened(rollouts: Rollouts, fill: float) -> Rollouts:
    mask = torch.cat([rollouts.mask, rollouts.mask.new_zeros((len(rollouts), 3))], 1)
    return replace(rollouts, mask=mask, scores={n: widen(x, rollouts.mask, fill) for n, x in rollouts.scores.items()})


_CHECKS = {
    "pure": _pure,
    "no_gradient": _no_gradient,
    "finite": _finite,
    "zero_off_mask": _zero_off_mask,
    "padding_blind": _padding_blind,
    "row_order": _row_order,
    "group_names": _group_names,
    "keeps_total": _keeps_total,
    "keeps_sign": _keeps_sign,
    "row_local": _row_local,
    "group_local": _group_local,
    "idempotent": _idempotent,
}
