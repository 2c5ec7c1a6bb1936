"""Which of TRL's options a method decides: accepted where they agree with it, refused by name where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from tokencredit.methods import Method
from tokencredit.objective import CISPO, SAPO, Clip, SequenceClip, SequenceMean, SequenceSum, TokenMean
from tokencredit.preference import PreferenceMethod

OLDEST, TOO_NEW = "1.10", "1.17"
"""1.9 divides its loss by something else; no release after 1.16 was there to run."""


def check_version(found: str, oldest: str = OLDEST) -> None:
    """Raise ImportError for a TRL whose trainer this engine was not written for: it wraps hooks that change between
    releases.
    """
    if not Version(oldest) <= Version(found) < Version(TOO_NEW):
        raise ImportError(
            f"the TRL engine supports trl>={oldest},<{TOO_NEW}, but trl {found} is installed: pip install"
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


def decided_of_pairs(method: PreferenceMethod) -> dict[str, Decided]:
    """Option of TRL's DPOConfig -> what this method says about it."""
    link = 'the link is the method\'s: PREFERENCES["dpo"].replace(link=Squared()), Hinge() or Logistic(smoothing=...)'
    once = "leave it off: it stores the sum of a completion's log-probs, and a weighting needs each token's"
    return {
        "beta": Decided(0.1, (method.beta,), "use method.replace(beta=...)"),
        "loss_type": Decided(["sigmoid"], (), link),
        "loss_weights": Decided(None, (), link),
        "label_smoothing": Decided(0.0, (), link),
        "f_divergence_type": Decided("reverse_kl", (), "the margin is of log ratios; there is no other divergence"),
        "ld_alpha": Decided(None, (), "the chain weighs the tokens; write a transform, or weigh by LengthMean()"),
        "use_weighting": Decided(False, (), 'give pairs a column "weight"; the policy in training weighs none'),
        "precompute_ref_log_probs": Decided(False, (), once),
        "padding_free": Decided(False, (), "TRL has it switched off; rows are padded"),
        "truncation_mode": Decided("keep_start", (), "a pair is a prefix and what follows it: shorten prompts instead"),
    }


def refuse_what_conflicts(args: Any, method: Method) -> None:
    """Raise ValueError for the first TRL options that cannot be honoured with this method, naming each and its
    alternative.
    """
    problems = conflicts(args, decided(method))
    if getattr(args, "use_liger_loss", False):
        problems.append("  use_liger_loss=True: the loss is the method's; leave it off")
    if problems:
        raise ValueError(f'GRPOConfig options that method "{method.name}" cannot honour:\n' + "\n".join(problems))


def refuse_of_pairs(args: Any, method: PreferenceMethod) -> None:
    """The same of DPOConfig and a method of PREFERENCES."""
    if problems := conflicts(args, decided_of_pairs(method)):
        raise ValueError(f'DPOConfig options that method "{method.name}" cannot honour:\n' + "\n".join(problems))


def conflicts(args: Any, verdicts: Mapping[str, Decided]) -> list[str]:
    """A line for every option that was set to something else than the method means by it."""
    found = []
    for option, verdict in verdicts.items():
        value = getattr(args, option, verdict.untouched)
        if value != verdict.untouched and value not in verdict.agrees:
            found.append(f"  {option}={value!r}: {verdict.instead}")
    return found
