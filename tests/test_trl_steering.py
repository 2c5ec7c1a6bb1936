"""What a method moves from batch to batch: logged, in the checkpoint, and back from it; and log-ratios of two models as
a score.
"""

import json

import pytest
import torch

from tokencredit import METHODS
from tokencredit.engines.scorers import log_ratio
from tokencredit.engines.trl import CreditTrainer
from trl_tiny import FixedCredit, build, steps, tiny_model, train

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_only_model": False}
# The tiny model's entropy lies between the two: the coefficient goes up, or stays at its lower bound.
RISES = METHODS["entropy_bonus_adaptive"].replace(target=9.0, delta=0.1)


def test_the_coefficient_moves_is_logged_and_saved(tmp_path):
    trainer = train(CreditTrainer, tmp_path, SAVED, method=RISES)
    logged = [record.get("steered/EntropyGradient.coef") for record in steps(trainer)]
    assert logged == pytest.approx([0.0, 0.1, 0.2, 0.3])  # what each batch was given credit with
    saved = [json.loads((tmp_path / f"checkpoint-{n}" / "steered.json").read_text()) for n in (2, 4)]
    assert [s["EntropyGradient.coef"] for s in saved] == pytest.approx([0.2, 0.4])  # what the next one will be
    assert trainer.method.chain.parts[-1].coef == pytest.approx(0.4)
    idle = train(CreditTrainer, tmp_path / "idle", SAVED, method=RISES.replace(target=0.0))
    assert idle.method.chain.parts[-1].coef == 0.0 and not list((tmp_path / "idle").glob("*/steered.json"))


def test_a_resumed_run_goes_on_with_the_coefficient_of_its_checkpoint(tmp_path):
    straight = train(FixedCredit, tmp_path / "straight", SAVED, method=RISES)
    train(FixedCredit, tmp_path / "halved", SAVED | {"max_steps": 2}, method=RISES)
    resumed = build(FixedCredit, tmp_path / "halved", SAVED, method=RISES)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.method == straight.method and resumed.method.chain.parts[-1].coef == pytest.approx(0.4)
    for turn in (2, 3):
        assert torch.allclose(resumed.kept[turn - 2]["advantages"], straight.kept[turn]["advantages"], atol=1e-6)
    assert straight.kept[3]["advantages"].abs().sum() > 0


def test_evaluation_does_not_steer(tmp_path):
    trainer = train(CreditTrainer, tmp_path, method=RISES, eval_dataset=build(CreditTrainer, tmp_path).train_dataset)
    before = trainer.method
    trainer.evaluate()
    assert trainer.method == before


def test_log_ratios_of_two_models(tmp_path):
    policy, reference = tiny_model(1), tiny_model(2)
    seen = {}

    def watched(trainer, inputs, batch):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        position = (attention.cumsum(1) - 1).clamp(min=0)
        width = batch["completion_ids"].shape[1]
        expected = 0.0
        for sign, model in ((1, policy), (-1, reference)):
            with torch.no_grad():
                logits = model(ids, attention_mask=attention, position_ids=position).logits[:, -width - 1 : -1]
            found = logits.log_softmax(-1).gather(2, batch["completion_ids"][:, :, None])[:, :, 0]
            expected = expected + sign * found
        seen["off"] = (
            (log_ratio(policy, reference)(trainer, inputs, batch) - expected) * batch["completion_mask"]
        ).abs()
        seen["self"] = log_ratio(None, trainer.model)(trainer, inputs, batch)
        return expected

    trainer = train(CreditTrainer, tmp_path, {"max_steps": 1}, method="rto_group", scorers={"implicit_reward": watched})
    assert seen["off"].max() < 1e-5 and not seen["self"].any()
    assert steps(trainer)[0]["grad_norm"] > 0
    with pytest.raises(ValueError, match=r"(?s)spro.*needs the scores self_reward.*self_reward: log π − log π_ref"):
        build(CreditTrainer, tmp_path, method="spro")
