"""The change of entropy while training: against a difference and against enumeration, and without a trace in the
training itself.
"""

import pytest
import torch
from peft import LoraConfig

from tokencredit.dynamics.passes import Passes
from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_entropy import NAMES
from trl_tiny import build, steps, train, weights

PREDICTED, REALISED = NAMES


def measured(trainer):
    return [[record.get(name) for name in NAMES] for record in steps(trainer)]


def test_small_steps_do_what_is_predicted_and_the_remainder_is_of_second_order(tmp_path):
    """Halving the rate of plain gradient descent halves the prediction, and quarters what it misses."""
    found = {}
    for rate in (0.02, 0.01):
        changes = {"max_steps": 1, "learning_rate": rate}
        [found[rate]] = measured(train(CreditTrainer, tmp_path, changes, method="grpo", entropy_change_every=1))
    (large, large_real), (small, small_real) = found[0.02], found[0.01]
    assert abs(small) > 1e-4 and small == pytest.approx(large / 2, rel=1e-3)
    assert abs(small_real - small) < 0.2 * abs(small)
    assert (small_real - small) == pytest.approx((large_real - large) / 4, rel=0.35)


class Watched(CreditTrainer):
    """Keeps the step's rollouts, and the weights before it."""

    def _compute_loss(self, model, inputs):
        if not hasattr(self, "kept"):
            self.kept = {name: inputs[name] for name in ("prompt_ids", "prompt_mask", "completion_ids")}
            self.kept |= {"completion_mask": inputs["completion_mask"]}
            self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return super()._compute_loss(model, inputs)


def test_the_prediction_is_the_derivative_of_reweighted_entropy(tmp_path):
    """d/dα of Σ ρ<t Hₜ / Σ ρ<t along the step, by a difference of sums written out token by token."""
    trainer = train(Watched, tmp_path, {"max_steps": 1, "learning_rate": 0.02}, method="grpo", entropy_change_every=1)
    [[predicted, realised]] = measured(trainer)
    own = {
        side: [ids[on].tolist() for ids, on in zip(trainer.kept[f"{side}_ids"], trainer.kept[f"{side}_mask"].bool())]
        for side in ("prompt", "completion")
    }
    end = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    passes = Passes(trainer.model, own["prompt"], own["completion"])

    def entropy_at(alpha, rest=None):
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                p.copy_(trainer.start[name].double() + alpha * (end[name].double() - trainer.start[name].double()))
        logprob, entropy = passes.values()
        if rest is None:
            return logprob
        total = length = 0.0
        for row, ids in enumerate(own["completion"]):
            ratio = 1.0
            for t in range(len(ids)):
                total, length = total + ratio * float(entropy[row, t]), length + ratio
                ratio *= float((logprob[row, t] - rest[row, t]).exp())
        return total / length

    rest = entropy_at(0.0)
    at_rest = entropy_at(0.0, rest)
    assert realised == pytest.approx(entropy_at(1.0, rest) - at_rest, abs=1e-6)
    slope = (entropy_at(0.1, rest) - entropy_at(-0.1, rest)) / 0.2
    assert predicted == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 2},
    ],
    ids=["whole", "accumulated", "reused"],
)
def test_the_training_is_the_same_to_the_last_bit(tmp_path, changes):
    """With dropout, so that a random number drawn by the measurement would show; measured where rollouts are new."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    reused = "num_iterations" in changes
    changes = {"max_steps": 5, "learning_rate": 0.2} | changes
    torch.manual_seed(0)
    plain = train(CreditTrainer, tmp_path, changes, method="gtpo", peft_config=lora)
    torch.manual_seed(0)
    probed = train(CreditTrainer, tmp_path, changes, method="gtpo", peft_config=lora, entropy_change_every=2)
    assert torch.equal(weights(plain), weights(probed))
    assert [s["loss"] for s in steps(plain)] == [s["loss"] for s in steps(probed)]
    assert not any(PREDICTED in s for s in steps(plain))
    expected = [True, False, False, False, True] if reused else [True, False, True, False, True]
    assert [PREDICTED in s and REALISED in s for s in steps(probed)] == expected


def test_accumulation_does_not_change_the_figures(tmp_path):
    found = []
    for size, accumulated in ((16, 1), (4, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        found += measured(train(CreditTrainer, tmp_path, changes, method="grpo", entropy_change_every=1))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_a_negative_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 \\(off\\) or a number of optimizer steps, got -1"):
        build(CreditTrainer, tmp_path, method="grpo", entropy_change_every=-1)


def test_a_run_records_it(tmp_path):
    from tokencredit.engines.train import train as run_training
    from tokencredit.train_config import TrainConfig

    config = TrainConfig(steps=2, prompts=8, group=4, updates=2, entropy_change_every=2, eval_every=0, record_every=0)
    run = run_training(config, tmp_path / "run")
    assert [PREDICTED in m and REALISED in m for m in run.metrics()] == [True, False, True, False]
    assert "entropy_change_every" not in TrainConfig().as_dict()
