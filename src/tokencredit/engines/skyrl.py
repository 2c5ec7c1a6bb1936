"""SkyRL: the credit of a `Method` as a registered advantage estimator, for methods that read rewards and groups alone.

    from skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry
    AdvantageEstimatorRegistry.register("tokencredit_rloo", estimator(METHODS["rloo"]))

and trainer.algorithm.advantage_estimator="tokencredit_rloo". An estimator gets neither log-probs nor entropies, and the
loss is SkyRL's: its policy_loss_type, loss_reduction and clip are to be set as `tokencredit methods NAME` has them.
Written from SkyRL's documentation and tested on its data layout; not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokencredit.method import Method
from tokencredit.rollouts import Rollouts

Estimator = Callable[..., tuple[Tensor, Tensor]]


def estimator(method: Method, success_above: float = 0.0) -> Estimator:
    """A function as SkyRL calls it: (token_level_rewards, response_mask, index, **others) -> (advantages, returns).

    token_level_rewards  [B, T]  a rollout's reward is their sum over its response
    response_mask        [B, T]
    index                [B]     the uid of each row's prompt

    ValueError for a method that needs more.
    """
    if method.needs:
        raise ValueError(
            f'method "{method.name}" needs the scores {", ".join(sorted(method.needs))}, and an estimator of SkyRL gets'
            " rewards, mask and groups alone: choose a method without scores (`tokencredit methods`)"
        )

    def estimate(
        token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[Any], **_: Any
    ) -> tuple[Tensor, Tensor]:
        names = {name: k for k, name in enumerate(dict.fromkeys(index))}
        group = torch.tensor([names[name] for name in index], device=response_mask.device)
        mask = response_mask.bool()
        reward = torch.where(mask, token_level_rewards, 0).sum(1)
        credit = method.credit(Rollouts(reward, group, mask, success_above=success_above))
        return credit.to(token_level_rewards.dtype), credit.to(token_level_rewards.dtype).clone()

    return estimate
