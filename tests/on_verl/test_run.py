"""verl end to end on a CPU: `python -m verl.trainer.main_ppo` with Ray, TransferQueue, its replay buffer and two FSDP2
workers over gloo; only the platform and the rollout engine are ours.
"""

import json

import pytest

from verl_cpu.run import curve, main_ppo, overrides, prepare

SYNC = ["trainer.v1.trainer_mode=tokencredit_sync"]


def told(out, lines=40):
    return "\n".join((out / "log.txt").read_text(encoding="utf-8").splitlines()[-lines:])


@pytest.fixture(scope="module")
def gtpo(tmp_path_factory):
    """A run whose loss is a policy loss of verl's registry."""
    out = tmp_path_factory.mktemp("gtpo")
    prepare(out)
    settings = overrides(out, prompts=32, group=8, steps=8)
    done = main_ppo(out, [*settings, *SYNC, "+trainer.v1.tokencredit.method=gtpo", "trainer.save_freq=8"])
    assert done.returncode == 0, told(out)
    return out


def test_the_reward_rises(gtpo):
    rewards = curve(gtpo, "critic/rewards/mean")
    assert len(rewards) == 8
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1


def test_the_credit_is_logged(gtpo):
    assert curve(gtpo, "tokencredit/success") == pytest.approx(curve(gtpo, "critic/rewards/mean"), abs=1e-6)
    assert all(0 < share <= 1 for share in curve(gtpo, "tokencredit/credited"))
    assert all(x > 0 for x in curve(gtpo, "actor/ratio_mean"))


def test_a_checkpoint_says_which_method_it_is_of(gtpo):
    kept = json.loads((gtpo / "checkpoints" / "global_step_8" / "tokencredit.json").read_text())
    assert kept["method"].startswith("Method(name='gtpo'") and kept["state"] == {}


def test_a_configuration_that_contradicts_the_method_ends_the_run_with_its_name(tmp_path):
    prepare(tmp_path, prompts=8)
    settings = overrides(tmp_path, prompts=8, group=2, steps=1)
    conflict = "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum"
    done = main_ppo(tmp_path, [*settings, *SYNC, "+trainer.v1.tokencredit.method=gtpo", conflict])
    assert done.returncode != 0
    assert "loss_agg_mode=seq-mean-token-sum contradicts the method's TokenMean" in told(tmp_path)
