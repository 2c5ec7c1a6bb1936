"""How verl carries a method's loss.

verl calls a registered policy loss with log-probs, advantages, mask and the name of an aggregation, on one micro-batch.
That is all that most surrogates read, and three of our aggregates are aggregations of verl's. A surrogate that treats
tokens apart by a plan over the whole batch, or an aggregate that verl has no name for, needs more than the signature
holds; so does a method whose surrogate is not the table's, because the name is all that reaches the workers. Those go
through the loss function that verl's workers take (`set_loss_fn`), with the plan as further fields of the batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tokencredit.engines.verl import CHANNEL, PREFIX
from tokencredit.method import Method
from tokencredit.methods import METHODS
from tokencredit.objective import Aggregate, SequenceMean, SequenceSum, TokenMean
from tokencredit.scores.table import FREE, SCORES, UNMEASURED

STORED = FREE | {"sum_p2", "uniform"}
"""Scores that a verl batch has: what its pass for the old log-probs gives, and a draw."""


@dataclass(frozen=True)
class Carried:
    """loss_mode          name of the policy loss in verl's registry; CHANNEL adds none, the loss function does

    loss_agg_mode      verl's aggregation, None where it has no name for the aggregate
    loss_scale_factor  what "seq-mean-token-sum-norm" divides by, None for the others
    why                why the signature does not do, empty where it does
    """

    loss_mode: str
    loss_agg_mode: str | None
    loss_scale_factor: int | None
    why: str

    @property
    def in_channel(self) -> bool:
        return self.loss_mode == CHANNEL


def carried(method: Method) -> Carried:
    """How verl carries the method's loss; every method that has its scores is carried in one of the two ways."""
    mode, factor = aggregation(method.aggregate)
    surrogate, aggregate = type(method.surrogate).__name__, type(method.aggregate).__name__
    table = METHODS.get(method.name)
    reasons = []
    if method.surrogate.plans:
        reasons.append(f"{surrogate} treats tokens apart by a plan over the whole batch")
    if mode is None:
        reasons.append(f"verl has no aggregation like {aggregate}")
    if table is None or table.surrogate != method.surrogate:
        reasons.append(f"this {surrogate} is not that of a method of the table")
    return Carried(CHANNEL if reasons else PREFIX + method.name, mode, factor, "; ".join(reasons))


def aggregation(aggregate: Aggregate) -> tuple[str | None, int | None]:
    """(verl's loss_agg_mode, loss_scale_factor), (None, None) where verl has none like it.

    Equal where an optimizer step sees the whole batch; where it sees a part, verl's counts the tokens of the part.
    """
    if type(aggregate) is TokenMean:
        return "token-mean", None
    if type(aggregate) is SequenceMean:
        return "seq-mean-token-mean", None
    if type(aggregate) is SequenceSum and aggregate.max_length is not None:
        return "seq-mean-token-sum-norm", aggregate.max_length
    return None, None


def check_scores(method: Method, given: Collection[str]) -> None:
    """ValueError for a score that neither verl stores nor `given` names, with what there is and where to give it."""
    missing = sorted(method.needs - STORED - set(given))
    if not missing:
        return
    what = "".join(f"\n{name}: {known.what}" for name in missing if (known := (SCORES | UNMEASURED).get(name)))
    raise ValueError(
        f'method "{method.name}" needs the scores {", ".join(missing)}, and a verl batch has'
        f" {', '.join(sorted(STORED))}. Give the others as +trainer.v1.tokencredit.scores.{missing[0]}=module:function,"
        f" function(batch) -> [B, T]{what}"
    )
