"""The truth of tokens: its gradients against finite differences of the trees, its judge against planted estimators."""

import json

import numpy as np
import pytest
import torch

from tokencredit.cli import main
from tokencredit.durable import read_rows, write_parquet
from tokencredit.lm.policy import PolicyConfig
from tokencredit.pivotality.exact import policy_forest
from tokencredit.truth.estimates import Estimates, read_estimates
from tokencredit.truth.goals import known_goals
from tokencredit.truth.judge import PIVOTAL, KnownTruth, judge
from tokencredit.truth.table import OF_GRADIENTS, TRUTHS

EPS = 1e-3


@pytest.fixture(scope="module")
def policy():
    found = PolicyConfig("reckon").settled().open()
    found.model.double()
    return found


def grown(policy, prompts, rows):
    return policy_forest(policy, rows, prompts, eps=EPS)


def test_gradients_of_the_goals_are_those_of_the_trees(policy):
    """Along a direction, against a difference of the goals of the trees, while they hold the same prefixes."""
    rows = policy.task.rows("test", 2, 1)
    prompts = policy.encode_rows(rows)
    trees = grown(policy, prompts, rows)
    known = known_goals(policy, prompts, trees)
    step = 1e-5
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    direction = {name: g + 10 * known.entropy_gradient[name] for name, g in known.reward_gradient.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            for name, p in parameters.items():
                p.copy_(before[name] + sign * step * direction[name])
            moved = grown(policy, prompts, rows)
            for tree, other in zip(trees, moved):
                assert np.array_equal(tree.prefixes().token, other.prefixes().token)
            ends.append([moved, known_goals(policy, prompts, moved)])
        for name, p in parameters.items():
            p.copy_(before[name])
    for goal in ("reward", "entropy"):
        gradient = getattr(known, f"{goal}_gradient")
        along = float(sum((gradient[name] * direction[name]).sum() for name in direction))
        difference = (getattr(ends[0][1], goal) - getattr(ends[1][1], goal)) / (2 * step)
        assert along == pytest.approx(difference, rel=5e-3), goal


TOKENS = 400


@pytest.fixture
def truth():
    """Two tokens in a hundred decide; prompts of ten tokens."""
    rng = np.random.default_rng(0)
    effect = np.where(rng.random(TOKENS) < 0.1, rng.choice([-0.5, 0.4], TOKENS), 0.02 * rng.standard_normal(TOKENS))
    known = {name: np.abs(rng.standard_normal(TOKENS)) for name in TRUTHS} | {"before_after": effect}
    places = [(i // 10, i % 10) for i in range(TOKENS)]
    return KnownTruth(places, np.arange(TOKENS) // 20, known)


def judged(truth, values, bounds=None):
    return {
        each.column: {name: figure.value for name, figure in each.figures.items()}
        for each in judge(truth, Estimates("planted", values, bounds or {}), bootstraps=200)
    }


def test_the_truth_itself_is_without_fault(truth):
    effect = truth.known["before_after"]
    found = judged(truth, {"before_after": effect}, {"before_after": (effect - 0.1, effect + 0.1)})["before_after"]
    assert (found["bias"], found["error"], found["coverage"], found["precision"]) == (0, 0, 1, 1)
    pivotal = np.abs(effect) >= PIVOTAL
    assert found["captured"] == pytest.approx((np.sort(effect**2)[-TOKENS // 5 :]).sum() / (effect**2).sum())
    assert 0 < pivotal.mean() < 0.2


def test_faults_are_found_and_have_their_size(truth):
    effect, rng = truth.known["before_after"], np.random.default_rng(1)
    noise = 0.3 * rng.standard_normal(TOKENS)
    half = 1.96 * 0.3
    noisy = effect + 0.05 + noise
    found = judged(truth, {"before_after": noisy}, {"before_after": (noisy - half, noisy + half)})["before_after"]
    assert found["bias"] == pytest.approx(0.05 + noise.mean())
    assert found["error"] == pytest.approx(np.sqrt(((0.05 + noise) ** 2).mean()))
    assert found["coverage"] == pytest.approx((np.abs(0.05 + noise) <= half).mean())
    assert 0.1 < found["precision"] < 0.9
    blind = judged(truth, {"chance": rng.random(TOKENS)})["chance"]
    assert blind.keys() == {"precision", "captured"} and blind["precision"] < 0.3
    few = np.where(np.arange(TOKENS) % 2 == 0, effect, np.nan)
    halved = judged(truth, {"before_after": few})["before_after"]
    assert halved["bias"] == 0 and halved["precision"] < 1


def test_estimates_come_by_token_by_completion_and_with_standard_errors(tmp_path):
    places = [(0, 0), (0, 1), (1, 0)]
    tokens = [{"trace": t, "position": p, "replace": 0.5, "replace_standard_error": 0.1} for t, p in places[::-1]]
    write_parquet(tmp_path / "tokens.parquet", tokens)
    found = read_estimates(tmp_path / "tokens.parquet", places, spent=7)
    assert found.values.keys() == {"replace"} and found.spent == 7
    assert np.allclose(found.bounds["replace"], [[0.5 - 0.1959964] * 3, [0.5 + 0.1959964] * 3])
    lines = [{"entropy": [1.0, 2.0], "tokens": ["a", "b"]}, {"entropy": [3.0], "tokens": ["c"]}]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_estimates(tmp_path / "lists.jsonl", places).values["entropy"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"trace": 0, "position": 9, "x": 1.0}], "no token 9 in trace 0"),
        ([{"trace": 0, "position": 0, "x": 1.0}] * 2, "stands there twice"),
        ([{"trace": 0, "position": 0, "x": "high"}], "no column of numbers"),
        ([{"position": 0, "x": 1.0}], "needs trace and position"),
        ([{"x": [1.0]}] * 5, "5 rows without a column trace, for 2 completions"),
    ],
)
def test_estimates_that_fit_nothing_are_refused(tmp_path, rows, message):
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_estimates(tmp_path / "e.jsonl", [(0, 0), (1, 0)])


def test_from_the_truth_to_the_judgement_of_a_run(tmp_path, capsys):
    """The commands of the documentation, small: effects add up along a completion, a run on the truth's completions
    estimates them, and scores are judged beside it."""
    here = tmp_path / "truth"
    assert main(["world", "truth", "--out", str(here), "--prompts", "3", "--eps", "1e-4"]) == 0
    rows, traces = read_rows(here / "truth.parquet"), read_rows(here / "traces.parquet")
    for trace in traces:
        own = [row for row in rows if row["trace"] == trace["trace"]]
        total = trace["reward"] - own[0]["value"]
        assert sum(row["before_after"] for row in own) == pytest.approx(total, abs=0.1)
    run = tmp_path / "run"
    assert main(["pivotality", "run", "--traces", str(here), "--rollouts", "4", "--out", str(run)]) == 0
    out = tmp_path / "judged.json"
    columns = ["before_after", "replace", "entropy"]
    assert main(["world", "judge", str(here), str(run), "--columns", *columns, "--out", str(out)]) == 0
    found = {each["column"]: each for each in json.loads(out.read_text())["judgements"]}
    assert found["before_after"]["spent"] > 0 and found["before_after"]["figures"]["error"]["value"] < 0.3
    assert "entropy" in capsys.readouterr().out
    few = tmp_path / "few"
    made = ["--out", str(few), "--prompts", "3", "--eps", "1e-4", "--no-gradients"]
    assert main(["world", "truth", *made]) == 0
    without, whole = (KnownTruth.read(folder) for folder in (few, here))
    assert whole.known.keys() - without.known.keys() == set(OF_GRADIENTS)
    assert all(np.array_equal(x, whole.known[name], equal_nan=True) for name, x in without.known.items())
    norm = Estimates("norms", {"gradient_norm": whole.known["gradient_norm"]}, {})
    assert "error" in judge(whole, norm)[0].figures and "error" not in judge(without, norm)[0].figures
    assert main(["world", "judge", str(tmp_path), str(run)]) == 1
    assert "holds no truth" in capsys.readouterr().err
