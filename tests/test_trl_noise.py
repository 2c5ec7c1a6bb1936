"""The gradient noise scale while training: by hand, however the step is split, and without a trace in the training
itself.
"""

import pytest
import torch
from peft import LoraConfig

from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_groups import trimmed
from tokencredit.engines.trl_noise import KEPT
from trl_tiny import FixedCredit, build, steps, train, weights

NAMES = ("noise_scale/signal", "noise_scale/noise")


class ByHand(FixedCredit):
    """Keeps the gradient of every prompt of every step, by itself."""

    def _compute_loss(self, model, inputs):
        gradients = []
        for prompt in inputs["group"].unique():
            loss = self._loss(model, trimmed(inputs, inputs["group"] == prompt), routers=False)[0]
            gradients.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()
            )
        self.seen = [*getattr(self, "seen", []), torch.stack(gradients) * len(gradients)]
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("name", ["grpo", "gtpo"])
def test_the_figures_are_those_of_the_prompts_gradients(tmp_path, name):
    """Four prompts, so every piece is one prompt; running means of both parts, and their ratio."""
    trainer = train(ByHand, tmp_path, {"max_steps": 3}, method=name, noise_scale_every=1)
    signal = noise = weight = 0.0
    for record, x in zip(steps(trainer), trainer.seen, strict=True):
        gram = x @ x.T
        one = float((gram.sum() - gram.diagonal().sum()) / 12)
        weight = KEPT * weight + 1 - KEPT
        signal, noise = KEPT * signal + (1 - KEPT) * one, KEPT * noise + (1 - KEPT) * float(x.var(0).sum())
        assert record["noise_scale/signal"] == pytest.approx(signal / weight, rel=1e-4)
        assert record["noise_scale/noise"] == pytest.approx(noise / weight, rel=1e-4)
        assert record.get("noise_scale") == (pytest.approx(noise / signal, rel=1e-4) if signal > 0 else None)
    first = steps(trainer)[0]
    assert first["grad_norm"] ** 2 == pytest.approx(
        first["noise_scale/signal"] + first["noise_scale/noise"] / 4, rel=1e-4
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
        {"per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 2},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "beta": 0.1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["whole", "accumulated", "rows", "reused", "part_of_a_batch", "checkpointed"],
)
def test_the_training_is_the_same_to_the_last_bit(tmp_path, changes):
    """With dropout, so that a random number drawn by the measurement would show."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    changes = {"max_steps": 5, "learning_rate": 0.2} | changes
    torch.manual_seed(0)
    plain = train(CreditTrainer, tmp_path, changes, method="gtpo", peft_config=lora)
    torch.manual_seed(0)
    probed = train(CreditTrainer, tmp_path, changes, method="gtpo", peft_config=lora, noise_scale_every=2)
    assert torch.equal(weights(plain), weights(probed))
    figures = [
        [[s[name] for name in ("loss", "grad_norm", "entropy")] for s in steps(trainer)] for trainer in (plain, probed)
    ]
    assert figures[0] == figures[1]
    assert not any("noise_scale/noise" in s for s in steps(plain))
    assert ["noise_scale/noise" in s for s in steps(probed)] == [True, False, True, False, True]
    assert all(s["noise_scale/noise"] > 0 for s in steps(probed)[::2])


def test_accumulation_does_not_change_the_figures(tmp_path):
    found = []
    for size, accumulated in ((16, 1), (4, 4), (1, 16)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        [record] = steps(train(FixedCredit, tmp_path, changes, method="grpo", noise_scale_every=1))
        found.append([record[name] for name in NAMES])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)


def test_steps_over_several_rollout_batches_are_measured_on_the_first(tmp_path):
    """Two accumulated batches of 16 rollouts: the gradient counts each half, and the figures do not."""
    whole = {"max_steps": 1, "per_device_train_batch_size": 16}
    [one] = steps(train(FixedCredit, tmp_path, whole, method="grpo", noise_scale_every=1))
    changes = whole | {"gradient_accumulation_steps": 2, "steps_per_generation": 1}
    [two] = steps(train(FixedCredit, tmp_path, changes, method="grpo", noise_scale_every=1))
    assert [two[name] for name in NAMES] == pytest.approx([one[name] for name in NAMES], rel=1e-4)


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 \\(off\\) or a number of optimizer steps, got -1"):
        build(CreditTrainer, tmp_path, method="grpo", noise_scale_every=-1)
    with pytest.raises(ValueError, match="a step of 4 rollouts in groups of 4 has fewer than two"):
        build(CreditTrainer, tmp_path, {"per_device_train_batch_size": 4}, method="grpo", noise_scale_every=1)


def test_a_run_records_it(tmp_path):
    from tokencredit.engines.train import train as run_training
    from tokencredit.train_config import TrainConfig

    config = TrainConfig(steps=2, prompts=8, group=4, updates=2, noise_scale_every=2, eval_every=0, record_every=0)
    run = run_training(config, tmp_path / "run")
    assert ["noise_scale/noise" in m for m in run.metrics()] == [True, False, True, False]
    assert all(
        m["noise_scale"] == m["noise_scale/noise"] / m["noise_scale/signal"]
        for m in run.metrics()
        if "noise_scale" in m
    )
