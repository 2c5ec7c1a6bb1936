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
def gtpo(tmp_path_factory, address):
    """A run whose loss is a policy loss of verl's registry."""
    out = tmp_path_factory.mktemp("gtpo")
    prepare(out, prompts=32)
    settings = overrides(out, prompts=32, group=8, steps=8, minibatches=2, learning_rate=1e-3)
    done = main_ppo(out, [*settings, *SYNC, "+trainer.v1.tokencredit.method=gtpo", "trainer.save_freq=8"], address)
    assert done.returncode == 0, told(out)
    return out


def test_the_reward_rises(gtpo):
    """On the same 32 prompts at every step."""
    rewards = curve(gtpo, "critic/rewards/mean")
    assert len(rewards) == 8
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1


def test_the_credit_is_logged(gtpo):
    assert curve(gtpo, "tokencredit/success") == pytest.approx(curve(gtpo, "critic/rewards/mean"), abs=1e-6)
    assert all(0 < share <= 1 for share in curve(gtpo, "tokencredit/credited"))
    assert all(x > 0 for x in curve(gtpo, "actor/ratio_mean"))


def test_a_checkpoint_says_which_method_it_is_of(gtpo):
    kept = json.loads((gtpo / "checkpoints" / "global_step_8" / "tokencredit.json").read_text())
    assert kept["method"].startswith("Method(name='gtpo'") and kept["state"] == {}


@pytest.fixture(scope="module")
def forking(tmp_path_factory, address):
    """A run through the workers' loss function, with dynamic sampling and two optimizer steps a batch."""
    out = tmp_path_factory.mktemp("forking")
    prepare(out)
    settings = overrides(out, prompts=8, group=8, steps=2, minibatches=2)
    done = main_ppo(out, [*settings, *SYNC, "+trainer.v1.tokencredit.method=forking_tokens"], address)
    assert done.returncode == 0, told(out)
    return out


def test_the_loss_function_is_the_workers(forking):
    assert "carried as Carried(loss_mode='tokencredit_channel'" in (forking / "log.txt").read_text()
    assert all(x > 0 for x in curve(forking, "actor/grad_norm"))
    assert all(x < 0.3 for x in curve(forking, "tokencredit/credited"))


def test_dynamic_sampling_is_verls(forking):
    assert curve(forking, "tokencredit/mixed") == [1.0, 1.0]
