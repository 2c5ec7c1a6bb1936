"""Methods whose scores the engine or the task gives, through `train` on the embedded world: what the records hold fits
together.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.utils import logging

import reference
from tokencredit import METHODS, Rollouts
from tokencredit.engines.recorder import RunRecorder
from tokencredit.engines.train import make_trainer, train
from tokencredit.lm.room import Room, size_of
from tokencredit.tasks.reckon import DECIDING, Reckon
from tokencredit.train_config import TrainConfig

logging.set_verbosity_error()
logging.disable_progress_bar()

TINY = {
    "prompts": 8,
    "group": 4,
    "steps": 2,
    "updates": 1,
    "eval_every": 0,
    "record_every": 1,
    "record_rows": 32,
    "save_every": 0,
    "threads": 1,
    "max_rounds": 1,
}
NAMES = (
    "otb",
    "random_tokens",
    "oracle_positions",
    "token_sampling",
    "vineppo",
    "abc",
    "arm",
    "spo_chain",
    "tw_grpo",
    "spro",
)


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tmp_path_factory):
    """(the method, the recorded rows of the second rollout batch)."""
    run = train(TrainConfig(method=request.param, **TINY), tmp_path_factory.mktemp("runs") / request.param)
    assert [m["grad_norm"] > 0 for m in run.metrics()] == [True, True]
    return METHODS[request.param].within(48), run.tokens(1)


def padded(rows, name):
    width = max(len(row["credit"]) for row in rows)
    return torch.tensor([[*row[name], *[0.0] * (width - len(row[name]))] for row in rows])


def test_the_credit_is_the_methods_on_the_recorded_scores(trained):
    """The slow reference, given the scores that were recorded, makes the credit that was recorded."""
    method, rows = trained
    mask = padded([row | {"on": [1.0] * len(row["credit"])} for row in rows], "on") > 0
    reward, group = torch.tensor([row["reward"] for row in rows]), torch.tensor([row["group"] for row in rows])
    rollouts = Rollouts(reward, group, mask, {name: padded(rows, name) for name in method.needs})
    expected = reference.CREDIT[method.name](reference.batch_of(rollouts))
    torch.testing.assert_close(padded(rows, "credit"), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert padded(rows, "credit").any()


def test_the_scores_are_what_they_are_called(trained):
    method, rows = trained
    task, prompts = Reckon(), {row["prompt"]: row for row in Reckon().rows("train", 16, 0)}
    for row in rows:
        if "uniform" in method.needs:
            assert all(0 <= u < 1 for u in row["uniform"])
        if "oracle_positions" in method.needs:
            slots = task.slots(prompts[row["prompt"]], [token.strip() for token in row["tokens"]])
            assert row["oracle_positions"] == [float(slot in DECIDING) for slot in slots]
        if "sum_p2" in method.needs:  # π(a)² ≤ Σ π² ≤ 1, and Σ π² ≥ exp(−H)
            for p2, logprob, entropy in zip(row["sum_p2"], row["logprob"], row["entropy"]):
                assert max(2.71828 ** (2 * logprob), 2.71828**-entropy) - 1e-4 <= p2 <= 1 + 1e-5
        if (
            "step_gain" in method.needs
        ):  # K = 9 rollouts, so gains are multiples of 1/9 but for the last, which ends in the reward
            assert all(abs(9 * gain - round(9 * gain)) < 1e-4 for gain in row["step_gain"])


@pytest.mark.parametrize("trained", ["vineppo"], indirect=True)
def test_step_gains_add_up_to_the_reward_against_the_prompts_value(trained):
    values = {}
    for row in trained[1]:
        words = [token.strip() for token in row["tokens"]]
        prompt = next(p for p in Reckon().rows("train", 16, 0) if p["prompt"] == row["prompt"])
        starts = [i for i in Reckon().steps(prompt, words) if words[i] != "<eos>"]
        total = sum(row["step_gain"][i] for i in starts)
        values.setdefault(row["group"], set()).add(round(row["reward"] - total, 4))
    assert all(len(found) == 1 for found in values.values()) and all(0 <= min(found) <= 1 for found in values.values())
    assert len(set.union(*values.values())) > 1


@pytest.mark.parametrize("name", ["vineppo", "tw_grpo", "spro", "ptw_gradient_norm"])
def test_what_a_method_measures_keeps_to_the_memory(name, tmp_path, monkeypatch):
    """Every pass is sized for what gradient, moments and a reference leave of it; without a budget nothing is told."""
    memory, told, of = 5 << 28, [], Room.of.__func__

    def listened(cls, model, memory=None, place=None):
        told.append((memory, size_of(model)))
        return of(cls, model, memory, place)

    monkeypatch.setattr(Room, "of", classmethod(listened))
    config = TrainConfig(method=name, **TINY | {"steps": 1, "record_every": 0})
    train(config, tmp_path / "limited", memory=memory)
    models = 3 + (name == "spro")
    assert len(told) > 1 and {(memory - models * size, size) for _, size in told} == set(told)
    told.clear()
    train(config, tmp_path / "usual")
    assert {budget for budget, _ in told[2:]} == {None}, "the first two size the room of training"


def test_the_reference_of_trl_is_counted_where_all_parameters_are_trained(tmp_path):
    def sized(**changes):
        config, recorder = TrainConfig(**TINY | changes), RunRecorder(tmp_path / "run", Reckon())
        recorder.config, recorder.memory = config, 5 << 28
        trainer = make_trainer(config, config.build_method(), Reckon(), recorder)
        assert recorder.memory == trainer.memory
        return (5 << 28) - trainer.memory, size_of(trainer.model)

    assert sized()[0] == sized(trl={"beta": 0.1}, peft={"r": 2, "target_modules": ["q_proj"]})[0] == 0
    taken, size = sized(trl={"beta": 0.1})
    assert taken == size > 0
