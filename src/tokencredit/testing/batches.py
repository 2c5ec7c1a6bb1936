"""Random batches: shapes, groups and rewards are drawn (and shrunk) by hypothesis, the numbers on tokens come from a
drawn seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokencredit.rollouts import TOKEN_REWARD, Rollouts

REWARDS = {"binary": (0.0, 1.0), "any": (-1.0, -0.3, 0.0, 0.1, 0.7, 1.0, 2.5)}
GROUPS = (7, -4, 0, 10**12)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def rollouts_strategy(
    draw,
    scores: Sequence[str] = ("entropy",),
    *,
    rewards: str = "any",
    signed: Sequence[str] = (),
    max_rows: int = 8,
    max_tokens: int = 6,
    dtype: torch.dtype = torch.float64,
) -> Rollouts:
    """Ragged batches, degenerate ones included: no rows, no width, empty rows, masks with holes, one-member groups,
    equal rewards, groups whose rows do not adjoin and whose names are any integers in any order.

    scores   names to fill: NaN off the mask (as a forward pass leaves it), on it generic, tied, mostly zero or all
             equal values >= 0
    signed   those of the names whose values have either sign
    rewards  "binary" (0 and 1) or "any" (fractions and penalties besides)

    Of a "token_reward" about half are missing.
    """
    num_rows, width = draw(st.integers(0, max_rows)), draw(st.integers(0, max_tokens))
    rows = {"min_size": num_rows, "max_size": num_rows}
    group = draw(st.lists(st.sampled_from(GROUPS), **rows))
    equal = draw(st.booleans()) and draw(st.booleans())
    values = st.sampled_from(REWARDS[rewards])
    reward = [draw(values)] * num_rows if equal else draw(st.lists(values, **rows))
    lengths = torch.tensor(draw(st.lists(st.integers(0, width), **rows)), dtype=torch.long)
    mask = torch.arange(width) < lengths[:, None]
    random = torch.Generator().manual_seed(draw(seeds))
    if draw(st.booleans()):
        mask &= torch.rand(mask.shape, generator=random) < 0.8
    measured = {}
    for name in scores:
        x = _values(draw(st.sampled_from(("generic", "sparse", "tied", "equal"))), mask.shape, random).to(dtype)
        x = x * (torch.randint(0, 2, mask.shape, generator=random) * 2 - 1) if name in signed else x
        absent = torch.rand(mask.shape, generator=random) < (0.5 if name == TOKEN_REWARD else 0)
        measured[name] = x.masked_fill(~mask | absent, torch.nan)
    return Rollouts(torch.tensor(reward, dtype=dtype), torch.tensor(group, dtype=torch.long), mask, measured)


def _values(kind: str, shape: torch.Size, random: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=random, dtype=torch.float64)
    generic = -(1 - uniform).log() + 1e-3
    if kind == "sparse":
        return generic.masked_fill(torch.rand(shape, generator=random) < 0.6, 0)
    if kind == "tied":
        return torch.randint(0, 3, shape, generator=random).double()
    return generic[:1, :1].expand(shape).clone() if kind == "equal" and generic.numel() else generic


def credit_like(rollouts: Rollouts, seed: int, constant: bool = False) -> Tensor:
    """[B, T]: generic credit of either sign with some zero rows, NaN off the mask; `constant`: the same at every token
    of a row.
    """
    random = torch.Generator().manual_seed(seed)
    size = (len(rollouts), 1) if constant else rollouts.mask.shape
    credit = torch.randn(size, generator=random, dtype=torch.float64).expand(rollouts.mask.shape)
    silent = torch.rand((len(rollouts), 1), generator=random) < 0.2
    return credit.masked_fill(silent, 0).masked_fill(~rollouts.mask, torch.nan).to(rollouts.reward.dtype)


def logprobs_like(rollouts: Rollouts, seed: int, spread: float = 0.4) -> tuple[Tensor, Tensor]:
    """(logprob, old_logprob) [B, T]: two policies that differ by about `spread` nats at a token; NaN off the mask."""
    random = torch.Generator().manual_seed(seed)
    step = torch.randn(rollouts.mask.shape, generator=random, dtype=torch.float64)
    old = (1e-3 + torch.rand(rollouts.mask.shape, generator=random).double()).log() - 0.1
    new, old = (x.masked_fill(~rollouts.mask, torch.nan).to(rollouts.reward.dtype) for x in (old + spread * step, old))
    return new, old
