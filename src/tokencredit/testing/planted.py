"""Planted bugs: for every law one small part that breaks it and keeps all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from tokencredit.credit import Chain, GroupCenter, Outcome, Transform
from tokencredit.masked import over, row_mean, zero_off
from tokencredit.methods import Method
from tokencredit.objective import Aggregate, Clip, LogProb, Surrogate, TokenMean


@dataclass(frozen=True)
class _Overwrites(Transform):
    """pure: wipes the scores of its caller."""

    score: str = "entropy"

    def apply(self, credit, rollouts):
        rollouts.score(self.score).zero_()
        return credit


@dataclass(frozen=True)
class _Attached(Transform):
    """no_gradient: forgets to detach."""

    def __call__(self, credit, rollouts):
        return 2 * zero_off(credit, rollouts.mask)


@dataclass(frozen=True)
class _Divides(Transform):
    """finite: divides by a mean entropy that may be 0."""

    score: str = "entropy"

    def apply(self, credit, rollouts):
        return credit / row_mean(rollouts.score(self.score), rollouts.mask)[:, None]


@dataclass(frozen=True)
class _Spills(Transform):
    """zero_off_mask: gives padding a credit."""

    def __call__(self, credit, rollouts):
        return credit.detach() + 1


@dataclass(frozen=True)
class _PaddedMean(Transform):
    """padding_blind: the mean runs over the padded width."""

    def apply(self, credit, rollouts):
        return credit - credit.sum(1, keepdim=True) / max(credit.shape[1], 1)


@dataclass(frozen=True)
class _Neighbour(Transform):
    """row_order: takes the previous row for its sibling."""

    def apply(self, credit, rollouts):
        return credit - credit.roll(1, 0).sum(1, keepdim=True)


@dataclass(frozen=True)
class _EvenGroups(Transform):
    """group_names: reads the number of a group as if it meant something."""

    def apply(self, credit, rollouts):
        return credit * (rollouts.group % 2)[:, None]


@dataclass(frozen=True)
class _Doubles(Transform):
    """keeps_total: claims to spread a rollout's credit, and doubles it."""

    laws: ClassVar = frozenset({"keeps_total"})

    def apply(self, credit, rollouts):
        return 2 * credit


@dataclass(frozen=True)
class _Lowers(Transform):
    """keeps_sign: a constant is subtracted from small positive credit."""

    laws: ClassVar = frozenset({"keeps_sign"})

    def apply(self, credit, rollouts):
        return credit - 0.3


@dataclass(frozen=True)
class _BatchMean(Transform):
    """row_local and group_local: a mean that runs over the whole batch."""

    laws: ClassVar = frozenset({"row_local"})

    def apply(self, credit, rollouts):
        return credit - over(credit.sum(), rollouts.mask.sum())


@dataclass(frozen=True)
class _BatchMeanOfGroups(_BatchMean):
    laws: ClassVar = frozenset({"group_local"})


@dataclass(frozen=True)
class _Halves(Transform):
    """idempotent: halves the credit once more each time."""

    laws: ClassVar = frozenset({"idempotent"})

    def apply(self, credit, rollouts):
        return credit / 2


@dataclass(frozen=True)
class _HiddenNeed(Transform):
    """needs: reads a score that it does not declare."""

    def apply(self, credit, rollouts):
        return credit + rollouts.scores.get("entropy", 0)


@dataclass(frozen=True)
class _Offset(GroupCenter):
    """ties: a group without contrast still gets credit."""

    def apply(self, credit, rollouts):
        return super().apply(credit, rollouts) + 0.1


@dataclass(frozen=True)
class _LocalNorm(Surrogate):
    """additive: normalises by what the micro-batch holds."""

    def token_loss(self, logprob, old_logprob, credit, mask, coefficient):
        return -credit * logprob / credit.abs().amax().clamp(min=1e-6) if credit.numel() else credit * logprob, {}


@dataclass(frozen=True)
class _WidthMean(Aggregate):
    """loss_padding: divides by the padded width."""

    def weights(self, rollouts):
        return rollouts.mask.to(rollouts.reward.dtype) / max(rollouts.mask.numel(), 1)


@dataclass(frozen=True)
class _LateMask(Surrogate):
    """gradient_off_mask: masks the loss but not what it is computed from; 0 · NaN = NaN in the backward pass."""

    def __call__(self, logprob, old_logprob, credit, mask, coefficient=None):
        return zero_off(-(logprob - old_logprob.detach()).exp() * credit.detach(), mask), {}


@dataclass(frozen=True)
class _LiveCredit(Surrogate):
    """only_logprob: a gradient through the credit."""

    def __call__(self, logprob, old_logprob, credit, mask, coefficient=None):
        return -zero_off(credit, mask) * zero_off(logprob, mask), {}


@dataclass(frozen=True)
class _Tether(Surrogate):
    """idle_rows: holds every token to the old policy without planning it."""

    def token_loss(self, logprob, old_logprob, credit, mask, coefficient):
        return -credit * logprob + (logprob - old_logprob).square(), {}


@dataclass(frozen=True)
class _LiveStats(Surrogate):
    """stats: a diagnostic that keeps the graph alive."""

    def token_loss(self, logprob, old_logprob, credit, mask, coefficient):
        return -credit * logprob, {"mean_logprob": logprob.sum()}


@dataclass(frozen=True)
class _FirstRow(Transform):
    """after: steers by the first row, which is another one on every process."""

    strength: float = 1.0

    def apply(self, credit, rollouts):
        return credit * self.strength

    def after(self, rollouts):
        return replace(self, strength=float(rollouts.reward[0])) if len(rollouts) else self


@dataclass(frozen=True)
class _Shy(Transform):
    """round_trip: a hyper-parameter that repr does not show."""

    strength: float = field(default=1.0, repr=False)

    def apply(self, credit, rollouts):
        return credit * self.strength


@dataclass(frozen=True)
class _Function(Transform):
    """pickles: holds a function that has no name."""

    function: Callable = field(default=lambda x: x, repr=False, compare=False)

    def apply(self, credit, rollouts):
        return self.function(credit)


PLANTED: dict[str, Transform | Surrogate | Aggregate] = {
    "pure": _Overwrites(),
    "no_gradient": _Attached(),
    "finite": _Divides(),
    "zero_off_mask": _Spills(),
    "padding_blind": _PaddedMean(),
    "row_order": _Neighbour(),
    "group_names": _EvenGroups(),
    "keeps_total": _Doubles(),
    "keeps_sign": _Lowers(),
    "row_local": _BatchMean(),
    "group_local": _BatchMeanOfGroups(),
    "idempotent": _Halves(),
    "needs": _HiddenNeed(),
    "ties": _Offset(),
    "additive": _LocalNorm(),
    "loss_padding": _WidthMean(),
    "gradient_off_mask": _LateMask(),
    "only_logprob": _LiveCredit(),
    "idle_rows": _Tether(),
    "stats": _LiveStats(),
    "after": _FirstRow(),
    "round_trip": _Shy(0.5),
    "pickles": _Function(),
}


def planted_method(law: str) -> Method:
    """An honest method with the bug planted for one of METHOD_LAWS in its place."""
    part = PLANTED[law]
    chain = Chain(Outcome(), GroupCenter())
    if isinstance(part, Transform):
        chain = Chain(Outcome(), part) if isinstance(part, GroupCenter) else Chain(*chain.parts, part)
    surrogate = part if isinstance(part, Surrogate) else LogProb() if law == "loss_padding" else Clip()
    return Method("planted", chain, surrogate, part if isinstance(part, Aggregate) else TokenMean())
