"""Credit that is learned while training: what it is made of, what it costs, and how old it is."""

import pytest

from tokencredit.engines.train import train
from tokencredit.engines.trl import CreditTrainer
from tokencredit.train_config import TrainConfig
from trl_tiny import build

TINY = {"prompts": 8, "group": 4, "updates": 1, "eval_every": 0, "save_every": 0, "threads": 1, "record_rows": 32}
LABELS = {"every": 2, "prompts": 12, "rollouts": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = TrainConfig(method="learned_credit", steps=3, record_every=1, credit_model=LABELS, **TINY)
    return train(config, tmp_path_factory.mktemp("learned") / "run")


def test_the_model_is_fitted_where_it_is_due_and_the_old_one_is_held_against_the_new_effects(run):
    metrics = run.metrics()
    assert ["learned/rollouts" in m for m in metrics] == [True, False, True]
    assert ["learned/captured" in m for m in metrics] == [False, False, True]
    assert metrics[2]["learned/captured"] < 1.01
    assert all(m["grad_norm"] > 0 for m in metrics)


def test_what_the_labels_sampled_is_spent(run):
    """12 completions, and two rollouts for each of their tokens that has alternatives, beside the 32 rollouts."""
    spent, rows = 0, 32
    for m in run.metrics():
        spent += rows + m.get("learned/rollouts", 0)
        assert m["rollouts"] == spent
        if "learned/rollouts" in m:
            assert 12 + 2 * 12 * 5 < m["learned/rollouts"] <= 12 + 2 * 12 * 48
            assert m["learned/tokens"] > m["learned/rollouts"]


def test_credit_is_what_is_expected_of_the_token_given_the_outcome(run):
    rows = [row for step in range(3) for row in run.tokens(step)]
    assert all(row["credit"] == pytest.approx(row["learned_credit"], abs=1e-6) for row in rows)
    mean = {success: sum(sum(row["credit"]) for row in rows if row["success"] == success) for success in (True, False)}
    assert mean[True] > mean[False]


def test_a_budget_of_rollouts_ends_a_run_by_its_labels_too(tmp_path, run):
    budget = run.metrics()[0]["rollouts"]
    config = TrainConfig(
        method="learned_credit", steps=3, record_every=0, credit_model=LABELS, budget={"rollouts": budget}, **TINY
    )
    assert len(train(config, tmp_path / "run").metrics()) == 1


@pytest.mark.parametrize(
    "changes,told",
    [
        ({"credit_model": {"evry": 2}}, "credit_model has no evry; it has: every, prompts, samples, rollouts"),
        ({"credit_model": {"prompts": 9}}, "credit_model.prompts must be at least 10, got 9"),
        ({"credit_model": {"every": 2}, "method": "grpo"}, "which grpo does not"),
    ],
)
def test_what_cannot_be_learned_is_refused(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        train(TrainConfig(**{"method": "learned_credit", "steps": 1} | TINY | changes), tmp_path / "run")


def test_without_a_task_the_score_has_to_be_given(tmp_path):
    with pytest.raises(ValueError, match="learned_credit: Q − V that a credit model expects, given the outcome"):
        build(CreditTrainer, tmp_path, method="learned_credit")
