"""`study preference`: what rollouts buy is counted to the last one, and differences are found where there are some."""

import json

import numpy as np
import pytest

from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.studies.book import Book
from tokencredit.studies.preference.figures import blocks
from tokencredit.studies.preference.lots import buy, completions, effects, pivots
from tokencredit.studies.preference.question import ARMS, CONTRASTS, PreferenceConfig
from tokencredit.studies.table import STUDIES

STUDY = STUDIES["preference"]
TINY = {"rollouts": 240, "group": 4, "effect_rollouts": 2, "fresh": 4, "margin": 0.0, "steps": 1, "pairs": 4}


@pytest.fixture(scope="module")
def policy():
    return PreferenceConfig().policy.settled().open()


@pytest.mark.parametrize("make", [completions, effects, pivots])
def test_every_rollout_that_is_sampled_is_counted(policy, make, monkeypatch):
    """Those that complete, those that measure and those that verify: the sampler's own count."""
    config, asked = PreferenceConfig(**TINY), []
    plain = PrefixSampler.continue_

    def counting(self, traces, requests, *more):
        asked.append(len(requests))
        return plain(self, traces, requests, *more)

    monkeypatch.setattr(PrefixSampler, "continue_", counting)
    lots = make(policy, policy.task.rows("train", 10, 0), config, 0)
    assert sum(lot.rollouts for lot in lots) == sum(asked) and len(lots) == 10
    assert any(lot.pairs for lot in lots)


def test_pairs_are_right_against_wrong_and_the_budget_is_kept(policy):
    config = PreferenceConfig(**TINY)
    plain, weighted = (buy(kind, policy, config, 3) for kind in ("completions", "effects"))
    rows = {tuple(policy.encode_rows([row])[0]): row for row in policy.task.rows("train", 240, 3)}
    for pair in plain["pairs"]:
        row = rows[tuple(pair["prompt_ids"])]
        assert policy.verdict(pair["chosen_ids"], row, False).correct
        assert not policy.verdict(pair["rejected_ids"], row, False).correct
    assert plain["rollouts"] == 240 == 4 * plain["prompts"] and weighted["rollouts"] <= 240
    assert 0 < len(weighted["pairs"]) < len(plain["pairs"])
    for mine, theirs in zip(weighted["pairs"], plain["pairs"]):
        assert {name: mine[name] for name in theirs} == theirs, "the first of the same pairs"
        assert len(mine["chosen_before_after"]) == len(mine["chosen_ids"])
        assert np.isfinite(mine["rejected_before_after"]).all() and any(mine["chosen_before_after"])
    one = buy("pivots", policy, config, 3)
    assert one["rollouts"] <= 240 and {len(pair["chosen_ids"]) for pair in one["pairs"]} == {1}


def outcomes(chance, seeds, prompts=128, samples=8, seed=0):
    prompt = np.random.default_rng(0).uniform(-0.1, 0.1, prompts)
    return [
        {
            "correct": np.random.default_rng(100 + 7 * seed + s).binomial(samples, chance + prompt).tolist(),
            "entropy": 0.3,
            "length": 15.0 + s,
        }
        for s in range(seeds)
    ]


def found(chances, seeds=4):
    config = PreferenceConfig(seeds=seeds, samples=8)
    runs = {arm.name: outcomes(chance, seeds, seed=i) for i, (arm, chance) in enumerate(zip(ARMS, chances))}
    lot = {"pairs": [{}] * 9, "rollouts": 4000, "prompts": 500}
    bought = {arm.name: [lot] * seeds for arm in ARMS}
    book = Book("command", 0)
    chosen = {arm.name: 1e-3 for arm in ARMS}
    return blocks(config, outcomes(0.4, 1, seed=9)[0], runs, bought, chosen, {}, book), book.figures


def test_a_difference_is_found_and_its_lack_is_not_resolved():
    result, figures = found([0.5, 0.7, 0.5, 0.5, 0.3])
    verdicts = {(each["arm"], each["other"]): each["verdict"] for each in result["contrasts"]}
    assert set(verdicts) == set(CONTRASTS)
    assert verdicts["dpo_entropy", "dpo"] == "better" and verdicts["pivots", "dpo"] == "worse"
    assert verdicts["dpo_pivotal", "dpo"] == verdicts["dpo_pivotal", "dpo_few"] == "not resolved"
    assert figures["difference/dpo_entropy less dpo"].low < 0.2 < figures["difference/dpo_entropy less dpo"].high
    assert figures["gain/dpo"].sign == 1 and figures["gain/pivots"].sign == -1
    assert "dpo_entropy less dpo: +0." in result["findings"][0] and "better" in result["findings"][0]


def test_one_seed_gives_no_verdict():
    result, _ = found([0.4, 0.7, 0.4, 0.4, 0.1], seeds=1)
    assert {each["verdict"] for each in result["contrasts"]} == {"not resolved"}
    assert any("One seed" in finding for finding in result["findings"])
    assert any(
        "Not told from the untrained policy" in finding and "dpo_few" in finding for finding in result["findings"]
    )


@pytest.mark.parametrize(
    "wrong, flag",
    [
        ({"group": 1}, "--group"),
        ({"rollouts": 4}, "--rollouts"),
        ({"rates": ()}, "--rates"),
        ({"margin": 1.0}, "--margin"),
    ],
)
def test_what_cannot_be_asked_is_refused(wrong, flag):
    with pytest.raises(ValueError, match=flag):
        PreferenceConfig(**wrong)


def test_the_study_runs_goes_on_and_is_shown(tmp_path, capsys):
    """The whole of it, as small as can be; a second command reads what is stored."""
    from tokencredit.cli import main

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = ["study", "preference", "--out", str(tmp_path / "p"), *flags, "--seeds", "1", "--prompts", "8"]
    command += ["--samples", "1", "--rates", "0.001", "0.003"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "dpo_entropy" in shown and "(untrained)" in shown and "not resolved" in shown
    result = json.loads((tmp_path / "p" / "result.json").read_text())
    assert {arm["name"] for arm in result["arms"]} == {arm.name for arm in ARMS} and result["prompts"] == 8
    assert all(sum(arm["spent"]) <= 240 for arm in result["arms"])
    page = (tmp_path / "p" / "report.html").read_text()
    assert "Preference pairs at equal rollouts" in page and "Learning rates" in page
    assert main(command) == 0
    again = json.loads((tmp_path / "p" / "result.json").read_text())
    assert again["figures"] == result["figures"] and again["seconds"] == result["seconds"]
