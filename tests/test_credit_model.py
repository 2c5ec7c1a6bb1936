"""The credit model: it finds what is planted, on other prompts, says what it has seen, and reads what it wrote."""

import json

import pytest
import torch

from tokencredit.cli import main
from tokencredit.credit_model.evaluate import evaluate
from tokencredit.credit_model.features import SCORES, TokenFeatures
from tokencredit.credit_model.labels import Labels
from tokencredit.credit_model.model import CreditModel
from tokencredit.durable import read_rows

PROMPTS, EACH, WIDTH = 60, 40, 8


def planted(seed, noise=0.05, start=0):
    """Effects whose size is a direction of the last layer's state after the token, and whose sign is the outcome's."""
    generator = torch.Generator().manual_seed(seed)
    num = PROMPTS * EACH
    states = torch.randn(num, 4, WIDTH, generator=generator)
    size = states[:, 3, 0].clamp(min=0.0) * 0.3
    prompt = torch.arange(num) // EACH
    outcome = (torch.arange(num) // 10 % 2).float()
    effect = (2 * outcome - 1) * size
    measured = effect + noise * torch.randn(num, generator=generator)
    scores = torch.randn(num, len(SCORES), generator=generator)
    names = tuple(f"{seed} {start + i}" for i in range(PROMPTS))
    labels = Labels(measured.double(), torch.full((num,), noise, dtype=torch.float64), prompt, names, 7)
    return TokenFeatures(states, scores, outcome), labels, effect


@pytest.fixture(scope="module")
def fitted():
    found, labels, _ = planted(0)
    return CreditModel.fit(found, labels, about={"policy": "planted"})


def test_it_finds_what_is_planted_on_other_prompts(fitted):
    found, labels, effect = planted(1)
    result = evaluate(fitted, found, labels, bootstraps=200)
    captured = {name: figure.value for name, figure in result.captured.items()}
    best = float(effect.square().sort(descending=True).values[: len(effect) // 5].sum() / effect.square().sum())
    assert captured["learned_size"] > 0.95 * best and captured["surprisal"] < 0.4
    assert all(result.difference[name].low > 0.3 for name in ("surprisal", "entropy"))
    assert result.alignment.value > 0.8 and 0.8 < result.calibration.value < 1.25
    assert result.seen == 0 and evaluate(fitted, *planted(0)[:2], bootstraps=50).seen == PROMPTS


def test_noise_alone_teaches_nothing_and_sizes_stay_right_on_average():
    """Labels without any effect: less their own noise they are 0 on average, and so is what is learned."""
    found, labels, _ = planted(2)
    noise = labels.error * torch.randn(len(labels.error), generator=torch.Generator().manual_seed(5)).double()
    model = CreditModel.fit(found, Labels(noise, labels.error, labels.prompt, labels.prompts, 0))
    assert float(model.size(planted(3)[0]).square().mean()) < 0.3 * float(labels.error.square().mean())


def test_no_prompt_is_on_two_sides_and_the_card_counts(fitted):
    assert sum(fitted.card["prompts"].values()) == PROMPTS
    assert sum(fitted.card["tokens"].values()) == PROMPTS * EACH
    assert all(tokens == EACH * fitted.card["prompts"][part] for part, tokens in fitted.card["tokens"].items())


def test_too_few_prompts_are_refused():
    found, labels, _ = planted(0)
    with pytest.raises(ValueError, match="3 prompts are too few"):
        CreditModel.fit(found, Labels(labels.effect, labels.error, labels.prompt % 3, ("a", "b", "c"), 0))


def test_what_is_written_is_what_is_read(tmp_path, fitted):
    fitted.save(tmp_path)
    again, (found, _, _) = CreditModel.load(tmp_path), planted(1)
    assert torch.equal(again.size(found), fitted.size(found)) and torch.equal(again.credit(found), fitted.credit(found))
    assert again.card == json.loads(json.dumps(fitted.card))
    with pytest.raises(ValueError, match="holds no credit model"):
        CreditModel.load(tmp_path / "none")


def test_from_a_run_to_predictions(tmp_path, capsys):
    labels, model, out = tmp_path / "labels", tmp_path / "model", tmp_path / "p.parquet"
    run = ["pivotality", "run", "--samples", "1", "--rollouts", "2"]
    assert main([*run, "--split", "train", "--prompts", "12", "--out", str(labels)]) == 0
    assert main(["credit-model", "fit", str(labels), "--out", str(model)]) == 0
    assert main(["credit-model", "evaluate", str(model), str(labels), "--out", str(tmp_path / "e.json")]) == 0
    assert "prompts made the model" in capsys.readouterr().err.replace("\n", " ")
    assert json.loads((tmp_path / "e.json").read_text())["prompts_seen"] > 0
    assert main(["credit-model", "predict", str(model), "--traces", str(labels), "--out", str(out)]) == 0
    rows, tokens = read_rows(out), read_rows(labels / "tokens.parquet")
    assert [(r["trace"], r["position"]) for r in rows] == [(t["trace"], t["position"]) for t in tokens]
    assert min(row["learned_size"] for row in rows) >= 0
    sized = ["--traces", str(labels), "--rollouts", "2", "--sizes", str(out)]
    assert main(["pivotality", "run", *sized, "--out", str(tmp_path / "sized")]) == 0
    tokens = read_rows(tmp_path / "sized" / "tokens.parquet")
    assert any(row["given_size"] is not None for row in tokens)
    assert main(["pivotality", "run", *sized[2:], "--out", str(tmp_path / "none")]) == 1
    assert "name them with --traces" in capsys.readouterr().err.replace("\n", " ")
