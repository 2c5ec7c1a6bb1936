"""Other methods on the same rollouts and the same optimizer state: the step that training with each of them would make
now.

What a method changes may be nothing here: a penalty on the ratio has no gradient while the policy is the one that
sampled, a filter finds nothing to drop. That is seen by comparing ∂L/∂log π of every token, never by a method's name.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.dynamics.attribution import Attribution, Goals, Question, by_group
from tokencredit.dynamics.batch import Batch, credited
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.sweep import Sweep
from tokencredit.dynamics.update import loss_coefficients, step_along
from tokencredit.dynamics.vectors import norm, total
from tokencredit.method import PARTS, Method, parse
from tokencredit.methods import METHODS

SAME = 1e-6
"""Coefficients that differ by less than this share of the largest are the same: credit in float32 has no more
digits.
"""


def named_method(text: str) -> Method:
    """A method of METHODS, `grpo`; one with other fields, `clip_cov(fraction=0.02)`; or the repr of any method."""
    if text.startswith("Method("):
        return parse(text)
    if "(" not in text:
        return METHODS[text]
    try:
        call: Any = ast.parse(text, mode="eval").body
        name, fields = call.func.id, {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{text!r} is not a method: give a name, name(field=value, ...), or the repr of a method"
        ) from error
    if call.args or None in fields:
        raise ValueError(f"{text!r}: the fields of a method are given by name, like clip_cov(fraction=0.02)")
    return replace(METHODS[name].replace(**fields), name=text)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """∂L/∂log π and credit of one method on the rollouts it keeps of the drawn ones; both [B, T] of `batch`, which
    `keep` selects.
    """

    method: Method
    keep: Tensor
    batch: Batch
    value: Tensor
    credit: Tensor

    @classmethod
    def of(cls, method: Method, drawn: Batch) -> Coefficients:
        """ValueError where nothing has credit, or where the method's filter leaves nothing."""
        batch = credited(method, drawn)
        keep = drawn.rollouts.mixed if method.mixed_groups_only else torch.ones(len(drawn), dtype=torch.bool)
        value, credit = loss_coefficients(method, batch)
        if not value.any():
            raise ValueError(
                f"{method.name} gives no token of this batch any gradient: every group's rewards are equal. Draw more"
                " prompts"
            )
        return cls(method, keep, batch, value, credit)

    @cached_property
    def wide(self) -> Tensor:
        """The coefficients of all drawn rollouts, 0 where the filter dropped them."""
        found = self.value.new_zeros(len(self.keep), self.value.shape[1])
        found[self.keep] = self.value
        return found

    def factor(self, other: Coefficients) -> float | None:
        """The number by which these are the other's coefficients; None where there is none."""
        size = other.wide.square().sum()
        found = float((self.wide * other.wide).sum() / size) if size > 0 else 0.0
        gap = (self.wide - found * other.wide).abs().max()
        return found if found and gap <= SAME * self.wide.abs().max() else None

    def same(self, other: Coefficients) -> bool:
        found = self.factor(other)
        return found is not None and abs(found - 1) < SAME


def acting_parts(own: Coefficients, baseline: Method, drawn: Batch) -> dict[str, bool]:
    """{part in which the method differs from the baseline: whether that changes anything on these rollouts}.

    A part without effect is one with whose counterpart of the baseline in its place every coefficient is the same.
    """
    found = {}
    for part in (*PARTS, "mixed_groups_only"):
        if getattr(own.method, part) == getattr(baseline, part):
            continue
        try:
            same = own.same(Coefficients.of(replace(own.method, **{part: getattr(baseline, part)}), drawn))
        except ValueError:
            same = False  # The baseline's part does not go with the method's others, so this one is needed.
        found["group filter" if part == "mixed_groups_only" else part] = not same
    return found


def own_consequences(attribution: Attribution, own: Coefficients, drawn: Batch) -> dict[str, np.ndarray]:
    """`consequences` of the very step that the attribution is of, which it knows already."""
    update, parts = attribution.update, attribution.parts
    found = {"length": np.array(norm(update.fresh)), "clip": np.array(update.clip)}
    group = drawn.rollouts.group_index[own.keep]
    for name, share in attribution.shares.items():
        found[f"fresh/{name}"] = parts["tokens"][name]
        found[f"rest/{name}"] = parts["momentum"][name] + parts["decay"][name]
        found[f"shares/{name}"] = by_group(share.sum(1), group, drawn.num_prompts)
    return found


def consequences(
    checkpoint: Checkpoint, own: Coefficients, drawn: Batch, goals: Goals, name: str = "", sweep: Sweep | None = None
) -> Question:
    """Asks what the method's step does, and ends with arrays. `name` keeps its gradient, as `Passes.reverse` takes it;
    `sweep` is of the drawn prompts.

    fresh/GOAL, rest/GOAL [P]   change by the goal's own prompts, of the part that these rollouts make and of momentum
                                and decay
    shares/GOAL [U]             the fresh part by prompt of the drawn batch
    length, clip                ‖fresh‖ and the factor of gradient clipping
    """
    update = step_along(checkpoint, own.batch, own.value, own.credit, name=name)
    found = {"length": np.array(norm(update.fresh)), "clip": np.array(update.clip)}
    answers = yield [update.fresh, total(update.momentum, update.decay)]
    for part, change in zip(("fresh", "rest"), answers):
        found |= {f"{part}/{goal}": values for goal, values in change.items()}
    gradients = [goal.gradient for goal in goals.values()]
    group = drawn.rollouts.group_index[own.keep]
    shares = update.shares_of_groups(gradients, group, drawn.num_prompts, sweep)
    return found | {f"shares/{goal}": values for goal, values in zip(goals, shares)}
