"""Why a batch with differing rewards trains nothing: rewards that differ within a group, and no token with credit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokencredit.credit import Chain
from tokencredit.method import Method
from tokencredit.rollouts import Rollouts


def without_credit(credit: Tensor, rollouts: Rollouts) -> Tensor:
    """[B] bool: rollouts of groups whose rewards differ and of which no token has credit."""
    given = torch.zeros_like(rollouts.group_index).index_add_(
        0, rollouts.group_index, (credit != 0).any(1).to(rollouts.group_index.dtype)
    )
    return rollouts.informative & (given[rollouts.group_index] == 0)


def why_no_credit(method: Method, rollouts: Rollouts, credit: Tensor | None = None) -> str | None:
    """Why no token of this batch has credit although rewards differ within a group, and what to set; None where some
    token has, or where no rewards differ.

    credit  [B, T], the method's own by default; an engine gives what is left of it after dynamic sampling
    """
    credit = method.credit(rollouts) if credit is None else credit
    if bool((credit != 0).any()) or not bool(rollouts.informative.any()):
        return None
    groups = int(rollouts.group_index[rollouts.informative].unique().numel())
    said = (
        f"no token has credit under {method.name}, so nothing is trained, although rewards differ in {groups} of"
        f" {int(rollouts.group_index.max()) + 1} groups: "
    )
    return said + (
        _outcomes(method, rollouts) or _empty(rollouts) or _scores(method, rollouts) or _part(method, rollouts)
    )


def _outcomes(method: Method, rollouts: Rollouts) -> str | None:
    """Where every group is all successes or all failures, and that is the reason."""
    some = rollouts.informative
    if bool((rollouts.mixed & some).any()) or not (method.mixed_groups_only or _would_credit(method, rollouts)):
        return None
    low, high = rollouts.reward[some].min().item(), rollouts.reward[some].max().item()
    return (
        "in each of them all rollouts are successes, or all are failures. A success is a reward above"
        f" success_above={rollouts.success_above:g}, and here rewards go from {low:.4g} to {high:.4g}: set"
        " success_above between the rewards of a wrong and of a right answer"
    )


def _would_credit(method: Method, rollouts: Rollouts) -> bool:
    """Whether some other limit of success, halfway between the rewards of a group, would give credit."""
    index, some = rollouts.group_index, rollouts.informative
    low, high = (
        rollouts.reward.new_zeros(len(rollouts)).scatter_reduce(0, index, rollouts.reward, how, include_self=False)
        for how in ("amin", "amax")
    )
    halfway = ((low + high) / 2)[index[some].unique()].unique().tolist()
    return any(bool((method.credit(replace(rollouts, success_above=limit)) != 0).any()) for limit in halfway)


def _empty(rollouts: Rollouts) -> str | None:
    some = rollouts.informative
    if bool(rollouts.mask[some].any()):
        return None
    return "their rollouts have no token that counts. Look at what masks them: empty completions, tools, truncation"


def _scores(method: Method, rollouts: Rollouts) -> str | None:
    """Where the scores that the method reads are 0 at every token."""
    zero = [name for name in sorted(method.needs) if not bool(rollouts.score(name)[rollouts.informative].any())]
    if not zero:
        return None
    return f"the scores {', '.join(zero)}, which the method reads, are 0 at every token. Look at what measures them"


def _part(method: Method, rollouts: Rollouts) -> str:
    """The last resort: the first part of the chain after which nothing is left."""
    credit = rollouts.reward.new_zeros(rollouts.mask.shape)
    parts = method.chain.parts if isinstance(method.chain, Chain) else (method.chain,)
    seen = False
    for part in parts:
        credit = part(credit, rollouts)
        if seen and not bool((credit != 0).any()):
            return f"there is none left after {part!r}. Look at its fields"
        seen = seen or bool((credit != 0).any())
    return f"{method.chain!r} gives none to such rewards and scores"
