"""The credit algebra: a transform is its own configuration and a pure function of credit; a chain of transforms is a
transform.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tokencredit.masked import zero_off
from tokencredit.rollouts import Rollouts

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LAWS = {
    "keeps_total": "a rollout whose credit is equal at every token keeps the sum of its credit",
    "keeps_sign": "no token's credit changes sign (it may become 0)",
    "row_local": "a rollout's credit depends on that rollout alone",
    "group_local": "a rollout's credit depends on its own group alone",
    "idempotent": "applied twice, it does what it does once",
}


@dataclass(frozen=True)
class Transform:
    """credit, rollouts -> credit. Subclass it as a frozen dataclass and write `apply`; nothing else is needed.

        c ← apply(c, rollouts)          [B, T] -> [B, T], no gradient, 0 off the mask

    `laws` names what the transform promises (keys of LAWS); `tokencredit.testing.check_laws` checks them, with the laws
    that every transform keeps: pure, finite, zero off the mask, blind to padding, and equivariant to the order of rows
    and the names of groups.
    """

    laws: ClassVar[frozenset[str]] = frozenset()

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define apply(self, credit, rollouts)")

    @torch.no_grad()
    def __call__(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        if credit.shape != rollouts.mask.shape:
            raise ValueError(f"credit must be [B, T] = {list(rollouts.mask.shape)}, got shape {list(credit.shape)}")
        return zero_off(self.apply(zero_off(credit, rollouts.mask), rollouts), rollouts.mask)

    def after(self, rollouts: Rollouts) -> Transform:
        """The transform of the next rollout batch: itself, but for one that steers a coefficient by what it sees."""
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Names of the scores this reads: its own `score` field and whatever its fields need."""
        return needs(self)


@dataclass(frozen=True, init=False, repr=False)
class Chain(Transform):
    """Transforms applied from left to right; the empty chain is the identity.

    >>> Chain(Outcome(), GroupCenter())(credit, rollouts)[:, 0]  # GRPO's credit of rewards 1, 0, 0, 1: ± ½ / √⅓
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660])
    """

    parts: tuple[Transform, ...] = ()

    def __init__(self, *parts: Transform):
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "laws", _joint_laws(parts))

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        for part in self.parts:
            credit = part(credit, rollouts)
        return credit

    def after(self, rollouts: Rollouts) -> Chain:
        return Chain(*(part.after(rollouts) for part in self.parts))

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.parts))})"


@dataclass(frozen=True, init=False, repr=False)
class Sum(Transform):
    """Transforms that all see the incoming credit, and whose results are added: several sources of credit.

        cᵢₜ ← Σₖ partₖ(c)ᵢₜ

    Sum(part) is the part itself; the empty sum is no credit.

        Sum(Chain(Outcome(), GroupCenter()), Score("x"))      GRPO's credit plus a score
    """

    parts: tuple[Transform, ...] = ()

    def __init__(self, *parts: Transform):
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "laws", _joint_laws(parts))

    def apply(self, credit: Tensor, rollouts: Rollouts) -> Tensor:
        return sum((part(credit, rollouts) for part in self.parts), torch.zeros_like(credit))

    def after(self, rollouts: Rollouts) -> Sum:
        return Sum(*(part.after(rollouts) for part in self.parts))

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.parts))})"


def _joint_laws(parts: tuple[Transform, ...]) -> frozenset[str]:
    """What survives composition and addition: signs, and locality (the whole is as local as its least local part)."""
    kept = frozenset({"keeps_sign", "row_local", "group_local"})
    for part in parts:
        kept &= part.laws | ({"group_local"} if "row_local" in part.laws else frozenset())
    return kept


def needs(part: DataclassInstance) -> frozenset[str]:
    """The score names that a transform, surrogate or aggregate reads, following its own fields."""
    found: set[str] = set()
    for f in fields(part):
        value = getattr(part, f.name)
        if f.name == "score" and isinstance(value, str):
            found.add(value)
        for inner in value if isinstance(value, tuple) else (value,):
            if hasattr(inner, "needs"):
                found |= inner.needs
    return frozenset(found)


def one_of(owner: object, **allowed: tuple[object, ...]) -> None:
    """Raise ValueError when a field of `owner` is none of its allowed values."""
    for name, values in allowed.items():
        if getattr(owner, name) not in values:
            raise ValueError(
                f"{type(owner).__name__}.{name} must be one of {', '.join(map(repr, values))}, got"
                f" {getattr(owner, name)!r}"
            )
