"""An inspection of a log: its counts by hand, its figures where the answer is planted, its parts on a log of the
embedded world, and what each says where something is missing.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from tokencredit.cli import main
from tokencredit.durable import read_json, read_rows
from tokencredit.dynamics.attribution import LengthGoal, outcome_weights
from tokencredit.dynamics.entropy import entropy_terms
from tokencredit.dynamics.update import coefficients_of
from tokencredit.figure import Figure
from tokencredit.lm.policy import PolicyConfig
from tokencredit.logs import LoggedRollout
from tokencredit.methods import METHODS
from tokencredit.rollouts import Rollouts
from tokencredit.runs import Run
from tokencredit.stats import difference_of_units
from tokencredit.studies.book import Book
from tokencredit.studies.inspect.audit import Audited, affordable, audit_block, task_rows
from tokencredit.studies.inspect.credit import LOGGED, credit_block, credits, disagreements
from tokencredit.studies.inspect.mismatch import log_ratios, mismatch_block
from tokencredit.studies.inspect.overview import correlation, overview
from tokencredit.studies.inspect.pair import moved_tokens, pair_block, partings
from tokencredit.studies.inspect.question import STUDY, InspectConfig
from tokencredit.studies.inspect.sample import step_of_rollouts
from tokencredit.studies.inspect.source import Missing
from tokencredit.studies.inspect.study import PARTS
from tokencredit.studies.inspect.survey import Survey, choose, collect, survey
from tokencredit.studies.inspect.verdict import p_value, verdict
from tokencredit.studies.inspect.words import changed_words
from tokencredit.tasks.given import Given
from tokencredit.tasks.reckon import Reckon


def rollout(prompt="p", completion="a b", reward=0.0, step=1, place="log, row 1", **more):
    return LoggedRollout(prompt=prompt, completion=completion, reward=reward, place=place, step=step, **more)


def book():
    return Book("command", 0)


def test_the_counts_of_a_small_log_are_those_by_hand():
    log = [
        rollout("p", "a", 1.0, truncated=False, tokens={"entropy": [1.0, 2.0]}),
        rollout("p", "a", 0.0, truncated=True, tokens={"entropy": [3.0, None]}),
        rollout("q", "b b", 1.0),
        rollout("q", "b c", 1.0),
        rollout("p", "a", None, step=2),
    ]
    found = survey(log, success_above=0.5)
    counts = {name: x.tolist() for name, x in found.counts.items()}
    assert counts["step"] == [1, 1, 2] and counts["rollouts"] == [2, 2, 1] and counts["rewarded"] == [2, 2, 0]
    assert counts["success"] == [1, 2, 0] and counts["distinct"] == [1, 2, 1]
    assert counts["known_cut"] == [2, 0, 0] and counts["cut"] == [1, 0, 0]
    assert counts["entropy"] == [6.0, 0, 0] and counts["entropy_tokens"] == [3, 0, 0]
    assert counts["prompt"][0] == counts["prompt"][2] != counts["prompt"][1]
    assert found.unit == "characters" and found.about["rollouts"] == 5
    again = Survey.of_arrays(found.arrays(), found.about)
    assert all(np.array_equal(again.counts[name], x) for name, x in found.counts.items())


def test_an_empty_log_is_refused():
    with pytest.raises(ValueError, match="no rollout"):
        survey([])


def planted(steps=8, groups=10, size=4, seed=0):
    """A log whose entropy falls by 0.1 a step, whose format reward has nothing to do with the answer's, and of which
    three groups in ten have no signal.
    """
    rng, log = np.random.default_rng(seed), []
    for step in range(steps):
        for k in range(groups):
            for i in range(size):
                right = float(k >= 3 and i < 2)
                tokens = {"entropy": [2 - 0.1 * step + 0.01 * rng.normal()] * 3, "advantage": [right - 0.5] * 3}
                word = "late" if step >= steps - 2 else "early"
                shape = float(rng.random() < 0.5)
                log.append(
                    rollout(
                        f"prompt {step} {k}",
                        f"x {word} {i} {rng.random()}",
                        right,
                        step,
                        f"log, row {len(log) + 1}",
                        tokens=tokens,
                        rewards={"answer": right, "format": shape},
                        completion_ids=[1, 2, 3],
                        others={"tokens": ["x", f" {word}", f" {i}"]},
                    )
                )
    return log


def test_what_is_planted_in_a_log_is_found_and_nothing_else():
    figures = book()
    block = overview(survey(planted()), figures)
    known = figures.figures
    silent = known[block["totals"]["groups without signal"]]
    assert silent.value == pytest.approx(0.3) and silent.low < 0.3 < silent.high
    fall = known[block["trends"]["entropy"]]
    assert fall.value == pytest.approx(-0.6, abs=0.02) and fall.high < 0
    assert known[block["trends"]["pass rate"]].sign == 0
    assert block["totals"].keys() == {
        "pass rate",
        "reward",
        "groups without signal",
        "length",
        "repeated completions",
        "entropy",
    }
    assert known[block["totals"]["length"]].value == 3 and known[block["totals"]["length"]].unit == "tokens"
    [agreement] = block["agreement"]
    assert known[agreement["figure"]].sign == 0
    assert block["curves"]["entropy"]["step"] == list(range(8))


def test_a_correlation_of_columns_is_numpys():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5))
    y = x + rng.normal(size=(40, 5))
    sums = [np.full(40, 5.0), *(each.sum(1) for each in (x, y, x * x, y * y, x * y))]
    found = correlation(np.stack(sums, 1))
    assert found.value == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert found.low < found.value < found.high
    assert correlation(np.stack([*sums[:1], sums[1] * 0, *sums[2:3], sums[3] * 0, *sums[4:5], sums[5] * 0], 1)) is None


def test_a_difference_of_unpaired_units_is_scipys():
    from scipy import stats

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=12), rng.normal(1, 3, size=7)
    found = difference_of_units(x, y)
    low, high = stats.ttest_ind(x, y, equal_var=False).confidence_interval()
    assert (found.low, found.high, found.value) == pytest.approx((low, high, x.mean() - y.mean()))
    with pytest.raises(ValueError, match="two units of either side"):
        difference_of_units([1.0], [1.0, 2.0])


def test_other_prompts_are_other_prompts():
    log = [
        rollout(f"prompt {k}", f"{i}", step=step) for step in range(6) for k in range(step % 2 * 2, 4) for i in range(2)
    ]
    counted = survey(log)
    choice = choose(counted, step=3, prompts=3, spread=4, each=1)
    assert choice.focus == 3 and set(choice.groups) == {3}
    own = {each.prompt for each in log if each.step == 3}
    near = collect(log, frozenset().union(*choice.near.values()))
    assert near and all(each.prompt not in own for some in near.values() for each in some)
    assert all(3 not in part for part in (choice.near, choice.others))
    with pytest.raises(ValueError, match="--step 17: the log has no such step; it has 6"):
        choose(counted, step=17)


def test_words_that_appear_and_vanish():
    log = planted()
    steps = [step_of_rollouts(s, [each for each in log if each.step == s], None) for s in (0, 1, 6, 7)]
    figures = book()
    found = changed_words(steps[:2], steps[2:], figures)
    assert {each["token"] for each in found} == {"late", "early"}
    late = next(each for each in found if each["token"] == "late")
    assert (late["early"], late["late"]) == (0.0, pytest.approx(1.0))
    assert changed_words(steps[:1], steps[:1], figures) == []


def test_credit_against_the_outcome_is_found_with_its_lines():
    log = [each for each in planted() if each.step == 7]
    wrong = log[12]
    log[12] = replace(wrong, tokens={**wrong.tokens, "advantage": [-x for x in wrong.tokens["advantage"]]})
    step, figures = step_of_rollouts(7, log, None), book()
    found, left_out = credits([step], [METHODS["grpo"], METHODS["gtpo"]])
    assert list(found[0]) == [LOGGED, "grpo", "gtpo"] and not left_out
    block = credit_block([step], found, figures, 200, 0)
    logged = block["methods"][LOGGED]
    assert figures.figures[logged["against the outcome"]].value == pytest.approx(1 / 40)
    assert figures.figures[block["methods"]["grpo"]["against the outcome"]].value == 0
    assert [each["place"] for each in disagreements(step, found[0][LOGGED])] == [wrong.place]


def test_a_method_without_its_scores_is_left_out_and_says_so():
    log = [replace(each, tokens={"advantage": each.tokens["advantage"]}) for each in planted(steps=1)]
    found, left_out = credits([step_of_rollouts(0, log, None)], [METHODS["gtpo"]])
    assert list(found[0]) == [LOGGED] and "entropy" in left_out["gtpo"]


# Stopping with probability 1/2 at each of at most three tokens: E[T] = 1 + q + q², q = 1 − σ(θ), so that
# d E[T] / dθ = −(1 + 2q) q (1 − q) = −1/2. The eight rollouts of a prompt are the enumeration; d log π / dθ is 1/2 for
# stopping and −1/2 for going on.
LENGTHS = (1, 1, 1, 1, 2, 2, 3, 3)


def test_the_gradient_of_the_length_is_that_of_an_enumerated_policy():
    lengths = torch.tensor(LENGTHS * 2)
    mask = torch.arange(3) < lengths[:, None]
    stops = torch.zeros(16, 3, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        stops[row, length - 1] = True
    stops[7, 2] = stops[15, 2] = False  # one of the two of length 3 is cut at the limit
    slope = torch.where(stops, 0.5, -0.5).double()
    rollouts = Rollouts(
        reward=torch.zeros(16),
        group=torch.arange(16) // 8,
        mask=mask,
        scores={"entropy": mask.float(), "logprob": -mask.float()},
    )
    batch = type("B", (), {"rollouts": rollouts, "num_prompts": 2, "__len__": lambda self: 16})()
    goal = LengthGoal.of(batch, None)
    assert float((goal.weights.logprob * slope).sum()) == pytest.approx(-0.5)
    # The third term of the gradient of mean entropy is the same thing, times −H / E[T].
    term = entropy_terms(batch)["length"].logprob
    assert torch.allclose(term, -goal.weights.logprob * 16 / mask.sum())


def test_the_gradient_of_any_outcome_is_the_rewards():
    rollouts = Rollouts(
        reward=torch.tensor([1.0, 0, 1, 0]), group=torch.tensor([0, 0, 1, 1]), mask=torch.ones(4, 2).bool()
    )
    batch = SimpleNamespace(rollouts=rollouts)
    assert outcome_weights(batch, torch.tensor([0.0, 1, 0, 0])).logprob[:, 0].tolist() == [-0.25, 0.25, 0, 0]


def test_logged_credit_goes_into_the_loss_as_a_methods_own_does():
    rollouts = Rollouts(
        reward=torch.tensor([1.0, 0, 1, 1]),
        group=torch.tensor([0, 0, 1, 1]),
        mask=torch.ones(4, 3).bool(),
        scores={"logprob": -torch.ones(4, 3)},
    )
    own, credit = coefficients_of(METHODS["grpo"], rollouts)
    given, _ = coefficients_of(METHODS["grpo"], rollouts, credit)
    assert torch.equal(own, given) and own.any()


def effects(num=40, seed=0):
    """An audit whose effects are known exactly, of four completions."""
    rng = np.random.default_rng(seed)
    effect = np.where(rng.random(num) < 0.3, rng.choice([-0.5, 0.4], num), 0.0)
    trace = np.repeat(np.arange(4), num // 4)
    position = np.tile(np.arange(num // 4), 4)
    return Audited(
        np.arange(4),
        trace,
        position,
        trace,
        effect,
        np.zeros(num),
        effect - 0.01,
        effect + 0.01,
        np.abs(effect) > 0.1,
        7,
    )


def grid(audited, values):
    found = torch.zeros(4, 10, dtype=torch.float64)
    found[torch.from_numpy(audited.trace), torch.from_numpy(audited.position)] = torch.from_numpy(values)
    return found


def of_text():
    return step_of_rollouts(
        3, [rollout(f"p{i}", " ".join("abcdefghij"), i % 2, place=f"row {i}") for i in range(4)], None
    )


def test_an_audit_of_the_truth_finds_no_mistake_and_of_its_opposite_nothing_else():
    a, step, figures = effects(), of_text(), book()
    credits_of = {"logged": grid(a, -a.effect), "right": grid(a, a.effect), "even": torch.ones(4, 10)}
    block = audit_block(a, step, credits_of, {}, figures, 200, 0)
    known = figures.figures
    assert known[block["explained"]["right"]].value == known[block["explained"]["logged"]].value == pytest.approx(1)
    assert known[block["reached"]["even"]].value == known[block["reached"]["chance"]].value == pytest.approx(0.2)
    assert known[block["signs"]["right"]].value == 0 and known[block["signs"]["logged"]].value == 1
    best = np.sort(a.effect**2)[::-1]
    assert known[block["reached"]["right"]].value == pytest.approx(best[:8].sum() / best.sum(), abs=0.02)
    assert len(block["mistakes"]) == 10 and block["of"] == "logged"
    worst = block["mistakes"][0]
    assert abs(worst["effect"][0]) == np.abs(a.effect).max() and worst["effect"][0] * worst["credit"] < 0
    row, at = int(worst["place"][-1]), worst["position"]
    assert worst["token"].strip() == "abcdefghij"[at] and a.effect[10 * row + at] == worst["effect"][0]


def test_effects_that_are_noise_alone_are_not_resolved():
    a = replace(effects(), error=np.full(40, 0.5))
    block = audit_block(a, of_text(), {"logged": grid(a, a.effect)}, {}, book(), 200, 0)
    assert not block["resolved"] and not block["reached"] and not block["mistakes"]


def test_the_audit_takes_what_it_can_afford():
    assert affordable([4, 100, 4], 8, 200) == [0, 2]
    with pytest.raises(Missing, match=r"raise --tokens, or lower --rollouts"):
        affordable([40, 100], 8, 200)


def test_rows_come_from_the_task_or_from_the_logged_answers():
    [known, unknown] = task_rows(Reckon(), [rollout("<bos> 3 + 4 * 2 ="), rollout("three plus four")])
    assert known["answer"] == "1" and unknown is None
    assert task_rows(Given(), [rollout("p", answer="7", others={"kind": "x"})]) == [
        {"prompt": "p", "answer": "7", "kind": "x"}
    ]
    assert task_rows(Given(), [rollout("p")]) == [None]
    assert Given().verify(r"so \boxed{7}", {"answer": "7"}).correct
    with pytest.raises(ValueError, match="nothing to verify with"):
        Given().verify("7", {})


def with_logprobs(factor, share, steps=(0, 1)):
    """Rollouts of which a share of the tokens is `factor` times as probable to the trainer as to the sampler."""
    found = []
    for step in steps:
        logged = []
        for i in range(12):
            d = np.where(np.arange(20) < share * 20, np.log(factor), 0.0)
            tokens = {"sampler_logprob": [-1.0] * 20, "trainer_logprob": (d - 1.0).tolist()}
            logged.append(rollout(f"p{i % 4}", "x", i % 2, step, tokens=tokens, completion_ids=[0] * 20))
        found.append(step_of_rollouts(step, logged, None))
    return found


def test_a_mismatch_that_was_planted_is_measured():
    steps, figures = with_logprobs(3.0, 0.25), book()
    found, whose = log_ratios(steps)
    block = mismatch_block(steps, steps[1], found, None, figures, 200, 0)
    known = figures.figures
    assert whose == "log"
    assert known[block["kl"]].value == pytest.approx(0.25 * (3 - 1 - np.log(3)))
    shares = {factor: known[name].value for factor, name in block["beyond"].items()}
    assert shares == {"1.2": pytest.approx(0.25), "2": pytest.approx(0.25), "10": 0.0}
    assert known[block["position"][0]].value > 0 == known[block["position"][4]].value
    assert block["sequences"] == pytest.approx(1) and [each["step"] for each in block["steps"]] == [0, 1]


def test_a_mismatch_needs_both_log_probs():
    steps = with_logprobs(1.0, 0.0)
    with pytest.raises(Missing, match="no log-probs of the sampler"):
        log_ratios([of_text()])
    for step in steps:
        for each in step.encoded.logged:
            each.tokens.pop("trainer_logprob")
    with pytest.raises(Missing, match="--model CKPT"):
        log_ratios(steps)


def sides(shift):
    """Two logs of the same prompts: after, one token is more probable by `shift`, and half of the prompts are won."""
    both = []
    for after in (False, True):
        logged = []
        for k in range(12):
            for i in range(2):
                first = -1.0 + (shift + 0.01 * k if after else 0.0)
                tokens = {"sampler_logprob": [first, -2.0]}
                right = float(after and k % 2)
                pieces = ["go", " well" if after else " on"]
                logged.append(
                    rollout(
                        f"p{k}",
                        "x",
                        right,
                        0,
                        f"row {k} {i}",
                        tokens=tokens,
                        completion_ids=[5, 6 + after],
                        others={"tokens": pieces},
                    )
                )
        both.append(logged)
    return both


def test_two_logs_are_compared_prompt_by_prompt():
    before, after = sides(0.7)
    figures = book()
    block = pair_block(survey(before), survey(after), figures)
    known = figures.figures
    assert known[block["changes"]["pass rate"]].value == pytest.approx(0.5)
    assert known[block["flips"]["won"]].value == pytest.approx(0.5) and known[block["flips"]["lost"]].value == 0
    steps = [step_of_rollouts(0, logged, None) for logged in (before, after)]
    [token] = moved_tokens(*steps, figures)
    assert token["token"] == "go" and known[token["figure"]].value == pytest.approx(0.755)
    found = partings(*steps)
    assert found[0]["common"] == "go" and (found[0]["before"], found[0]["after"]) == (" on", " well")
    assert found[0]["success"] == [False, True] and found[-1]["success"] == [False, False]


def test_logs_without_common_prompts_are_not_compared():
    before, after = sides(0.0)
    with pytest.raises(Missing, match="share 0 prompts"):
        pair_block(survey(before), survey([replace(each, prompt=f"{each.prompt}!") for each in after]), book())


def test_a_finding_is_said_where_it_is_resolved_among_all_that_could_be():
    clear, weak = Figure(1.0, 0.9, 1.1, "nats per token", 9), Figure(1.0, 0.1, 1.9, "tokens", 9)
    names = ("entropy", "length", "reward", "pass rate")
    figures = dict(zip(names, (clear, weak, weak, Figure(1.0, -1.0, 3.0, "share", 9))))
    block = {"totals": {}, "trends": {name: name for name in names}, "quarters": [[1, 2], [8, 9]], "words": []}
    block["groups"] = 9
    assert p_value(weak) == pytest.approx(2 * norm.sf(norm.ppf(0.975) / 0.9)) and p_value(Figure(2.0, 2.0, 2.0)) == 0
    [said] = verdict({"log": block}, figures)
    assert said["said"] == "Entropy rose from steps 1–2 to 8–9 by 1 [0.9, 1.1] nats per token."
    assert said["figures"] == ["entropy"] and said["part"] == "log"
    alone = {**block, "trends": {"length": "length"}}
    assert len(verdict({"log": alone}, figures)) == 1
    assert verdict({"log": {**alone, "groups": 7}}, figures) == []


# The whole command, without a model and with one, on a log of the embedded world.


@pytest.fixture(scope="module")
def policy():
    return PolicyConfig().open()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of stock TRL's table of completions, the ids that its reward function saw by step): three steps on
    the embedded world, the first of them sampled by the base model.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tokencredit.lm.load import load_model, load_tokenizer
    from tokencredit.tasks.reckon import model_path

    task, out, seen = Reckon(), tmp_path_factory.mktemp("trl"), []

    def reward(prompts, completions, completion_ids, **_):
        seen.append([list(ids) for ids in completion_ids])
        return [float(task.verify(text, task.row_of(prompt)).correct) for prompt, text in zip(prompts, completions)]

    arguments = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=48,
        num_generations=6,
        max_completion_length=48,
        learning_rate=1e-3,
        max_steps=3,
        logging_steps=1,
        log_completions=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    rows = {row["prompt"]: row for row in task.rows("train", 80, 5)}
    tokenizer = load_tokenizer(str(model_path()))
    trainer = GRPOTrainer(
        model=load_model(str(model_path())),
        processing_class=tokenizer,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in rows]),
    )
    trainer.train()
    return out / "completions", dict(enumerate(seen, start=1))


@pytest.fixture(scope="module")
def trl_log(trained):
    return trained[0]


@pytest.fixture(scope="module")
def sampled(trained):
    """The same rollouts with their ids."""
    folder, seen = trained
    table = [row for path in sorted(folder.glob("*.parquet")) for row in read_rows(path)]
    for step, ids in seen.items():
        for row, own in zip([row for row in table if row["step"] == step], ids, strict=True):
            row["ids"] = own
    return table


SMALL = dict(prompts=6, tokens=6000, rollouts=6, bootstraps=200, methods=("gtpo",))


@pytest.fixture(scope="module")
def inspected(trl_log, tmp_path_factory):
    config = InspectConfig(logs=(str(trl_log),), policy=PolicyConfig(), step=1, optimizer="sgd", **SMALL)
    out = tmp_path_factory.mktemp("inspected")
    return STUDY.run(config, out / "a", command="tokencredit inspect"), out / "a"


def test_a_log_of_the_embedded_world_is_answered_in_every_part(inspected):
    result, out = inspected
    assert result["parts"].keys() == {"log", "credit", "audit", "autopsy"}
    assert result["skipped"].keys() == {"mismatch", "pair"}
    figures = result["figures"]
    credit, audit, autopsy = (result["parts"][name] for name in ("credit", "audit", "autopsy"))
    assert figures[credit["methods"]["grpo"]["cosine with the logged"]].value == pytest.approx(1, abs=1e-4)
    assert audit["agrees"] == 1 and audit["of"] == "logged" and audit["resolved"]
    assert audit["generated"] < 2 * SMALL["tokens"]
    assert not autopsy["optimistic"] and autopsy["evaluation"]["prompts"] == 6
    assert autopsy["goals"].keys() >= {"entropy", "reward", "length"}
    for name, goal in autopsy["goals"].items():
        parts = {part: figures[key].value for part, key in goal["parts"].items()}
        assert parts["total"] == pytest.approx(parts["momentum"] + parts["decay"] + parts["tokens"])
        assert parts["tokens"] == pytest.approx(parts["successes"] + parts["failures"], rel=1e-4), name
        assert all(each["figure"] == f"autopsy/{name}/token {each['token']!r}" for each in goal["types"])
    excess = figures["checkpoint/excess surprisal"]
    assert excess.low < 0 < excess.high
    written = Run.open(out).tokens(1)
    audited = [row for row in written if np.isfinite(row["Q − V"]).all()]
    assert len(audited) >= audit["completions"] > 0
    assert {"credit", "credit of grpo", "credit of gtpo", "change of entropy", "change of length"} <= written[0].keys()


def test_the_page_opens_with_the_tokens_then_the_verdict(inspected):
    result, out = inspected
    titles = [section.title for section in STUDY.sections(out)]
    assert titles[:3] == ["Tokens", "Verdict", "What is in the log"]
    assert {"Is the credit right?", "What the update does", "Other methods on the same step"} <= set(titles)
    page = STUDY.write_page(out).read_text()
    assert len(page) < 1_000_000 and "two logs are compared where two are named" in page
    for each in result["verdict"]:
        assert all(name in result["figures"] for name in each["figures"]) and each["part"] in result["parts"]


def test_the_same_rollouts_in_our_own_run_directory_say_the_same(sampled, policy, inspected, tmp_path):
    """From ids and credit per token, where TRL's table has text and advantages."""
    run = Run.create(
        tmp_path / "run",
        name="r",
        method="",
        method_name="grpo",
        task="reckon",
        model="reckon",
        config={},
        seed=0,
        command="c",
    )
    for step in (1, 2, 3):
        own = [row for row in sampled if row["step"] == step]
        names = {row["prompt"]: k for k, row in enumerate(own)}
        rows = [
            {
                "group": names[row["prompt"]],
                "prompt": row["prompt"],
                "completion": row["completion"],
                "reward": row["reward"],
                "success": row["reward"] > 0,
                "token_ids": row["ids"],
                "tokens": policy.tokens(row["ids"]),
                "credit": [row["advantage"]] * len(row["ids"]),
            }
            for row in own
        ]
        run.write_tokens(step, rows)
    config = InspectConfig(
        logs=(str(tmp_path / "run" / "tokens"),), policy=PolicyConfig(), step=1, optimizer="sgd", **SMALL
    )
    own = STUDY.run(config, tmp_path / "own")
    other, _ = inspected
    for part in ("credit", "audit", "autopsy"):
        assert own["parts"][part].keys() == other["parts"][part].keys()
    names = [name for name in other["figures"] if name.startswith(("audit/", "credit/", "autopsy/"))]
    assert len(names) > 60
    assert {name for name in names if not same(own["figures"][name], other["figures"][name])} == set()


def same(one: Figure, other: Figure) -> bool:
    return bool(np.allclose([one.value, one.num], [other.value, other.num], rtol=1e-3, atol=1e-6, equal_nan=True))


def test_each_part_can_be_asked_alone_and_goes_on_where_others_were(trl_log, tmp_path, capsys):
    assert (
        main(["inspect", str(trl_log), "--parts", "credit", "--out", str(tmp_path / "a"), "--bootstraps", "100"]) == 0
    )
    told = capsys.readouterr().out
    assert "Credit on" in told and "gtpo needs the scores entropy" in " ".join(told.split())
    assert read_json(tmp_path / "a" / "result.json")["parts"].keys() == {"credit"}
    assert main(["inspect", str(trl_log), "--out", str(tmp_path / "a"), "--bootstraps", "100"]) == 0
    result = read_json(tmp_path / "a" / "result.json")
    assert result["parts"].keys() == {"log", "credit"}
    assert "--model CKPT" in result["skipped"]["audit"] and "--model CKPT" in result["skipped"]["autopsy"]
    assert set(PARTS) == {*result["parts"], *result["skipped"]}


def test_a_log_that_went_on_is_another(trl_log, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    row = {"prompt": "p", "completion": "<script>alert(1)</script>", "reward": 1.0}
    log.write_text("".join(json.dumps({**row, "reward": float(i % 2)}) + "\n" for i in range(8)))
    arguments = ["inspect", str(log), "--out", str(tmp_path / "a"), "--bootstraps", "100"]
    assert main(arguments) == 0
    assert "<script>alert" not in (tmp_path / "a" / "report.html").read_text()
    log.write_text(log.read_text() + json.dumps(row) + "\n")
    assert main(arguments) == 1
    assert "already holds a different run" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_have_written_the_log_is_found(tmp_path, capsys):
    """By the round trip of the text; by the probability of the tokens; and where there is nothing to verify with."""
    foreign = [{"prompt": "<bos> 1 + 2 =", "completion": f"hello world {i}", "reward": float(i % 2)} for i in range(6)]
    log = tmp_path / "foreign.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in foreign))
    assert main(["inspect", str(log), "--model", "reckon", "--out", str(tmp_path / "a")]) == 1
    assert "not the one that wrote this log" in " ".join(capsys.readouterr().err.split())
    rng = np.random.default_rng(0)
    words = [
        {
            "prompt": f"<bos> {k} + 2 * 3 =",
            "completion": " ".join(rng.choice(list("0123456789+-*"), 12)),
            "reward": float(i % 2),
        }
        for k in range(4)
        for i in range(4)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in words))
    config = InspectConfig(logs=(str(log),), policy=PolicyConfig(), **SMALL)
    result = STUDY.run(config, tmp_path / "b")
    for part in ("audit", "autopsy"):
        assert "another model, tokenizer, prompt format" in result["skipped"][part]


def test_a_log_without_answers_says_which_flag_gives_a_task(trl_log, tmp_path):
    config = InspectConfig(logs=(str(trl_log),), policy=PolicyConfig(task="given"), parts=("audit",), **SMALL)
    result = STUDY.run(config, tmp_path / "a")
    assert "the log has no answers" in result["skipped"]["audit"] and "--task gsm8k" in result["skipped"]["audit"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parts", "audits"], "there is no part audits"),
        (["--column", "score"], "NAME=COLUMN"),
        (["--rollouts", "2"], "at least 4 rollouts"),
        (["--step", "9"], "the log has no such step"),
    ],
)
def test_what_cannot_be_asked_is_refused(trl_log, tmp_path, capsys, flags, told):
    assert main(["inspect", str(trl_log), "--out", str(tmp_path / "a"), *flags]) == 1
    assert told in " ".join(capsys.readouterr().err.split())
