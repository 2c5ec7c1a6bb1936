"""Method, what an entry of METHODS is; Plan, what its loss takes from a whole batch; parse, the way back from a
method's repr.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from tokencredit import credit as _credit
from tokencredit import objective as _objective
from tokencredit.credit import Chain, Sum
from tokencredit.masked import wide, zero_off
from tokencredit.objective import Aggregate, Surrogate
from tokencredit.rollouts import Rollouts

PARTS = ("chain", "surrogate", "aggregate")


@dataclass(frozen=True, eq=False)
class Plan:
    """What the loss takes from the whole rollout batch before it is split.

    weight       ω [B, T], from the aggregate
    coefficient  κ [B, T], from a surrogate that treats tokens apart, None from the others: 0 where it leaves a token
                 alone, 1 where it only chooses, any other number where it also says how much
    """

    weight: Tensor
    coefficient: Tensor | None

    def rows(self, keep: Tensor) -> Plan:
        return Plan(self.weight[keep], None if self.coefficient is None else self.coefficient[keep])


@dataclass(frozen=True)
class Method:
    """A way to train: credit chain + surrogate + aggregate + group filter, with its source.

    fidelity  "paper"; "code", where paper and released code disagree and the code is followed; "reconstructed", from an
              abstract
    mixed_groups_only  DAPO's dynamic sampling: engines draw again until every group holds both a success and a failure
    """

    name: str
    chain: Chain
    surrogate: Surrogate
    aggregate: Aggregate
    mixed_groups_only: bool = False
    summary: str = ""
    source: str = ""
    fidelity: str = "paper"

    @property
    def needs(self) -> frozenset[str]:
        """Names of the scores this method reads."""
        return self.chain.needs | self.surrogate.needs | self.aggregate.needs

    def credit(self, rollouts: Rollouts) -> Tensor:
        """The credit of every token: [B, T], float, 0 off the mask, no gradient. KeyError names a missing score."""
        missing = sorted(self.needs - set(rollouts.scores))
        if missing:
            there = ", ".join(sorted(rollouts.scores)) or "none"
            raise KeyError(f"{self.name} needs the scores {', '.join(missing)}; these rollouts have: {there}")
        return self.chain(rollouts.reward.new_zeros(rollouts.mask.shape), rollouts)

    def plan(self, *, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts) -> Plan:
        """Token weights and coefficients over the whole rollout batch; engines make it once and slice it with the
        micro-batches.
        """
        logprob, old_logprob, credit = (
            zero_off(wide(x.detach()), rollouts.mask) for x in (logprob, old_logprob, credit)
        )
        coefficient = self.surrogate.coefficient(logprob, old_logprob, credit, rollouts)
        return Plan(self.aggregate.weights(rollouts), coefficient)

    def loss(
        self, *, logprob: Tensor, old_logprob: Tensor, credit: Tensor, rollouts: Rollouts, plan: Plan | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, stats): L = Σᵢₜ ωᵢₜ ℓᵢₜ, a scalar with the gradient of logprob [B, T]; stats are detached 0-dim
        tensors.

        Give a slice of the batch's `plan` with a micro-batch: then the losses of the micro-batches add up to the loss
        of the batch.
        """
        for name, x in (("logprob", logprob), ("old_logprob", old_logprob), ("credit", credit)):
            if x.shape != rollouts.mask.shape:
                raise ValueError(f"{name} must be [B, T] = {list(rollouts.mask.shape)}, got shape {list(x.shape)}")
        plan = plan or self.plan(logprob=logprob, old_logprob=old_logprob, credit=credit, rollouts=rollouts)
        if plan.weight.shape != rollouts.mask.shape:
            shapes = f"{list(plan.weight.shape)}, the rollouts are {list(rollouts.mask.shape)}"
            raise ValueError(f"plan is for {shapes}: slice both with the same rows, plan.rows(keep)")
        per_token, stats = self.surrogate(logprob, old_logprob, credit, rollouts.mask, plan.coefficient)
        return (plan.weight * per_token).sum(), stats

    def after(self, rollouts: Rollouts) -> Method:
        """This method for the next rollout batch: itself, but where a part steers a coefficient by what it sees.

        A pure function of the whole gathered batch, so it is the same on every process; `state` is what it moved.
        """
        chain = self.chain.after(rollouts)
        return self if chain == self.chain else replace(self, chain=chain)

    def state(self, start: Method) -> dict[str, object]:
        """{"Part.field": value} of what `after` has moved away from `start`; start.replace(**state) is this method."""
        own, first = self.hyperparameters(), start.hyperparameters()
        return {name: value for name, value in own.items() if value != first[name]}

    def replace(self, **values: Any) -> Method:
        """This method with other hyper-parameters: any field of its chain, surrogate, aggregate or of its own.

            METHODS["gtpo"].replace(alpha=(1, 0.2), scope="batch")

        A name sets every part that has such a field. Write {"Clip.high": 0.3} to set one part's. ValueError names the
        fields there are.
        """
        own = {f.name for f in fields(self)}
        changed = replace(self, **{k: v for k, v in values.items() if k in own})
        inner = {k: v for k, v in values.items() if k not in own}
        used: set[str] = set()
        parts = {name: replaced(getattr(changed, name), inner, used) for name in PARTS}
        unknown = sorted(set(inner) - used)
        if unknown:
            raise ValueError(
                f"{self.name} has no field {', '.join(unknown)}; it has: {', '.join(sorted(self.hyperparameters()))}"
            )
        return replace(changed, **parts)

    def configured(self, options: Mapping[str, Any]) -> Method:
        """This method with hyper-parameters as a file holds them, whose lists are tuples here."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        return self.replace(**values) if values else self

    def hyperparameters(self) -> dict[str, object]:
        """{"Part.field": value} for every field of every part."""
        found: dict[str, object] = {}
        for name in PARTS:
            collect(getattr(self, name), found)
        return found

    def within(self, max_length: int) -> Method:
        """This method for completions of at most `max_length` tokens: fills in every `max_length` that is None."""
        return replace(self, **{name: _fill(getattr(self, name), max_length) for name in PARTS})


def replaced(part: Any, values: Mapping[str, object], used: set[str]) -> Any:
    """The part with every field of `values` set wherever it occurs in it; their names are added to `used`."""
    if isinstance(part, Chain | Sum):
        return type(part)(*(replaced(p, values, used) for p in part.parts))
    new: dict[str, Any] = {}
    for f in fields(part):
        for key in (f.name, f"{type(part).__name__}.{f.name}"):
            if key in values:
                new[f.name] = values[key]
                used.add(key)
        inner = getattr(part, f.name)
        if f.name not in new and is_dataclass(inner):
            new[f.name] = replaced(inner, values, used)
    return replace(part, **new) if new else part


def _fill(part: Any, max_length: int) -> Any:
    """The part with every `max_length` that is None set."""
    if isinstance(part, Chain | Sum):
        return type(part)(*(_fill(p, max_length) for p in part.parts))
    new = {f.name: _fill(inner, max_length) for f in fields(part) if is_dataclass(inner := getattr(part, f.name))}
    if getattr(part, "max_length", max_length) is None:
        new["max_length"] = max_length
    return replace(part, **new) if new else part


def collect(part: Any, found: dict[str, object]) -> None:
    """Adds "Part.field" of every field of the part and of those within it to `found`."""
    for inner in part.parts if isinstance(part, Chain | Sum) else ():
        collect(inner, found)
    for f in fields(part) if not isinstance(part, Chain | Sum) else ():
        value = getattr(part, f.name)
        if is_dataclass(value):
            collect(value, found)
        else:
            found[f"{type(part).__name__}.{f.name}"] = value


def parse(text: str, **known: type) -> Method:
    """The method whose `repr` is `text`. Only constructor calls and literals are read; nothing is evaluated.

    A transform of your own is read when its class is given by name: parse(text, MyTransform=MyTransform). ValueError
    otherwise.
    """
    parts = {n: getattr(m, n) for m in (_credit, _objective) for n in m.__all__}
    names = {n: c for n, c in parts.items() if isinstance(c, type)} | {"Method": Method} | known

    def build(node: ast.AST) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
            if node.func.id not in names:
                raise ValueError(
                    f"unknown part {node.func.id}: give its class, parse(text, {node.func.id}={node.func.id})"
                )
            return names[node.func.id](
                *map(build, node.args), **{k.arg: build(k.value) for k in node.keywords if k.arg}
            )
        if isinstance(node, ast.Tuple):
            return tuple(map(build, node.elts))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name):
            return -build(node.operand)
        if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
            return float(node.id)
        return ast.literal_eval(node)

    try:
        method = build(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"not the repr of a method: {text[:80]} ({error})") from error
    if not isinstance(method, Method):
        raise ValueError(f"not the repr of a method but of a {type(method).__name__}: {text[:80]}")
    return method
