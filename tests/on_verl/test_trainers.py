"""The mixin over verl's trainers, on a base that only says what it was asked: no Ray, no TransferQueue."""

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import open_dict
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.trainer.ppo.v1 import get_trainer_cls

from tokencredit import METHODS
from tokencredit.engines.verl import trainers
from tokencredit.engines.verl.configuration import settle
from tokencredit.engines.verl.trainers import CreditMixin
from verl_cpu.steps import composed, configured, nested

LENGTHS = (3, 1, 2, 4)
KEYS = [f"{uid}_{n}_0" for uid in "ab" for n in range(2)]


class Store:
    """A TransferQueue of one partition."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        rows = {name: [torch.rand(n, generator=generator) for n in LENGTHS] for name in ("entropy", "sum_pi_squared")}
        rows["old_log_probs"] = [-torch.rand(n, generator=generator) for n in LENGTHS]
        rows["response_mask"] = [torch.ones(n, dtype=torch.long) for n in LENGTHS]
        rows["rm_scores"] = [torch.tensor([0.0] * (n - 1) + [float(k % 2)]) for k, n in enumerate(LENGTHS)]
        # Of the whole sequence, a prompt of one token before the completion; the last position predicts nothing.
        rows["sum_pi_squared"] = [torch.cat([x, torch.zeros(1)]) for x in rows["sum_pi_squared"]]
        self.data = TensorDict({name: nested(x) for name, x in rows.items()}, batch_size=4)
        self.data["uid"] = NonTensorStack(*[key[0] for key in KEYS])

    def kv_batch_get(self, keys, partition_id, select_fields):
        return self.data.select(*select_fields)

    def kv_batch_put(self, keys, partition_id, fields):
        self.data.update(fields)
        return batch()


class Base:
    """What the mixin asks of verl's trainer."""

    def __init__(self, config):
        self.config, self.global_steps, self.asked = config, 1, []

    def _compute_old_log_prob(self, batch, metrics):
        self.asked.append(dict(batch.extra_info))
        return batch

    def _compute_advantage(self, batch, metrics):
        return batch

    def _save_checkpoint(self):
        pass

    def _load_checkpoint(self):
        pass


class Credited(CreditMixin, Base):
    mode = "sync"


def batch():
    tags = [{"is_padding": False}] * len(KEYS)
    return SimpleNamespace(keys=KEYS, partition_id="train", tags=tags, extra_info={})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return composed(tmp_path_factory.mktemp("trainers"), 2, 2)


@pytest.fixture
def store(monkeypatch):
    found = Store()
    monkeypatch.setattr(trainers, "tq", found)
    return found


def padded(x):
    return x.to_padded_tensor(0.0)


@pytest.mark.parametrize("name", ["gtpo", "grpo", "kl_cov", "forking_tokens"])
def test_credit_and_plan_become_fields_of_the_batch(name, config, store):
    trainer, metrics = Credited(configured(config, name)), {}
    trainer._compute_advantage(batch(), metrics)
    credit = padded(store.data["advantages"])
    assert torch.equal(padded(store.data["returns"]), credit)
    method = METHODS[name].within(48)
    assert credit.abs().sum() > 0
    assert ("token_weight" in store.data) == trainer.settled.carried.in_channel
    assert ("coefficient" in store.data) == method.surrogate.plans
    assert metrics["tokencredit/success"] == 0.5 and metrics["tokencredit/mixed"] == 1.0


def test_sum_p2_is_asked_for_where_it_is_read(config, store):
    trainer = Credited(configured(config, "otb"))
    returned = trainer._compute_old_log_prob(batch(), {})
    assert trainer.asked == [{"calculate_sum_pi_squared": True}]
    assert not returned.extra_info.get("calculate_sum_pi_squared")
    expected = padded(store.data["sum_pi_squared"])[:, :-1]
    for row, length in enumerate(LENGTHS):
        assert torch.equal(padded(store.data["sum_p2"])[row, :length], expected[row, :length])
    trainer._compute_advantage(batch(), {})
    other = Credited(configured(config, "grpo"))
    other._compute_old_log_prob(batch(), {})
    assert other.asked == [{"calculate_sum_pi_squared": False}]


def test_what_a_method_has_steered_survives_a_checkpoint(config, store, tmp_path):
    settled = configured(config, "entropy_bonus_adaptive")
    settled.trainer.default_local_dir = str(tmp_path)
    with open_dict(settled):
        settled.trainer.v1.tokencredit.method_options = {"target": 1.0}  # above the entropies here: more is asked for
    trainer = Credited(settled)
    start = trainer.method
    trainer._compute_advantage(batch(), {})
    assert trainer.method != start
    (tmp_path / "global_step_1").mkdir()
    trainer._save_checkpoint()
    kept = json.loads((tmp_path / "global_step_1" / "tokencredit.json").read_text())
    assert kept["state"] == trainer.method.state(start)
    resumed = Credited(settled)
    resumed._load_checkpoint()
    assert resumed.method == trainer.method
    fresh = Credited(settled)
    fresh.global_steps = 0
    fresh._load_checkpoint()
    assert fresh.method == start


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_every_mode_is_registered_over_verls_own(mode):
    found, below = get_trainer_cls(f"tokencredit_{mode}"), get_trainer_cls(mode)
    assert issubclass(found, below) and issubclass(found, CreditMixin) and found.mode == mode


def test_a_configuration_that_contradicts_the_method_makes_no_trainer(config):
    wrong = configured(config, "gtpo")
    wrong.actor_rollout_ref.actor.loss_agg_mode = "seq-mean-token-sum"
    with pytest.raises(ValueError, match="loss_agg_mode=seq-mean-token-sum contradicts the method's TokenMean"):
        get_trainer_cls("tokencredit_sync")(wrong)


def test_options_come_out_of_verls_configuration_as_they_are_meant(config):
    own = configured(config, "gtpo")
    with open_dict(own):
        own.trainer.v1.tokencredit.method_options = {"alpha": [1, 0.2]}
    assert settle(own, "sync").method == METHODS["gtpo"].replace(alpha=(1, 0.2)).within(48)


def test_verls_whole_configuration_is_settled(config):
    """Every path that is read or written is one of verl's."""
    own = configured(config, "dr_grpo")
    settle(own, "sync")
    actor = own.actor_rollout_ref.actor
    assert actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor == 48
    assert actor.policy_loss.loss_mode == "tokencredit_dr_grpo" and own.trainer.v1.trainer_mode == "sync"
    for path in ("bypass_mode", "use_kl_in_reward"):
        where = own.algorithm.rollout_correction if path == "bypass_mode" else own.algorithm
        assert path in where
    assert "enabled" in own.distillation and "enable" in own.critic and "enable" in own.algorithm.filter_groups
