"""The losses that verl's actor workers run: policy losses by name, and the loss function that knows the plan."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from tokencredit.engines.verl import CHANNEL, PREFIX
from tokencredit.engines.verl.carried import carried
from tokencredit.masked import zero_off
from tokencredit.methods import METHODS
from tokencredit.objective import Surrogate


def register_losses(core_algos: ModuleType) -> None:
    """Adds to verl's registry a policy loss for every method of the table that its signature carries, and CHANNEL."""
    for method in METHODS.values():
        # The completion budget is of no account here: loss_scale_factor brings it.
        how = carried(method.within(1))
        if not how.in_channel:
            core_algos.register_policy_loss(PREFIX + method.name)(policy_loss(method.surrogate, core_algos.agg_loss))
    core_algos.register_policy_loss(CHANNEL)(_nothing)


def policy_loss(surrogate: Surrogate, agg_loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A surrogate as verl's policy loss: verl's `agg_loss` of its loss per token."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = response_mask.bool()
        per_token, stats = surrogate(log_prob, old_log_prob, advantages, mask)
        if rollout_is_weights is not None:
            per_token = per_token * zero_off(rollout_is_weights, mask)
        total = agg_loss(loss_mat=per_token, loss_mask=mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
        return total, _told(stats)

    return loss


class ChannelLoss:
    """What `set_loss_fn` takes: verl's `ppo_loss`, with its entropy and KL terms, and the surrogate's loss in place of
    a policy loss, L = Σᵢₜ ωᵢₜ ℓᵢₜ with ω and κ from the whole batch.

    verl averages gradients over its data-parallel workers, where the weights call for a sum.
    """

    def __init__(self, surrogate: Surrogate, config: Any) -> None:
        if config.policy_loss.loss_mode != CHANNEL:
            raise ValueError(f"the loss channel needs loss_mode={CHANNEL}, got {config.policy_loss.loss_mode}")
        self.surrogate, self.config = surrogate, config

    def __call__(self, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        from verl.utils.metric import AggregationType, Metric
        from verl.workers.utils.losses import ppo_loss
        from verl.workers.utils.padding import no_padding_2_padding

        rest, metrics = ppo_loss(self.config, model_output, data, dp_group)
        names = ("response_mask", "old_log_probs", "advantages", "token_weight", "coefficient", "rollout_is_weights")
        batch = data.select(*(name for name in names if name in data)).to_padded_tensor()
        mask = batch["response_mask"].bool()
        log_prob = no_padding_2_padding(model_output["log_probs"], data)
        per_token, stats = self.surrogate(
            log_prob, batch["old_log_probs"], batch["advantages"], mask, batch.get("coefficient")
        )
        weight = zero_off(batch["token_weight"], mask)
        if "rollout_is_weights" in batch:
            weight = weight * zero_off(batch["rollout_is_weights"], mask)
        loss = (weight * per_token).sum() * data["dp_size"]
        metrics |= Metric.from_dict(_told(stats), aggregation=AggregationType.MEAN)
        metrics["actor/pg_loss"] = Metric(value=loss, aggregation=AggregationType.SUM)
        return rest + loss, metrics


def _nothing(log_prob: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
    """The policy loss under the name CHANNEL: none, the loss function adds it."""
    return log_prob.new_zeros(()), {}


def _told(stats: dict[str, Tensor]) -> dict[str, float]:
    """A surrogate's stats under verl's names of the actor's metrics."""
    return {f"actor/{name}": float(value) for name, value in stats.items()}
