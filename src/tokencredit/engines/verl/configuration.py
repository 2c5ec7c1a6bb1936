"""verl's configuration under a method: what the method derives in it, and what it refuses there, by name."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from tokencredit.engines.verl.carried import Carried, carried, check_scores
from tokencredit.engines.verl.carrier import WHERE, Carrier, read_carrier
from tokencredit.method import Method

ACTOR = "actor_rollout_ref.actor"
CLIPS = {"clip_ratio_low": "low", "clip_ratio_high": "high"}
"""verl's options of the clip and the fields of a surrogate that take their place; verl's default is 0.2."""


@dataclass(frozen=True)
class Settled:
    """What a run of verl trains with, after its configuration was read and completed."""

    carrier: Carrier
    method: Method
    carried: Carried


def settle(config: MutableMapping[str, Any], mode: str) -> Settled:
    """Reads the carrier, refuses what contradicts the method, and writes what follows from it into `config`: verl's
    whole configuration, a DictConfig or nested dicts. `mode` is the trainer of verl that ours extends.

    Derived: `loss_mode`, `loss_agg_mode`, `loss_scale_factor`, `filter_groups.enable`; and `trainer_mode`, by whose
    name verl chooses its replay buffer and reads the mode's own section.
    """
    carrier = read_carrier(find(config, WHERE))
    method = carrier.build(find(config, "data.max_response_length"))
    check_scores(method, carrier.scores)
    how = carried(method)
    _refuse(config, method, how)
    derived = {f"{ACTOR}.policy_loss.loss_mode": how.loss_mode, "trainer.v1.trainer_mode": mode}
    if how.loss_agg_mode is not None:
        derived[f"{ACTOR}.loss_agg_mode"] = how.loss_agg_mode
        derived[f"{ACTOR}.loss_scale_factor"] = how.loss_scale_factor
    if method.mixed_groups_only if carrier.dynamic_sampling is None else carrier.dynamic_sampling:
        derived["algorithm.filter_groups.enable"] = True
    for path, value in derived.items():
        _put(config, path, value)
    return Settled(carrier, method, how)


def _refuse(config: Mapping[str, Any], method: Method, how: Carried) -> None:
    """ValueError for every setting that the method contradicts or would silently replace."""
    faults = [
        *_refused_sources(config, method),
        *_refused_losses(config, method, how),
    ]
    if faults:
        raise ValueError(f'method "{method.name}" and this configuration of verl:\n' + "\n".join(faults))


def _refused_sources(config: Mapping[str, Any], method: Method) -> list[str]:
    """What the credit would be computed from."""
    faults = []
    if find(config, "algorithm.rollout_correction.bypass_mode"):
        faults.append(
            "algorithm.rollout_correction.bypass_mode=True takes the old log-probs from the rollout engine and leaves"
            " out the pass that gives the entropies of the policy that sampled: set it to False"
        )
    if find(config, "algorithm.use_kl_in_reward"):
        faults.append(
            "algorithm.use_kl_in_reward=True changes the reward of tokens, which a method would not see: set it to"
            f" False, and {ACTOR}.use_kl_loss=True for a KL term beside the method's loss"
        )
    critic = find(config, "critic.enable")
    if critic or (critic is None and find(config, "algorithm.adv_estimator") == "gae"):
        faults.append(
            "a critic would be trained (algorithm.adv_estimator=gae or critic.enable=True), whose values no method"
            " reads: set algorithm.adv_estimator=grpo and leave critic.enable unset"
        )
    if find(config, "distillation.enabled"):
        faults.append("distillation.enabled=True replaces the loss by that of a teacher: set it to False")
    return faults


def _refused_losses(config: Mapping[str, Any], method: Method, how: Carried) -> list[str]:
    """What the loss would be. verl's defaults stand in every configuration and say nothing; any other value does."""
    faults = []
    loss_mode = find(config, f"{ACTOR}.policy_loss.loss_mode")
    if loss_mode not in (None, "vanilla", how.loss_mode):
        faults.append(
            f"{ACTOR}.policy_loss.loss_mode={loss_mode} is another loss than the method's"
            f" ({type(method.surrogate).__name__}): leave it unset"
        )
    agg_mode = find(config, f"{ACTOR}.loss_agg_mode")
    if how.loss_agg_mode is not None and agg_mode not in (None, "token-mean", how.loss_agg_mode):
        faults.append(
            f"{ACTOR}.loss_agg_mode={agg_mode} contradicts the method's {type(method.aggregate).__name__}, which is"
            f" {how.loss_agg_mode}: leave it unset, or choose a method with that aggregate"
        )
    factor = find(config, f"{ACTOR}.loss_scale_factor")
    if how.loss_agg_mode is not None and factor not in (None, how.loss_scale_factor):
        faults.append(
            f"{ACTOR}.loss_scale_factor={factor} contradicts the method's {method.aggregate!r}: leave it unset, or set"
            f" +{WHERE}.method_options.max_length={factor} where the aggregate is SequenceSum"
        )
    for option, name in CLIPS.items():
        value, own = find(config, f"{ACTOR}.{option}"), getattr(method.surrogate, name, None)
        if value not in (None, 0.2, own):
            there = (
                "none: leave it unset" if own is None else f"{name}={own}: set +{WHERE}.method_options.{name}={value}"
            )
            clip = f"the method's {type(method.surrogate).__name__} has {there}"
            faults.append(f"{ACTOR}.{option}={value}, and {clip}")
    return faults


def find(config: Mapping[str, Any] | None, path: str) -> Any:
    """What stands at "a.b.c" of nested mappings; None where there is nothing."""
    for key in path.split("."):
        if not isinstance(config, Mapping) and not hasattr(config, "get"):
            return None
        config = config.get(key)
    return config


def _put(config: MutableMapping[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        config = config[key]
    config[last] = value
