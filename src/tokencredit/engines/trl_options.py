"""Which of TRL's options a method decides: accepted where they agree with it, refused by name where they do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokencredit.methods import Method
from tokencredit.objective import CISPO, SAPO, Clip, SequenceClip, SequenceMean, SequenceSum, TokenMean


@dataclass(frozen=True)
class Decided:
    """An option that the method decides: its value in TRL's config when nobody set it, and the value that means the same."""

    untouched: Any
    agrees: tuple
    instead: str


def loss_types(method: Method) -> tuple[str, ...]:
    """TRL's names for the loss of this method; empty where TRL has none."""
    surrogate, aggregate = method.surrogate, method.aggregate
    if isinstance(surrogate, CISPO):
        return ("cispo",)
    if isinstance(surrogate, SAPO):
        return ("sapo",)
    if isinstance(surrogate, Clip | SequenceClip):
        table = {SequenceMean: ("grpo",), SequenceSum: ("dr_grpo",), TokenMean: ("dapo",)}
        return table.get(type(aggregate), ())
    return ()


def decided(method: Method) -> dict[str, Decided]:
    """TRL option -> what this method says about it."""
    s, name = method.surrogate, method.name
    low = getattr(s, "low", None)
    high = s.cap if isinstance(s, CISPO) else getattr(s, "high", None)
    scale = method.hyperparameters().get("GroupCenter.scale")
    sequence = isinstance(s, SequenceClip) and not s.token
    loss = f"the loss is METHODS[{name!r}]'s own; choose another method, or method.replace(aggregate=...)"
    level = 'choose method "gspo", "gspo_token" or "grpo_s"'
    return {
        "loss_type": Decided("dapo", loss_types(method), loss),
        "importance_sampling_level": Decided("token", ("sequence" if sequence else "token",), level),
        "epsilon": Decided(0.2, (low,), "use method.replace(low=...)"),
        "epsilon_high": Decided(None, (high, low if high == low else high), "use method.replace(high=...) or, for cispo, replace(cap=...)"),
        "scale_rewards": Decided("group", (scale,), 'use method.replace(scale="group", "batch" or "none")'),
        "delta": Decided(None, (), "use method.replace(dual=...), the bound on tokens with negative credit"),
        "top_entropy_quantile": Decided(1.0, (), 'choose method "forking_tokens" and replace(fraction=...)'),
        "off_policy_mask_threshold": Decided(None, (), "drop it: a method's ratios handle off-policy tokens"),
        "entropy_coef": Decided(0.0, (), 'choose method "entropy_advantage" (entropy never carries a gradient here)'),
        "use_adaptive_entropy": Decided(False, (), 'choose method "entropy_advantage"'),
        "multi_objective_aggregation": Decided("sum_then_normalize", (), "sum the rewards (reward_weights), or return one number"),
    }


def refuse_what_conflicts(args: Any, method: Method) -> None:
    """Raise ValueError for the first TRL options that cannot be honoured with this method, naming each and its alternative."""
    problems = []
    for option, verdict in decided(method).items():
        value = getattr(args, option, verdict.untouched)
        if value != verdict.untouched and value not in verdict.agrees:
            problems.append(f"  {option}={value!r}: {verdict.instead}")
    if getattr(args, "use_liger_loss", False):
        problems.append("  use_liger_loss=True: the loss is the method's; leave it off")
    if problems:
        raise ValueError(f'GRPOConfig options that method "{method.name}" cannot honour:\n' + "\n".join(problems))
