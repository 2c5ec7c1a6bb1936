"""The embedded world: its grammar against plain arithmetic, its roles against hand-derived ones, its model, its
builder.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokencredit.pivotality import anatomy
from tokencredit.pivotality.tree import exact_value, on_text
from tokencredit.tasks import load, reckon, world
from tokencredit.tasks.reckon import OPERATORS, VOCABULARY, Demonstrator, Reckon, make_row

TASK = Reckon()
KINDS = {"fork", "habit", "free", "forced", "calc", "copy", "join", "eos", "junk"}

digits, operators = st.sampled_from("0123456789"), st.sampled_from(OPERATORS)
tails = st.lists(st.tuples(operators, digits), min_size=1, max_size=4)
expressions = st.builds(lambda first, rest: (first, *(word for pair in rest for word in pair)), digits, tails)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shipped():
    path = reckon.model_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def arithmetic(words: tuple[str, ...]) -> str:
    """Last digit by terms: split at + and -, multiply within, add up. Python integers throughout."""
    terms = [[1, int(words[0])]]
    for operator, digit in zip(words[1::2], words[2::2]):
        if operator == "*":
            terms[-1][1] *= int(digit)
        else:
            terms.append([-1 if operator == "-" else 1, int(digit)])
    return str(sum(sign * product for sign, product in terms) % 10)


# Grammar


@given(expressions)
def test_value_is_arithmetic(expression):
    assert reckon.value(expression) == arithmetic(expression)


@given(expressions)
def test_a_valid_step_never_changes_the_value(expression):
    """And one exists until one number is left, so a solution can always be written."""
    valid = reckon.choices(expression, valid=True)
    assert valid
    for k in valid:
        assert arithmetic(reckon.reduce(expression, k)) == arithmetic(expression)


@pytest.mark.parametrize("operators", [(a, b) for a in OPERATORS for b in OPERATORS])
def test_an_invalid_step_changes_the_value_for_some_digits(operators):
    """`is_valid` forbids nothing that is harmless for all digits, with two operators."""
    a, b = operators
    cases = [(x, a, y, b, z) for x in "123456789" for y in "123456789" for z in "123456789"]
    for k in (1, 2):
        harmless = all(arithmetic(reckon.reduce(case, k)) == arithmetic(case) for case in cases)
        assert reckon.is_valid(cases[0], k) == harmless


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        ("2 + 3", "forced"),
        ("2 + 3 - 4", "free"),
        ("2 * 3 * 4", "free"),
        ("2 - 3 + 4", "habit"),
        ("2 - 3 - 4", "habit"),
        ("2 * 3 + 4", "fork"),
        ("2 - 3 + 4 * 5", "fork"),
        ("2 + 3 - 4 + 5", "habit"),
    ],
)
def test_decision(expression, kind):
    assert reckon.decision(tuple(expression.split())) == kind


@pytest.mark.parametrize("task", [TASK, Reckon((3, 4, 5)), Reckon((3,), wording=False)])
def test_gold_passes_and_the_rest_fails(task):
    assert task.validate().passed
    rng = random.Random(0)
    for row in task.rows("train", 200, seed=1):
        words = task.demonstrate(row, rng).split()
        assert len(words) <= reckon.MAX_NEW_TOKENS
        assert set(task.roles(row, words)) <= KINDS - {"junk"}
        assert task.wording or not set(words) & {"now", "then", "ok", "next"}


def test_demonstrations_of_mixed_quality_are_grammatical_and_fit():
    rng, bad = random.Random(0), Demonstrator(fork=0.5, habit=0.9, slip=0.2, repair=0.5, doubt=0.2)
    for task in (TASK, Reckon((3, 4, 5))):
        for row in task.rows("train", 500):
            words = task.demonstrate(row, rng, bad).split()
            assert len(words) <= reckon.MAX_NEW_TOKENS
            assert "junk" not in task.roles(row, words)


# Verifier

ROW = make_row(("7", "+", "3", "*", "4", "-", "2"))  # 7 + 12 - 2 = 17


@pytest.mark.parametrize(
    ("completion", "truncated", "reason"),
    [
        ("@2 7 + 2 - 2 so @1 9 - 2 then @1 7 <eos>", False, "correct"),
        ("@2 7 + 2 - 2 so @1 9 - 2 then @1 7", False, "correct"),
        ("@2 7 + 2 - 2 so @1 9 - 2 then @1 7 <eos> <pad> <pad>", False, "correct"),
        ("@1 0 * 4 - 2 so nonsense @1 7", False, "correct"),  # outcome only: how it was written is not looked at
        ("@2 7 + 2 - 2 so @1 9 - 2 then @1 8", False, "wrong"),
        ("@2 7 + 2 - 2 so @1 9 - 2 then @1 7", True, "truncated"),
        ("@2 7 + 2 - 2 so @1 9 - 2 then @2 7", False, "unparsed"),
        ("@1 7 <eos> @1 7", False, "correct"),
        ("@1 8 <eos> @1 7", False, "wrong"),
        ("7", False, "unparsed"),
        ("@1 17", False, "unparsed"),
        ("@1 7 so", False, "unparsed"),
        ("<eos>", False, "unparsed"),
        ("", False, "unparsed"),
    ],
)
def test_verify(completion, truncated, reason):
    assert reckon.verify(completion, ROW, truncated=truncated).reason == reason


# Roles, derived by hand from the grammar

CASES = [
    (
        "7 + 3 * 4 - 2",
        "@2 7 + 2 - 2 so @1 9 - 2 then @1 7 <eos>",
        "fork copy copy calc copy copy join free calc copy copy join forced calc eos",
    ),
    # 8 - 3 + 4: taken from the right, taken back, done again from the left
    (
        "8 - 3 + 4",
        "@2 8 - 7 wait 8 - 3 + 4 ok @1 5 + 4 so @1 9 <eos>",
        "habit copy copy calc wait copy copy copy copy copy join habit calc copy copy join forced calc eos",
    ),
    # a wrong digit, and the reckoning goes on from it
    ("2 * 3 + 1", "@1 7 + 1 so @1 8 <eos>", "fork slip copy copy join forced calc eos"),
    # the last step taken back, where <eos> was the alternative
    (
        "2 * 3 + 1",
        "@1 6 + 1 so @1 8 wait 6 + 1 so @1 7 <eos>",
        "fork calc copy copy join forced slip wait copy copy copy join forced calc eos",
    ),
    # two steps taken back, one after the other
    (
        "2 * 3 + 1",
        "@1 6 + 1 so @1 7 wait 6 + 1 wait 2 * 3 + 1 so @1",
        "fork calc copy copy join forced calc wait copy copy copy wait copy copy copy copy copy join fork",
    ),
    ("2 * 3 + 1", "@1 6 + 2 so", "fork calc copy junk junk"),  # miscopied
    ("2 * 3 + 1", "@1 6 +", "fork calc copy"),  # cut off
    ("2 * 3 + 1", "@3 6", "junk junk"),  # there is no third operator
    ("2 * 3 + 1", "wait 2 * 3", "junk junk junk junk"),  # nothing to take back
    ("2 * 3 + 1", "@1 6 + 1 <eos>", "fork calc copy copy junk"),  # ends too early
    ("2 * 3 + 1", "@1 6 + 1 so @1 7 <eos> <eos>", "fork calc copy copy join forced calc eos junk"),
    ("2 * 3 + 1", "", ""),
]


@pytest.mark.parametrize(("expression", "completion", "roles"), CASES)
def test_roles(expression, completion, roles):
    row, words = make_row(tuple(expression.split())), completion.split()
    assert TASK.roles(row, words) == roles.split()


def test_slots_are_of_the_position():
    """Where `wait` or a wrong digit was written, and at the first ungrammatical word, the slot is what the position
    offered.
    """
    cases = [
        ("@1 7 + 1 wait 2 * 3 + 1 so @9 @1", "fork calc copy copy join copy copy copy copy copy join fork junk"),
        ("@1 6 + 1 so @1 8 wait", "fork calc copy copy join forced calc eos"),
    ]
    for completion, slots in cases:
        assert TASK.slots(make_row(("2", "*", "3", "+", "1")), completion.split()) == slots.split()


def test_deciding_positions_are_all_where_credit_falls(shipped):
    """Q − V of sampled completions, exact up to the brackets: nearly all of its square falls on the deciding
    positions.
    """
    model, tokenizer = shipped
    torch.manual_seed(0)
    rows = Reckon(operands=(3,)).rows("test", 12)
    drawn = [anatomy.draw(model, tokenizer, row, 4) for row in rows]
    prompts, verify = (
        [tokenizer(row["prompt"])["input_ids"] for row in rows],
        [on_text(TASK.verify, tokenizer, row) for row in rows],
    )
    credit = exact_value(
        model, prompts, drawn, verify, eos_token_id=tokenizer.eos_token_id, max_new_tokens=48, eps=1e-3
    )
    there = elsewhere = marked = tokens = 0
    for row, completions, values in zip(rows, drawn, credit):
        for ids, square in zip(completions, (v.square() for v in values)):
            marks = torch.tensor(TASK.deciding(row, tokenizer.convert_ids_to_tokens(ids)))
            there, elsewhere = there + square[marks].sum(), elsewhere + square[~marks].sum()
            marked, tokens = marked + int(marks.sum()), tokens + len(ids)
    assert there > 0.1 * len(rows) and elsewhere < 0.02 * there
    assert 0.2 < marked / tokens < 0.6


@settings(max_examples=200)
@given(st.integers(0, 10_000), st.integers(0, 30), st.lists(st.sampled_from([*VOCABULARY, "?", ""]), max_size=20))
def test_roles_of_anything(seed, cut, junk):
    """A demonstration broken off anywhere and continued with anything: a role for every token, all junk after the
    first, slots causal.
    """
    rng = random.Random(seed)
    row = make_row(reckon.draw(rng.choice((3, 4, 5)), rng))
    words = [*TASK.demonstrate(row, rng, Demonstrator()).split()[:cut], *junk]
    roles, slots = TASK.roles(row, words), TASK.slots(row, words)
    assert len(roles) == len(slots) == len(words)
    if "junk" in roles:
        assert set(roles[roles.index("junk") :]) == {"junk"}
    for i, (role, slot) in enumerate(zip(roles, slots)):
        assert slot in KINDS
        assert role in {slot, "junk"} | {"calc": {"slip"}, "join": {"wait"}, "eos": {"wait"}}.get(slot, set())
        assert TASK.slots(row, [*words[:i], "?"]) == slots[: i + 1]
    assert TASK.deciding(row, words) == [slot in ("fork", "habit", "calc", "join") for slot in slots]


# Prompts


def test_streams_are_paired_and_splits_disjoint():
    train, test = (TASK.rows(split, 1500) for split in ("train", "test"))
    assert train == Reckon().rows("train", 1500) != TASK.rows("train", 1500, seed=1)
    assert TASK.rows("train", 40) == train[:40]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in train + test:
        expression = tuple(row["expression"].split())
        assert row["prompt"] == f"<bos> {row['expression']} =" and row["answer"] == arithmetic(expression)
        assert any(
            arithmetic(reckon.reduce(expression, k)) != row["answer"] for k in range(1, len(expression) // 2 + 1)
        )
    with pytest.raises(ValueError, match="train"):
        TASK.rows("validation", 1)


def test_split_is_stable():
    """A fifth is held out, by a hash that no version of anything changes."""
    parts = {
        "8 - 3 + 4": "train",
        "8 - 3 - 4": "test",
        "7 + 3 * 4 - 2": "train",
        "9 - 1 + 2": "test",
        "5 * 5 + 5": "test",
    }
    assert {expression: reckon.split_of(f"<bos> {expression} =") for expression in parts} == parts
    held_out = sum(reckon.split_of(f"<bos> {i} =") == "test" for i in range(5000)) / 5000
    assert abs(held_out - 0.2) < 4 * (0.2 * 0.8 / 5000) ** 0.5


def test_load_takes_the_dials():
    assert load("reckon", operands=(3, 4, 5), wording=False) == Reckon((3, 4, 5), False)
    for operands in ((), (2,), (3, 6)):
        with pytest.raises(ValueError, match="operands"):
            Reckon(operands)


# The model that comes with the package


def test_shipped_model_is_small_and_reads_back(shipped):
    model, tokenizer = shipped
    assert sum(file.stat().st_size for file in reckon.model_path().iterdir()) < 1_000_000
    assert model.dtype == torch.float32 and model.num_parameters() == 108_544
    text = "<bos> 7 + 3 * 4 - 2 = @2 7 + 2 - 2 so @1 9 - 2 then @1 7 <eos>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [VOCABULARY.index(word) for word in text.split()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix("<bos> ").removesuffix(" <eos>")
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert tokenizer(["<bos> 1", "<bos>"], padding=True)["input_ids"][1][0] == tokenizer.pad_token_id


def test_shipped_model_solves_a_third(shipped):
    """Between 0.28 and 0.42 on 512 held-out prompts: room to learn, and successes to learn from."""
    torch.manual_seed(0)
    assert 0.28 <= world.pass_rate(*shipped, TASK, 512) <= 0.42


def test_shipped_model_has_confident_pivots(shipped):
    """Low-entropy forks that decide the outcome exist (0.02 of all tokens on many prompts), and entropy and importance
    part ways.
    """
    torch.manual_seed(0)
    found = anatomy.anatomy(*shipped, TASK, prompts=24, samples=4, eps=1e-3)
    roles = found["roles"]
    assert found["confident_pivots"] > 0.01
    assert sum(role["share"] for role in roles.values()) == pytest.approx(1)
    assert roles["join"]["entropy"] > 1.3 > roles["fork"]["entropy"] > 0.5 > roles["habit"]["entropy"]
    assert roles["join"]["credit"] < 0.1 < roles["fork"]["credit"]
    assert roles["copy"]["entropy"] < 0.05


# The builder


def test_build_is_seeded_and_refuses_to_overwrite(tmp_path):
    steps = []
    figures = [
        world.build(tmp_path / name, seed=seed, steps=3, num_eval=8, progress=lambda *state: steps.append(state))
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    ]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other")]
    assert weights[0] == weights[1] != weights[2]
    assert figures[0]["loss"] == figures[1]["loss"]
    assert [(step, total) for step, total, _ in steps[:3]] == [(1, 3), (2, 3), (3, 3)] and steps[0][2]["loss"] > 0
    with pytest.raises(FileExistsError, match="one"):
        world.build(tmp_path / "one", steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "two"]


def test_build_leaves_nothing_when_it_dies(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(world, "portable", fail)
    with pytest.raises(OSError, match="disk full"):
        world.build(tmp_path / "model", steps=1, num_eval=8)
    assert list(tmp_path.iterdir()) == []


def test_demonstrations_come_from_the_train_split():
    ids, labels = next(world.demonstrations(TASK, 0, Demonstrator()))
    assert ids.shape == labels.shape
    for row, label in zip(ids.tolist(), labels.tolist()):
        words = [VOCABULARY[i] for i in row]
        end = words.index("=") + 1
        assert reckon.split_of(" ".join(words[:end])) == "train"
        assert set(label[:end]) == {-100}
        last = words.index("<eos>")
        assert label[end : last + 1] == row[end : last + 1] and set(label[last + 1 :]) <= {-100}
