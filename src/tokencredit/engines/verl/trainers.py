"""verl's trainers with the credit of a `Method`: its own classes, with some of their steps completed."""

from __future__ import annotations

import json
import os
from typing import Any

import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import response_from_nested, response_to_nested

from tokencredit.engines.verl.batch import FIELDS, Assigned, assign, check_outputs
from tokencredit.engines.verl.configuration import settle
from tokencredit.engines.verl.losses import ChannelLoss

STATE = "tokencredit.json"


class CreditMixin:
    """Over one of verl's trainers, whose name is `mode`.

    The configuration is settled before verl reads it. Credit and plan come from the whole sampled batch, with the old
    log-probs and entropies that verl has stored, after verl's own `_compute_advantage` (rollout correction, returns).
    What a method has steered is kept beside verl's checkpoint.
    """

    mode: str
    config: Any
    global_steps: int
    actor_rollout_wg: Any

    def __init__(self, config: Any) -> None:
        self.settled = settle(config, self.mode)
        self.method = self.settled.method
        print(f"tokencredit: {self.method.name}, carried as {self.settled.carried}", flush=True)
        super().__init__(config)

    def _setup(self) -> None:
        super()._setup()
        if self.settled.carried.in_channel:
            actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(ChannelLoss(self.method.surrogate, actor))

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """verl's pass for the old log-probs stores entropies; Σ p² as well, where the method asks for it."""
        asked = "sum_p2" in self.method.needs
        batch.extra_info["calculate_sum_pi_squared"] = asked
        batch = super()._compute_old_log_prob(batch, metrics)
        batch.extra_info["calculate_sum_pi_squared"] = False
        if asked:
            names = ["sum_pi_squared", "response_mask"]
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
            score = response_from_nested(data["sum_pi_squared"], data["response_mask"])
            fields = TensorDict({"sum_p2": score}, batch_size=len(batch.keys))
            batch = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        check_outputs(batch.keys)
        batch = super()._compute_advantage(batch, metrics)
        names = [*FIELDS, *(("prompts", "responses") if self.settled.carrier.scores else ())]
        names += ["sum_p2"] if "sum_p2" in self.method.needs else []
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        nested = data["response_mask"]
        padded = data.to_padded_tensor()
        rows = {name: padded[name] for name in names if name != "uid"}
        found = assign(
            rows,
            [str(name) for name in data["uid"]],
            [not tag.get("is_padding", False) for tag in batch.tags],
            self.method,
            self.settled.carrier,
            step=self.global_steps,
            minibatches=self._minibatches(len(batch.keys)),
        )
        metrics |= self._figures(found)
        self.method = self.method.after(found.rollouts)
        fields = {"advantages": found.credit, "returns": found.credit}
        if self.settled.carried.in_channel:
            fields["token_weight"] = found.weight
            if found.coefficient is not None:
                fields["coefficient"] = found.coefficient
        out = TensorDict({k: response_to_nested(x, nested) for k, x in fields.items()}, batch_size=len(batch.keys))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=out)

    def _minibatches(self, rows: int) -> int:
        """Optimizer steps in one pass over a batch."""
        rollout = self.config.actor_rollout_ref
        return max(rows // (rollout.actor.ppo_mini_batch_size * rollout.rollout.n), 1)

    def _figures(self, found: Assigned) -> dict[str, float]:
        rollouts, credit = found.rollouts, found.credit
        tokens = rollouts.mask.sum().clamp(min=1)
        return {
            "tokencredit/success": float(rollouts.success.float().mean()),
            "tokencredit/mixed": float(rollouts.mixed.float().mean()),
            "tokencredit/credited": float((credit != 0).sum() / tokens),
            "tokencredit/credit_abs": float(credit.abs().sum() / tokens),
        }

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        folder = os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
        with open(os.path.join(folder, STATE), "w", encoding="utf-8") as file:
            json.dump({"method": repr(self.method), "state": self.method.state(self.settled.method)}, file)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        path = os.path.join(self._resumed_from() or "", STATE)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.method = self.settled.method.replace(**json.load(file)["state"])

    def _resumed_from(self) -> str | None:
        """The folder that verl has resumed from, as its own `_load_checkpoint` finds it."""
        trainer = self.config.trainer
        if self.global_steps == 0:
            return None
        if trainer.resume_mode == "resume_path":
            return trainer.resume_from_path
        return os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")


@register_trainer("tokencredit_sync")
class CreditSync(CreditMixin, PPOTrainerSync):
    mode = "sync"


@register_trainer("tokencredit_colocate_async")
class CreditColocateAsync(CreditMixin, PPOTrainerColocateAsync):
    mode = "colocate_async"


@register_trainer("tokencredit_separate_async")
class CreditSeparateAsync(CreditMixin, PPOTrainerSeparateAsync):
    mode = "separate_async"
