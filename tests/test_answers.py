"""The verifier against a table of cases, and what has to hold for every answer to a plain number."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokencredit.tasks import answers, bounded, gsm8k, jsonl, kinds, numerals, shapes, units
from tokencredit.tasks.bounded import Limits, Patience
from tokencredit.tasks.notation import tidy
from tokencredit.tasks.vocabulary import WORDS
from tokencredit.tasks.words import SCALES, VALUES, read_words

TABLE = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
]
MARKS = ("<answer>", "<ANSWER>", "\\boxed", "\\fbox", "####")


def completion_of(answer: str) -> str:
    """A case's answer is what stands between the marks, or, where it has marks, the whole completion."""
    return answer if any(mark in answer for mark in MARKS) else f"<answer>{answer}</answer>"


# The table


def test_the_table_has_cases_of_both_verdicts_and_none_twice():
    assert len(TABLE) >= 500
    assert len({(case["gold"], case["answer"]) for case in TABLE}) == len(TABLE)
    assert all(set(case) == {"gold", "answer", "verdict", "why"} for case in TABLE)
    counts = Counter(case["verdict"] for case in TABLE)
    assert min(counts[True], counts[False]) >= 200


def test_every_case_of_the_table_has_its_verdict():
    verdicts = answers.verify_many([completion_of(case["answer"]) for case in TABLE], [case["gold"] for case in TABLE])
    failed, counts = [], Counter()
    for case, verdict in zip(TABLE, verdicts):
        if verdict.correct != case["verdict"]:
            fault = "false accept" if verdict.correct else "false reject"
            counts[fault, case["why"]] += 1
            failed.append(f"{fault} ({case['why']}): {case['gold']!r} <- {case['answer']!r}: {verdict.reason}")
    assert not failed, "\n".join([*failed, *(f"{n} x {fault}: {why}" for (fault, why), n in counts.items())])


# A plain number

WHOLE = st.integers(2, 10**7)
GOLDS = st.one_of(
    WHOLE.map(str), WHOLE.map(lambda n: f"-{n}"), WHOLE.map(lambda n: f"{n:,}"), WHOLE.map(lambda n: f"{n / 100:.2f}")
)
NAMES = [
    *[*VALUES, *SCALES, "half", "third", "quarter", "tenth", "seventh", "hundredth", "pair", "couple", "score"],
    *["double", "twice", "minus", "negative", "squared", "factorial"],
]
OTHERS = st.one_of(
    st.integers(1, 10**6).map(str),
    st.sampled_from(NAMES),
    st.sampled_from(NAMES).map(lambda name: f"{name}s"),
    st.sampled_from(
        ["½", "²", "10^2", r"\frac{1}{2}", "1/2", "0.5", "四", "万", "百", "Ⅷ", "e3", "E-2", "_8", "_{16}", "!"]
    ),
)
WORDS_BETWEEN = [
    *sorted(units.NOUNS)[::37],
    "or",
    "and",
    "but",
    "maybe",
    "of",
    "per",
    "in",
    "to",
    "is",
    "not",
    "x",
    "h",
]
BETWEEN = st.one_of(
    st.sampled_from(
        ["", " ", ", ", "; ", " = ", "=", "/", "-", "+", " (", "\n", "^", "_", ".", ":", r" \cdot ", " & "]
    ),
    st.sampled_from(WORDS_BETWEEN).map(lambda word: f" {word} "),
)
AROUND = st.sampled_from(
    ["{}", "${}$", "**{}**", r"\text{{{}}}", "({})", "The answer is {}.", "x = {}", r"\mathbf{{{}}}"]
)


def value_of(other: str) -> Fraction:
    return Fraction(int(other)) if other.isdecimal() else Fraction(VALUES.get(other, 0))


@settings(max_examples=1500, deadline=None)
@given(GOLDS, OTHERS, BETWEEN, AROUND, st.booleans())
def test_no_text_with_a_different_number_is_accepted_for_a_plain_number(gold, other, between, around, before):
    text = around.format(f"{other}{between}{gold}" if before else f"{gold}{between}{other}")
    assume(abs(Fraction(gold.replace(",", ""))) not in (value_of(other), Fraction(1, 2)))
    assert not answers.verify(f"<answer>{text}</answer>", gold).correct


@settings(max_examples=1500, deadline=None)
@given(WHOLE, WHOLE, st.sampled_from(sorted(units.NOUNS | set(units.MEASURES))))
def test_a_unit_never_makes_another_number_right(gold, other, unit):
    assume(gold != other)
    assert not answers.verify(f"<answer>{other} {unit}</answer>", str(gold)).correct


@settings(max_examples=1000, deadline=None)
@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000), st.sampled_from([0, 1, 2]))
def test_a_number_reads_as_its_value_in_every_form(value, form):
    texts = [f"{value.numerator}/{value.denominator}", str(float(round(value, 3))), f"{value.numerator:,}"]
    values = [value, round(value, 3), Fraction(value.numerator)]
    assume(abs(values[form]) == 0 or abs(values[form]) >= Fraction(1, 1000))
    assert numerals.read(tidy(texts[form]), lenient=True).value == values[form]


@given(st.integers(0, 10**9))
def test_english_number_words_are_read_as_spoken(number):
    assert read_words(spoken(number)) == number


def spoken(number: int) -> str:
    """The English name of a number below a thousand million."""
    for name in ("million", "thousand", "hundred"):
        if number >= SCALES[name]:
            above, below = divmod(number, SCALES[name])
            return f"{spoken(above)} {name}" + (f" {spoken(below)}" if below else "")
    if number < 20:
        return WORDS["small"][number]
    tens, ones = divmod(number, 10)
    return WORDS["tens"][tens - 2] + (f"-{WORDS['small'][ones]}" if ones else "")


def test_no_word_that_names_or_changes_a_number_is_a_unit():
    fractions = (
        "half halves third thirds fourth fourths quarter quarters fifth fifths sixth sevenths",
        "eighths ninth tenth tenths hundredths",
    )
    scaling = (
        "dozen dozens score scores gross pair pairs couple couples thousands millions billions hundreds lakh crore"
    )
    changing = (
        "double doubled twice thrice triple squared cubed factorial negative minus plus",
        "over mod modulo base less more",
    )
    joining = "or and but maybe perhaps not except to"
    words = [*VALUES, *SCALES, *" ".join((*fractions, scaling, *changing, joining)).split()]
    found = [word for word in words if units.unit_of(word) is not None or units.is_known(word)]
    assert set(found) <= {"to"}  # `to` joins units, and is none
    assert units.unit_of("to") is None
    assert not [word for word in words if units.unit_of(f"apples {word}") is not None]
    assert not [word for word in words if word != "to" and units.unit_of(f"{word} apples") is not None]


@pytest.mark.parametrize("letter", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
def test_no_letter_is_a_unit_beside_a_number(letter):
    for gold, answer in ((f"3{letter}", "3"), (f"x+3{letter}", "x+3"), ("3", f"3{letter}"), (f"3 {letter}", "3")):
        assert not answers.verify(f"<answer>{answer}</answer>", gold).correct, (gold, answer)


# What is evaluated


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("56088", r"123 \cdot 456"),
        ("42", "84/2"),
        ("2", r"\sqrt{4}"),
        ("1024", "2^{10}"),
        ("42", r"x = 6 \cdot 7 = 42"),
    ],
)
def test_an_answer_still_to_be_worked_out_is_an_option(gold, answer):
    completion = f"<answer>{answer}</answer>"
    assert answers.verify(completion, gold).reason == "wrong"
    assert answers.verify(completion, gold, evaluated=False).correct
    assert gsm8k.Gsm8k().verify(completion, {"answer": gold}).reason == "wrong"
    assert gsm8k.Gsm8k(evaluated=False).verify(completion, {"answer": gold}).correct
    assert jsonl.Jsonl("x", evaluated=False).verify(completion, {"answer": gold}).correct
    assert not jsonl.Jsonl("x").verify(completion, {"answer": gold}).correct


@pytest.mark.parametrize("answer", ["41 = 42", r"41 + 2 = 42", "x+1", "43", r"6 \cdot 8", "42 millions", "42h"])
def test_also_an_unevaluated_answer_has_to_be_right(answer):
    assert not answers.verify(f"<answer>{answer}</answer>", "42", evaluated=False).correct


@pytest.mark.parametrize("gold", [float("nan"), float("inf"), -float("inf")])
def test_a_gold_answer_that_is_no_number_is_refused(gold):
    with pytest.raises(TypeError, match="an answer is text or a number, not"):
        jsonl.gold_of(gold)


def test_a_json_file_with_nan_names_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "answer": NaN}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 1.*not nan"):
        jsonl.Jsonl(str(path)).rows()


# Kinds and shapes


@pytest.mark.parametrize(
    ("gold", "is_text"),
    [
        *[("Paris", True), ("no", True), ("NaCl", True), ("H_2O", True), ("101_2", True), ("3:2", True), ("AB", True)],
        *[("2ab", False), ("x", False), ("xy", False), (r"\sqrt{2}", False), ("x+3c", False), (r"\ln 2", False)],
    ],
)
def test_what_is_text(gold, is_text):
    assert kinds.is_text(gold) is is_text


BOMBS = [
    "9^{9^{9^{9}}}",
    "9^9^9",
    "10^{10^{10}}!",
    "9!!!!",
    "(9!)!",
    r"\binom{10^{9}}{10^{8}}",
    "2^{2^{40}} - 1",
    "{" * 450 + "1" + "}" * 450,
    "9" * 500,
    "x^{99999}",
    "(x+y+z)^{500}",
    r"\int_0^1 x\,dx",
    r"\sum_{k=1}^{10^9} k",
    "((2^{2000})^{2000})",
    r"\sqrt{" * 8 + "2" + "}" * 8,
    "+".join(f"x_{{{n}}}" for n in range(90)),
    "7^{999999}",
    r"e^{e^{e^{e}}}",
    "99999^{99999}",
    r"2^{10 \cdot 10 \cdot 999}",
    "1000000!",
]


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_known_bombs_reach_no_algebra(bomb, monkeypatch):
    monkeypatch.setattr(bounded, "compare", lambda *asked: pytest.fail(f"asked: {asked}"))
    assert shapes.refusal(bomb)
    assert answers.verify(f"<answer>{bomb}</answer>", r"\sqrt{2}").reason in ("refused", "unparsed")
    assert not answers.verify(f"<answer>{bomb}</answer>", "42").correct
    assert not answers.verify(f"<answer>{bomb}</answer>", "42", evaluated=False).correct


@pytest.mark.parametrize(
    "fair",
    [
        *[
            r"2^{2024}-1",
            r"\frac{-b+\sqrt{b^2-4ac}}{2a}",
            r"e^{-x^2}",
            r"x^{2^3}",
            "10!",
            r"\binom{10}{3}",
            r"(x+1)^{10}",
        ],
        *[
            r"\sqrt{2+\sqrt{3}}",
            r"\frac{1}{1+\frac{1}{1+\frac{1}{2}}}",
            r"\sin(\arctan(\frac{1}{2}))",
            r"x^{n+1}",
            "(n+1)",
        ],
    ],
)
def test_fair_expressions_are_not_refused(fair):
    assert shapes.refusal(fair) is None


# The whole batch

HARD = [rf"\sqrt{{{n}}} + {n}" for n in range(2, 42)]


def hidden_bomb(n: int) -> str:
    """An expression that no rule of `shapes` knows, and that sympy does not finish."""
    return rf"\frac{{1}}{{{n}}}\cdot(1999^{{2000}})^{{2000 + {n}}}"


def test_a_lost_worker_is_replaced_by_one_that_waits_without_a_new_process():
    judge = bounded.Judge(Limits(seconds=0.3, processes=1))
    try:
        assert judge.ask("2", r"\sqrt{4}") == "correct"
        started = judge.process.pid
        for _ in range(4):
            assert judge.ask("1", "9^{9^{9^{9}}}", 0.2) == "timeout"
            assert judge.ask("2", r"\sqrt{4}") == "correct"
        assert judge.process.pid == started and judge.starts == 1
    finally:
        judge.stop()


def test_a_batch_with_known_bombs_loses_no_worker():
    limits = Limits(seconds=1.25, processes=1)
    texts = [f"<answer>{text}</answer>" for text in [*HARD, *BOMBS]]
    verdicts = answers.verify_many(texts, [r"\sqrt{2} + 2"] * len(texts), limits=limits)
    pool = bounded._pools[limits]
    assert pool.patience.timeouts == 0 and sum(judge.starts for judge in pool.all) == 1
    assert [verdict.correct for verdict in verdicts] == [True] + [False] * (len(texts) - 1)
    assert all(verdict.parsed for verdict in verdicts[: len(HARD)])


def test_the_time_limit_is_halved_by_timeouts_and_recovers():
    patience = Patience(3.0)
    for _ in range(10):
        patience.saw(timeout=True)
    assert patience.timeouts == 10 and patience.seconds == 3.0 / 2**bounded.SHARES
    # the CPU time that a hundred timeouts may take: 3 + 1.5 + ... + 95 times the least
    total, patience = 0.0, Patience(3.0)
    for _ in range(100):
        total += patience.seconds
        patience.saw(timeout=True)
    assert total < 6 + 100 * 3.0 / 2**bounded.SHARES
    for _ in range(bounded.RECOVERY * bounded.SHARES):
        patience.saw(timeout=False)
    assert patience.seconds == 3.0


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [("12千米", "12", True), ("12千克", "12", True), ("12千米", "12000", False), ("12千个", "12000", True)],
)
def test_a_scale_that_begins_a_chinese_unit_is_part_of_it(answer, gold, right):
    """千 is a thousand, 千米 a kilometre and 个 a count."""
    assert answers.check_plain(answer, gold).correct == right
