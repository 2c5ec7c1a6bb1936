"""VinePPO's step gains: Monte-Carlo values against the exact ones, the sharing of prefixes, where steps begin."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokencredit.engines.scorers import task_scorers
from tokencredit.lm.completions import sample
from tokencredit.lm.distribution import Settings
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.sampling import Rollout, Trace
from tokencredit.pivotality.tree import grow_forest, on_text
from tokencredit.scores.steps import line_starts, spread, step_values
from tokencredit.tasks.reckon import Reckon, make_row, model_path

TASK = Reckon(operands=(3,))


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForCausalLM.from_pretrained(model_path()).eval(), AutoTokenizer.from_pretrained(model_path())


@pytest.mark.parametrize("max_new_tokens", [48, 12])
def test_values_are_those_of_the_prefix_tree(shipped, max_new_tokens):
    """Every V̂ of 400 rollouts within 4 standard errors of V (and 4 rollouts, where V is all but certain), the
    remaining length included.
    """
    model, tokenizer = shipped
    num, rows = 400, TASK.rows("test", 6)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    drawn = [
        [list(c.ids) for c in some] for some in sample(model, tokenizer, prompts, 3, max_new_tokens=max_new_tokens)
    ]
    verify = [on_text(TASK.verify, tokenizer, row) for row in rows]
    ends = {"eos_token_id": tokenizer.eos_token_id, "max_new_tokens": max_new_tokens}
    trees = grow_forest(model, prompts, verify, include=drawn, eps=1e-4, **ends)
    pairs = [(k, ids) for k, some in enumerate(drawn) for ids in some]
    traces = [Trace(tuple(prompts[k]), tuple(ids)) for k, ids in pairs]
    starts = [TASK.steps(rows[k], tokenizer.convert_ids_to_tokens(ids)) for k, ids in pairs]
    sampler = PrefixSampler(model, ends=(tokenizer.eos_token_id,), settings=Settings())
    judge = lambda i, ids, cut: verify[pairs[i][0]](list(ids), cut)  # noqa: E731
    found = step_values(sampler, traces, starts, judge, max_new_tokens=max_new_tokens, num=num)
    checked = set()
    for (k, ids), some, values in zip(pairs, starts, found):
        for start, value in zip(some, values):
            low, high = trees[k].value(ids[:start])
            slack = 4 * (max(low * (1 - low), high * (1 - high)) / num) ** 0.5 + 4 / num
            assert low - slack <= value <= high + slack
            checked.add((k, tuple(ids[:start]), round(low, 2)))
    assert len(checked) > 25 and len({value for *_, value in checked}) > 5


class Coins:
    """A sampler whose rollouts are the request's own seed, and which remembers what it was asked."""

    settings, ends = Settings(), (0,)

    def __init__(self):
        self.asked = []

    def continue_(self, traces, requests, progress=None):
        self.asked += [(traces[r.trace].prompt, traces[r.trace].completion[: r.prefix], r.budget) for r in requests]
        for index in reversed(range(len(requests))):
            yield index, Rollout((requests[index].seed % 1000, 0), False, (), ())


def coin(k, ids, cut):
    return float(ids[-2] < 500)


def test_equal_prefixes_share_their_rollouts():
    traces = [Trace((1,), (5, 6, 7)), Trace((1,), (5, 8, 7)), Trace((2,), (5, 6, 7))]
    sampler = Coins()
    values = step_values(sampler, traces, [[0, 1, 2], [0, 1, 2], [0, 1]], coin, max_new_tokens=5, num=7)
    asked = Counter(sampler.asked)
    assert set(asked.values()) == {7}
    assert set(asked) == {
        ((1,), (), 5),
        ((1,), (5,), 4),
        ((1,), (5, 6), 3),
        ((1,), (5, 8), 3),
        ((2,), (), 5),
        ((2,), (5,), 4),
    }
    assert values[0][:2] == values[1][:2] and values[0][2] != values[1][2]
    told_apart = Coins()
    step_values(told_apart, traces[:2], [[0], [0]], coin, max_new_tokens=5, num=7, labels=["a", "b"])
    assert len(told_apart.asked) == 14


def test_values_depend_on_the_seed_and_the_prefix_alone():
    traces, starts = [Trace((1,), (5, 6, 7)), Trace((2,), (5, 8, 7))], [[0, 2], [0, 1]]
    values = step_values(Coins(), traces, starts, coin, max_new_tokens=5, num=99)
    assert step_values(Coins(), traces[::-1], starts[::-1], coin, max_new_tokens=5, num=99) == values[::-1]
    assert step_values(Coins(), traces, starts, coin, max_new_tokens=5, num=99, seed=1) != values
    assert all(abs(v - 0.5) < 4 * 0.5 / 99**0.5 for some in values for v in some)


def test_gains_by_hand():
    """Values 0.5, 0.25, 1 at tokens 0, 2, 3 of 5 and reward 0: gains −0.25, 0.75, −1, which add up to 0 − 0.5."""
    assert spread([0.5, 0.25, 1.0], [0, 2, 3], 0.0, 5) == [-0.25, -0.25, 0.75, -1.0, -1.0]
    assert spread([0.25], [0], 1.0, 2) == [0.75, 0.75]


def test_lines():
    cases = [
        (["a", "b"], [0]),
        (["a", "\n", "b", " c\n", "d"], [0, 2, 4]),
        (["a", ".\n", "\n", " ", "b"], [0, 4]),  # blank lines belong to the step before
        (["\n", "\n", "a", "\n", "b"], [0, 4]),  # and to the first where none is before
        (["a\nb", "c"], [0, 1]),  # a newline within a token: the step ends with the token
        (["a", "\n"], [0]),
    ]
    for texts, starts in cases:
        assert line_starts(texts) == starts, texts


def test_the_worlds_steps_begin_at_joints():
    for text, starts in (("@2 2 * 4 wait 2 * 3 + 1 so @1 6 + 1 ok @1 7 <eos>", [0, 4, 10, 15, 18]), ("@9 so", [0])):
        assert TASK.steps(make_row(("2", "*", "3", "+", "1")), text.split()) == starts


def scored(shipped, task, ids, rows, **settings):
    """`step_gain` of completions of the world, as the engine calls it."""
    model, tokenizer = shipped
    prompts = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in rows])
    width = max(map(len, ids))
    out = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.tensor([[*some, *[0] * (width - len(some))] for some in ids]),
        "completion_mask": torch.tensor([[1] * len(some) + [0] * (width - len(some)) for some in ids]),
    }
    trainer = SimpleNamespace(
        temperature=1.0,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=1.0,
        args=SimpleNamespace(seed=0),
        model=model,
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(unwrap_model=lambda m: m),
    )
    scorer = task_scorers(task, tokenizer, 48)["step_gain"]
    return scorer(SimpleNamespace(**vars(trainer) | settings), rows, out)


def test_the_scorer_spreads_gains_over_steps(shipped):
    """Gains of a rollout's steps and V̂ of its prompt, which siblings share, make its reward; the end token is of the
    last step.
    """
    tokenizer = shipped[1]
    rows = [make_row(("2", "*", "3", "+", "1"))] * 2
    ids = [
        tokenizer.convert_tokens_to_ids(text.split()) for text in ("@2 2 * 4 so @1 8 <eos>", "@1 6 + 1 so @1 7 <eos>")
    ]
    gain = scored(shipped, TASK, ids, rows)
    assert gain.shape == (2, 8)
    for row in gain:
        assert len(set(row[:4].tolist())) == len(set(row[4:].tolist())) == 1
    total = gain[:, 0] + gain[:, 4]
    assert total[1] - total[0] == pytest.approx(1)  # right and wrong, against the same value of the prompt
    lines = SimpleNamespace(
        name="lines", max_new_tokens=48, verify=TASK.verify
    )  # a task that does not say: no newline, one step
    assert scored(shipped, lines, ids[1:], rows[:1])[0].unique().shape == (1,)


def test_the_scorer_leaves_padding_and_empty_rollouts_at_zero(shipped):
    row = make_row(("2", "*", "3", "+", "1"))
    gain = scored(shipped, TASK, [[], shipped[1].convert_tokens_to_ids(["@1", "6"])], [row] * 2)
    assert gain.shape == (2, 2) and not gain[0].any()


def test_the_scorer_refuses_what_it_would_not_sample_with(shipped):
    with pytest.raises(ValueError, match="leave min_p and repetition_penalty unset"):
        scored(shipped, TASK, [[4]], [make_row(("2", "*", "3", "+", "1"))], min_p=0.1)
