"""The score `past_pass_rate`: what a trainer remembers of its prompts, against a count of its records; through a
checkpoint.
"""

import json

import pytest
import torch

from tokencredit import METHODS
from tokencredit.engines.train import train as run_training
from tokencredit.engines.trl import CreditTrainer
from tokencredit.engines.trl_past import PassRates
from tokencredit.train_config import TrainConfig
from trl_tiny import FixedCredit, build, steps, sums, train, weights

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_only_model": False}
HARD = METHODS["entropy_bonus"].replace(coef=0.3, difficulty=0.9, rate="past_pass_rate")


def remembered(folder, changes, cls=CreditTrainer, prompts=4, decay=0.5, **keywords):
    """A trainer whose batches are the same few prompts again and again, and the batches that it recorded."""
    seen = []
    keywords = {"method": HARD} | keywords
    trainer = build(
        cls,
        folder,
        changes,
        train_dataset=sums(prompts),
        scorers={"past_pass_rate": PassRates(decay)},
        record=seen.append,
        record_every=1,
        **keywords,
    )
    return trainer, seen


def test_rates_by_hand():
    for decay, expected in ((0.5, 2 / 6), (1.0, 0.5), (0.0, 0.0)):
        rates = PassRates(decay)
        assert rates.rate("a", 0.3) == 0.3
        rates.add("a", 4, 4)
        rates.add("a", 0, 4)  # W = 4 γ + 0, N = 4 γ + 4
        assert rates.rate("a", 0.3) == pytest.approx(expected) and rates.rate("b", 0.7) == 0.7
    with pytest.raises(ValueError, match=r"PassRates.decay must be in \[0, 1\], got 1.5"):
        PassRates(1.5)
    with pytest.raises(ValueError, match=r"^past_pass_rate knows a prompt by its text, and these have images"):
        PassRates()(build(CreditTrainer, "."), [{"prompt": "a", "image": 1}], {"completion_ids": torch.ones(1, 1)})


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_every_batch_is_given_what_those_before_it_came_to(tmp_path, decay):
    trainer, batches = remembered(tmp_path, {"max_steps": 3}, decay=decay)
    trainer.train()
    assert len(batches) == 3
    past: dict[str, list[list[bool]]] = {}
    for turn, batch in enumerate(batches):
        for first in range(0, 16, 4):
            prompt, won = batch["prompts"][first], batch["success"][first : first + 4]
            visits = past.get(prompt, []) or [won]  # the first time it is the group's own share
            ages = [decay ** (len(visits) - 1 - k) for k in range(len(visits))]
            rate = sum(age * sum(visit) for age, visit in zip(ages, visits)) / sum(4 * age for age in ages)
            own = slice(first, first + 4)
            there = batch["scores"]["past_pass_rate"][own][batch["mask"][own]]
            assert there.numel() and torch.allclose(there, torch.tensor(rate), atol=1e-6)
            past.setdefault(prompt, []).append(won)
        assert steps(trainer)[turn]["past_pass_rate/known"] == float(turn > 0)
    assert len(past) == 4 and len({float(r["past_pass_rate"]) for r in steps(trainer)}) > 1
    seen = dict(trainer.scorers["past_pass_rate"].seen)
    trainer.evaluate(sums(4))
    assert trainer.scorers["past_pass_rate"].seen == seen and len(seen) == 4


def test_what_dynamic_sampling_left_out_counts(tmp_path):
    dapo = METHODS["dapo"].replace(chain=HARD.chain)
    trainer, _ = remembered(tmp_path, {"max_steps": 2, "learning_rate": 0.0}, prompts=8, method=dapo, decay=1.0)
    trainer.train()
    drawn = sum(record["dynamic_sampling/drawn_groups"] for record in steps(trainer))
    assert sum(n for _, n in trainer.scorers["past_pass_rate"].seen.values()) == 4 * drawn > 4 * 8


def test_a_resumed_run_remembers(tmp_path):
    straight, _ = remembered(tmp_path / "straight", SAVED, FixedCredit)
    straight.train()
    remembered(tmp_path / "halved", SAVED | {"max_steps": 2}, FixedCredit)[0].train()
    kept = json.loads((tmp_path / "halved" / "checkpoint-2" / "scorers.json").read_text())
    assert len(kept["past_pass_rate"]) == 4
    resumed, _ = remembered(tmp_path / "halved", SAVED, FixedCredit)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.scorers["past_pass_rate"].seen == straight.scorers["past_pass_rate"].seen
    for turn in (2, 3):
        found, expected = (sorted(x["advantages"].tolist()) for x in (resumed.kept[turn - 2], straight.kept[turn]))
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-6)
    assert (weights(resumed) - weights(straight)).abs().max() < 1e-6
    forgetful, _ = remembered(tmp_path / "forgetful", SAVED, FixedCredit, decay=0.0)
    forgetful.train()
    assert (forgetful.kept[3]["advantages"] - straight.kept[3]["advantages"]).abs().max() > 1e-3


def test_methods_that_do_not_read_it_keep_nothing(tmp_path):
    trainer = train(CreditTrainer, tmp_path, SAVED | {"max_steps": 2}, method="grpo")
    assert not trainer.scorers["past_pass_rate"].seen and not list(tmp_path.glob("*/scorers.json"))


def test_the_command_trains_with_it(tmp_path):
    options = {"coef": 0.01, "difficulty": 0.5, "rate": "past_pass_rate"}
    config = TrainConfig(
        method="entropy_bonus",
        method_options=options,
        steps=2,
        prompts=4,
        group=4,
        updates=1,
        eval_every=0,
        record_rows=16,
        record_every=1,
    )
    run = run_training(config, tmp_path / "run")
    assert [m["past_pass_rate/known"] for m in run.metrics()] == [0.0, 0.0]  # reckon's prompts do not come back
    for row in (row for step in range(2) for row in run.tokens(step)):
        assert len(set(row["past_pass_rate"])) == 1 and row["past_pass_rate"][0] in (0, 0.25, 0.5, 0.75, 1)
    [last] = (run.path / "checkpoints").glob("*/scorers.json")
    assert len(json.loads(last.read_text())["past_pass_rate"]) == 8
