"""Which of TRL's options a method decides: accepted where they agree with it, refused by name where they do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from tokencredit.methods import Method
from tokencredit.objective import CISPO, SAPO, Clip, SequenceClip, SequenceMean, SequenceSum, TokenMean

OLDEST, TOO_NEW = "1.9", "1.17"


def check_version(found: str) -> None:
    """Raise ImportError for a TRL whose trainer this engine was not written for: it wraps hooks that change between
    releases.
    """
    if not Version(OLDEST) <= Version(found) < Version(TOO_NEW):
        raise ImportError(
            f"the TRL engine supports trl>={OLDEST},<{TOO_NEW}, but trl {found} is installed: pip install"
            " 'tokencredit[trl]'"
        )


@dataclass(frozen=True)
class Decided:
    """An option that the method decides: its value in TRL's config when nobody set it, and the value that means the
    same.
    """

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
    clip = "use method.replace({})" if low is not None else "this method has no such clip; choose another method"
    gate = "use method.replace(positive=..., negative=...)" if isinstance(s, SAPO) else 'choose method "sapo"'
    dual = (
        "use method.replace(dual=...), the bound on tokens with negative credit"
        if hasattr(s, "dual")
        else 'choose method "grpo"'
    )
    scaling = (
        'use method.replace(scale="group", "batch" or "none")'
        if scale
        else "the method scales its credit itself; choose another"
    )
    return {
        "loss_type": Decided("dapo", loss_types(method), loss),
        "importance_sampling_level": Decided("token", ("sequence" if sequence else "token",), level),
        "epsilon": Decided(0.2, (low,), clip.format("low=...")),
        "epsilon_high": Decided(
            None, (high,), "use method.replace(cap=...)" if isinstance(s, CISPO) else clip.format("high=...")
        ),
        "scale_rewards": Decided("group", (scale,), scaling),
        "delta": Decided(None, (), dual),
        "sapo_temperature_pos": Decided(1.0, (getattr(s, "positive", None),), gate),
        "sapo_temperature_neg": Decided(1.05, (getattr(s, "negative", None),), gate),
        "top_entropy_quantile": Decided(1.0, (), 'choose method "forking_tokens" and replace(fraction=...)'),
        "off_policy_mask_threshold": Decided(None, (), "drop it: a method's ratios handle off-policy tokens"),
        "entropy_coef": Decided(0.0, (), 'choose method "entropy_bonus" and replace(coef=...)'),
        "use_adaptive_entropy": Decided(
            False, (), 'choose method "entropy_bonus_adaptive" and replace(target=..., delta=..., bounds=...)'
        ),
        "multi_objective_aggregation": Decided(
            "sum_then_normalize", (), "sum the rewards (reward_weights), or return one number"
        ),
    }


def refuse_what_conflicts(args: Any, method: Method) -> None:
    """Raise ValueError for the first TRL options that cannot be honoured with this method, naming each and its
    alternative.
    """
    problems = []
    for option, verdict in decided(method).items():
        value = getattr(args, option, verdict.untouched)
        if value != verdict.untouched and value not in verdict.agrees:
            problems.append(f"  {option}={value!r}: {verdict.instead}")
    if getattr(args, "use_liger_loss", False):
        problems.append("  use_liger_loss=True: the loss is the method's; leave it off")
    if problems:
        raise ValueError(f'GRPOConfig options that method "{method.name}" cannot honour:\n' + "\n".join(problems))
