"""Verifiers, verdict by verdict; limits that hold; data files with good and bad rows. No network."""

import ast
import builtins
import importlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

import tokencredit
from tokencredit import tasks
from tokencredit.lm.prompts import message_text
from tokencredit.tasks import answers, bounded, gsm8k, jsonl, numerals
from tokencredit.tasks.bounded import Limits
from tokencredit.tasks.source import task_source
from tokencredit.tasks.templates import TEMPLATES
from tokencredit.tasks.verdict import CORRECT, UNPARSED, WRONG, Verdict, VerifierError, as_verifier

QUICK = Limits(seconds=0.5, processes=1)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


# (completion, gold, template whose form alone is accepted or "" for all forms, reason)
CASES = [
    # the three forms and their order
    ("<think> 6*7 </think> <answer> 42 </answer>", "42", "", "correct"),
    ("6*7 = 42\n#### 42", "42", "", "correct"),
    (r"so \boxed{42}.", "42", "", "correct"),
    (r"#### 1 and \boxed{2} and <answer>3</answer>", "3", "", "correct"),
    (r"#### 1\n and \boxed{2}", "2", "", "correct"),
    (r"<answer> \boxed{42} </answer>", "42", "r1", "correct"),
    ("<answer> #### 42 </answer>", "42", "r1", "correct"),
    (r"\boxed{42}", "42", "r1", "unparsed"),
    ("<answer>42</answer>", "42", "boxed", "unparsed"),
    ("<answer>42</answer>", "42", "plain", "unparsed"),
    ("the answer is 42", "42", "", "unparsed"),
    ("42", "42", "", "unparsed"),
    ("", "42", "", "unparsed"),
    # the last one counts
    (r"\boxed{41} no, \boxed{42}", "42", "", "correct"),
    (r"\boxed{42} no, \boxed{41}", "42", "", "wrong"),
    ("<answer>41</answer> wait <answer>42</answer>", "42", "", "correct"),
    ("#### 41\n#### 42", "42", "", "correct"),
    (r"\boxed{\boxed{42}}", "42", "", "correct"),
    # malformed
    ("<answer>42", "42", "", "unparsed"),
    ("42</answer>", "42", "", "unparsed"),
    (r"<answer> \boxed{42}", "42", "", "correct"),
    ("<answer>42</answer> <answer>", "42", "", "correct"),
    ("<answer><answer>42</answer></answer>", "42", "", "correct"),
    ("<ANSWER>42</Answer>", "42", "", "correct"),
    (r"\boxed{42", "42", "", "unparsed"),
    (r"\boxed{}", "42", "", "unparsed"),
    ("<answer>  </answer>", "42", "", "unparsed"),
    (r"<answer></answer> \boxed{42}", "42", "", "correct"),
    ("####", "42", "", "unparsed"),
    ("<answer>}{</answer>", "42", "", "unparsed"),
    # thinking is not answering
    (r"<think> \boxed{42} </think> I do not know", "42", "", "unparsed"),
    ("<think> <answer>42</answer> </think> <answer>41</answer>", "42", "", "wrong"),
    ("<think> <answer>42</answer> </think> <answer></answer>", "42", "", "unparsed"),
    ("<think> it is <answer>42</answer>", "42", "", "unparsed"),
    ("it is 42 </think> <answer>42</answer>", "42", "", "correct"),
    # numbers as people write them
    ("<answer>-5</answer>", "-5", "", "correct"),
    ("<answer>5</answer>", "-5", "", "wrong"),
    ("<answer>\u22125</answer>", "-5", "", "correct"),
    ("<answer>$1,234.00</answer>", "1234", "", "correct"),
    (r"\boxed{\$1{,}234}", "1,234", "", "correct"),
    ("<answer>-$5.50</answer>", "-5.5", "", "correct"),
    ("<answer>$42$</answer>", "42", "", "correct"),
    ("<answer>1,450,000</answer>", "1450000", "", "correct"),
    ("<answer>1,23</answer>", "123", "", "wrong"),
    ("<answer>042.0</answer>", "42", "", "correct"),
    ("<answer>42.</answer>", "42", "", "correct"),
    ("<answer>42.5</answer>", "42", "", "wrong"),
    ("<answer>3/4</answer>", "0.75", "", "correct"),
    (r"\boxed{\frac{3}{4}}", "0.75", "", "correct"),
    (r"\boxed{-\dfrac{3}{4}}", "-3/4", "", "correct"),
    (r"\boxed{1\frac{1}{2}}", "1.5", "", "correct"),
    ("<answer>1 1/2 hours</answer>", "1.5", "", "correct"),
    ("<answer>1/0</answer>", "1", "", "wrong"),
    ("<answer>50%</answer>", "50", "", "correct"),
    (r"\boxed{50\%}", "0.5", "", "correct"),
    ("<answer>0.5</answer>", "50%", "", "correct"),
    ("<answer>5%</answer>", "0.5", "", "wrong"),
    # units and words
    ("#### 42 clips", "42", "", "correct"),
    ("<answer>60 km/h</answer>", "60", "", "correct"),
    (r"\boxed{42\text{ dollars}}", "42", "", "correct"),
    ("<answer>The answer is 42.</answer>", "42", "", "correct"),
    ("<answer>**42**</answer>", "42", "", "correct"),
    ("<answer><b>42</b></answer>", "42", "", "correct"),
    ("<answer>42 million</answer>", "42", "", "wrong"),
    ("<answer>42x</answer>", "42", "", "wrong"),
    ("<answer>40 or 42</answer>", "42", "", "wrong"),
    ("<answer>40, 41, 42</answer>", "42", "", "wrong"),
    ("<answer>between 40 and 42</answer>", "42", "", "wrong"),
    ("<answer>\uff14\uff12</answer>", "42", "", "correct"),
    ("<answer>四十二</answer>", "42", "", "correct"),
    ("<answer>🙂</answer>", "42", "", "unparsed"),
    # mathematics
    (r"\boxed{\sqrt{4}}", "2", "", "wrong"),  # still to be worked out
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", "", "correct"),
    (r"\boxed{2 \times 10^3}", "2000", "", "correct"),
    (r"\boxed{x = 5}", "5", "", "correct"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", "", "correct"),
    (r"\boxed{x^2+2x}", "x^2+2x+1", "", "wrong"),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", "", "correct"),
    (r"\boxed{0.333333}", r"\frac{1}{3}", "", "correct"),
    (r"\boxed{0.3}", r"\frac{1}{3}", "", "wrong"),
    (r"\boxed{3.14}", r"\pi", "", "wrong"),
    ("<answer>paris</answer>", "Paris", "", "correct"),
    # a text is data, whatever it says
    ("<answer>__import__('os').system('true')</answer>", "42", "", "unparsed"),
    ("<answer>42 if True else 41</answer>", "42", "", "wrong"),
    ("<answer>40+2); exit(</answer>", "42", "", "wrong"),
]


@pytest.mark.parametrize(
    ("completion", "gold", "template", "reason"), CASES, ids=[f"{i}-{case[0][:30]}" for i, case in enumerate(CASES)]
)
def test_verdicts(completion, gold, template, reason):
    forms = TEMPLATES[template].forms(strict=True) if template else answers.FORMS
    verdict = answers.verify(completion, gold, forms=forms)
    assert verdict.reason == reason
    assert verdict.correct == (reason == "correct")
    assert verdict.parsed == (reason in ("correct", "wrong"))


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("<answer>42</answer> and then", "correct"),
        ("<answer>42</answer", "truncated"),
        ("we get 4", "truncated"),
        ("#### 4", "truncated"),  # of 42?
        ("#### 42\nFurthermore", "correct"),
        (r"\boxed{42} so", "correct"),
        (r"\boxed{4", "truncated"),
        ("<answer>41</answer>", "wrong"),
        ("", "truncated"),
    ],
)
def test_a_truncated_completion_counts_only_by_a_complete_answer(completion, reason):
    assert answers.verify(completion, "42", truncated=True).reason == reason


def test_a_batch_is_the_same_as_one_at_a_time():
    completions, golds = [case[0] for case in CASES if not case[2]], [case[1] for case in CASES if not case[2]]
    reasons = [case[3] for case in CASES if not case[2]]
    assert [verdict.reason for verdict in answers.verify_many(completions, golds)] == reasons
    assert answers.verify_many(["x"], ["1"], [True])[0].reason == "truncated"
    assert answers.verify_many([], []) == []
    with pytest.raises(ValueError, match="2 completions, 1 gold"):
        answers.verify_many(["a", "b"], ["1"])


def test_a_completion_must_be_text():
    with pytest.raises(TypeError, match="is a string, not list"):
        answers.verify([{"role": "assistant", "content": "42"}], "42")


# Limits


@pytest.mark.parametrize("bomb", ["9^{9^{9^{9}}}", "10^{10^{10}}!", r"9!!!!", r"\binom{10^{9}}{10^{8}}"])
def test_a_pathological_expression_ends(bomb):
    assert bounded.compare("42", bomb, QUICK) in ("timeout", "unparsed")


def test_memory_is_limited():
    """A terabit integer would take 125 GB; with 300 MB the answer is given up long before the time is over."""
    limits = Limits(seconds=60, megabytes=300, processes=1)
    assert bounded.compare("42", "2^{2^{40}} - 1", limits) != "correct"
    assert bounded.compare("2", r"\sqrt{4}", limits) == "correct"


@pytest.mark.parametrize(
    "completion",
    [
        f"<answer>{'9' * 1_000_000}</answer>",
        "\\boxed{" * 100_000,
        "\\boxed{" * 100_000 + "}" * 100_000,
        "<answer>" * 100_000 + "</think>" * 100_000,
        "<think>" * 100_000 + "#" * 100_000,
        "<answer>" + "{" * 400 + "1" + "}" * 401 + "</answer>",
        "#### " + "1," * 400_000,
        "<answer>" + " " * 900 + "1" + "," * 90 + "</answer>",
        "<answer>" + "$" * 999 + "</answer>",
        "<answer>" + "1 a" * 300 + "</answer>",
    ],
    ids=range(10),
)
def test_a_huge_completion_is_refused(completion):
    for gold in ("42", r"\sqrt{2}", "Paris", r"\{1,2\}"):
        assert not answers.verify(completion, gold, limits=QUICK).correct


def test_deep_nesting_is_bounded():
    nested = "{" * 450 + "1" + "}" * 450
    assert bounded.compare("42", nested, QUICK) in ("timeout", "unparsed")


def test_the_process_stays_and_is_restarted_when_lost():
    judge = bounded.Judge(QUICK)
    try:
        assert judge.ask("2", r"\sqrt{4}") == "correct"
        first = judge.process.pid
        assert judge.ask("3", r"\sqrt{4}") == "wrong"
        assert judge.process.pid == first
        os.killpg(first, signal.SIGKILL)
        judge.process.wait()
        assert judge.ask("2", r"\sqrt{4}") == "correct"
        assert judge.process.pid != first and judge.starts == 2
    finally:
        judge.stop()
        judge.stop()


def test_threads_share_the_processes():
    def ask(n):
        gold = str(n + n % 2)
        return answers.verify(rf"\boxed{{\sqrt{{{n * n}}}}}", gold, evaluated=False).reason

    with ThreadPoolExecutor(8) as threads:
        reasons = list(threads.map(ask, range(2, 34)))
    assert reasons == ["wrong" if n % 2 else "correct" for n in range(2, 34)]


def test_a_thread_that_is_not_the_main_one_can_time_out():
    reasons = []
    thread = threading.Thread(target=lambda: reasons.append(bounded.compare("1", "9^{9^{9^{9}}}", QUICK)))
    thread.start()
    thread.join()
    assert reasons == ["timeout"]


def test_a_forked_process_asks_processes_of_its_own_and_all_end():
    """In a process of its own, for forking one that holds torch's threads is asking for trouble."""
    code = """
import os
from tokencredit.tasks import answers, bounded
def pids():
    return {judge.process.pid for pool in bounded._pools.values() for judge in pool.all if judge.process}
assert answers.verify(r"\\boxed{\\sqrt{4}}", "2", evaluated=False).correct
before = pids()
if (child := os.fork()) == 0:
    ok = answers.verify(r"\\boxed{\\sqrt{9}}", "3", evaluated=False).correct and pids().isdisjoint(before)
    bounded.close()
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert answers.verify(r"\\boxed{\\sqrt{16}}", "4", evaluated=False).correct and pids() == before
print(*before)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-X", "dev", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.split()
    for pid in map(int, done.stdout.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_no_text_is_evaluated():
    """sympy's `parse_expr`, which is Python's eval, is given no text of an answer: not even the digits, which
    math-verify hands it.
    """
    code = """
import sympy.parsing.sympy_parser as sympy_parser
from tokencredit.tasks import judge
parse, compare = judge.load()
seen, parse_expr = [], sympy_parser.parse_expr
sympy_parser.parse_expr = lambda text, *args, **kwargs: seen.append(text) or parse_expr(text, *args, **kwargs)
for text in ["2^{10}",
             "1.5", "1E5", "__import__('os').getpid()", "print(1)", "\\text{print}(1)", "x_{__class__}", "lambda: 1",
             "40+2", "1{,}000", "-1,000.5", "0,5", "007", "50\\%", "a.b", "\\operatorname{exit}()", 
             "\\sqrt[3]{8}", "10!", "x=1", "\\{1,2\\}"]:
    try:
        compare(parse("42"), parse(text))
    except Exception:
        pass
assert compare(parse("42"), parse("40+2")) and compare(parse("1024"), parse("2^{10}"))
assert not compare(parse("1"), parse("2"))
assert not seen, seen
try:
    judge.read_digits("__import__('os')")
except ValueError as error:
    assert "no text is evaluated" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{"seconds": 0}, {"megabytes": 10}, {"processes": 0}])
def test_limits_are_checked(options):
    with pytest.raises(ValueError, match="limits need"):
        Limits(**options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            ("1,234.5", 1234.5),
            ("1,2345", None),
            ("", None),
            (".", None),
            ("-", None),
            (".5", 0.5),
            ("--5", None),
            ("1e9", 1e9),
        ],
        *[
            ("1" * 161, None),
            ("5 x", None),
            ("5 sin", None),
            ("5 pi", None),
            ("5 of 6", None),
            ("+7", 7),
            ("1.5 1/2", None),
            ("٤", None),
        ],
        *[("2^3", None), ("1/0", None), ("1 1/0", None), ("-1 1/2", -1.5), ("3 dozen", 36), ("5 apples and", None)],
    ],
)
def test_plain_numbers(text, value):
    read = numerals.read(text)
    assert (read and float(read.value)) == value


# Verdicts and verifiers


def test_verdicts_are_consistent():
    for wrong in [(True, True, "wrong"), (False, True, "correct"), (True, False, "correct")]:
        with pytest.raises(ValueError, match="correct exactly when"):
            Verdict(*wrong)
    with pytest.raises(ValueError, match="unknown reason 'bad'"):
        Verdict(False, False, "bad")
    assert not tasks.Validation(0).passed and tasks.Validation(1).passed and not tasks.Validation(2, ("row 1",)).passed


def test_a_function_becomes_a_verifier():
    verify = as_verifier(lambda completion, row: row["answer"] in completion)
    assert verify("7", {"answer": "7"}) == CORRECT and verify("8", {"answer": "7"}) == WRONG
    assert as_verifier(lambda completion, row: UNPARSED)("", {}) == UNPARSED
    assert as_verifier(lambda completion, row: numpy.bool_(True))("", {}) == CORRECT
    assert as_verifier(lambda completion, row, truncated: truncated)("", {}, truncated=True) == CORRECT


def exceptions():
    """{name: class} of every exception of the package, imported from the module that its file is."""
    package = Path(tokencredit.__file__).parent
    kinds = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
    found = {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & kinds:
                module = ".".join(["tokencredit", *path.relative_to(package).with_suffix("").parts])
                found[node.name] = getattr(importlib.import_module(module), node.name)
    return found


def test_every_exception_comes_back_whole_from_another_process():
    """What a worker raises is pickled: type, message, notes and what it carries are the same afterwards."""
    made = {"VerifierError": ("bad failed on row 3", {"answer": "7"}), "WriteFailure": (28, "disk full", "a.json")}
    found = exceptions()
    assert {"VerifierError", "StoreError", "WrongWorker", "WriteFailure", "RunError"} <= found.keys()
    for name, kind in found.items():
        error = kind(*made.get(name, ("a message",)))
        error.add_note("of trace 4")
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), vars(back)) == (kind, str(error), vars(error)), name
    assert pickle.loads(pickle.dumps(VerifierError("bad", {"answer": "7"}))).row == {"answer": "7"}


def test_a_raising_verifier_names_the_row_or_says_error():
    def bad(completion, row):
        raise KeyError("points")

    row = {"answer": "7", "row_id": "data.jsonl, line 3"}
    with pytest.raises(VerifierError, match=r"verifier bad failed on data.jsonl, line 3: KeyError: 'points'") as caught:
        as_verifier(bad)("x", row)
    assert caught.value.row is row and isinstance(caught.value.__cause__, KeyError)
    assert as_verifier(bad, on_error="verdict")("x", row).reason == "error"
    with pytest.raises(VerifierError, match="a Verdict or a bool, not float"):
        as_verifier(lambda completion, row: 0.5)("x", row)
    with pytest.raises(ValueError, match="'raise' or 'verdict'"):
        as_verifier(bad, on_error="ignore")


# Loading


@pytest.mark.parametrize(("name", "near"), [("gsm8", "'gsm8k'"), ("rekcon", "'reckon'"), ("json", "'jsonl'")])
def test_an_unknown_task_has_a_nearest_name(name, near):
    known = "reckon, stories, gsm8k, jsonl"
    with pytest.raises(ValueError, match=rf"unknown task '{name}'\. Did you mean {near}\?.*{known}"):
        tasks.load(name)


def test_options_are_checked():
    with pytest.raises(TypeError, match=r"no option 'templte'. Did you mean 'template'\?"):
        tasks.load("gsm8k", templte="r1")
    with pytest.raises(TypeError, match="'jsonl' needs path"):
        tasks.load("jsonl")
    with pytest.raises(ValueError, match=r"unknown template 'r2'\. Did you mean 'r1'"):
        tasks.load("gsm8k", template="r2")
    with pytest.raises(ValueError, match="also needs data"):
        tasks.load("os.path:exists")


# GSM8K

PROBLEMS = [
    {"question": "Ann has 2 apples and buys 3. How many?", "answer": "2+3 = <<2+3=5>>5\n#### 5"},
    {"question": "A house costs $1,200,000. Half of it?", "answer": "It is <<1200000/2=600000>>600,000.\n#### 600,000"},
    {"question": "From 3 take 10.", "answer": "#### -7"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def problems(tmp_path):
    write(tmp_path / "train.jsonl", PROBLEMS)
    write(tmp_path / "test.jsonl", PROBLEMS[:1])
    return str(tmp_path)


@pytest.mark.parametrize("template", TEMPLATES)
def test_gsm8k_from_files(problems, template):
    task = tasks.load("gsm8k", path=problems, template=template, strict=True)
    rows = task.rows("train")
    assert [row["answer"] for row in rows] == ["5", "600,000", "-7"]
    assert rows[1]["row_id"] == "train.jsonl, line 2" and rows[1]["question"] in rows[1]["prompt"]
    assert len(task.rows("test")) == 1
    assert task.validate() == tasks.Validation(4)
    assert task.verify(TEMPLATES[template].answer("600000"), rows[1]).correct
    assert task.verify(TEMPLATES[template].answer("6"), rows[1]) == WRONG
    assert task.verify("5", rows[0], truncated=True).reason == "truncated"


def test_gsm8k_verifies_by_module_and_by_raw_rows():
    assert gsm8k.verify("<answer>600000</answer>", PROBLEMS[1]).correct
    assert gsm8k.verify("#### 5", {"answer": "5"}) == CORRECT
    assert gsm8k.verify(PROBLEMS[0]["answer"], PROBLEMS[0]).correct


def test_gsm8k_as_messages_and_limited(problems):
    task = tasks.load("gsm8k", path=problems, chat=True, template="boxed")
    messages = task.rows("train", limit=1, seed=3)[0]["prompt"]
    assert [message["role"] for message in messages] == ["system", "user"] and "boxed" in messages[0]["content"]
    for seed in range(5):
        smaller, larger = ({row["row_id"] for row in task.rows("train", limit, seed)} for limit in (1, 2))
        assert smaller < larger
    assert len(task.rows("train", limit=99)) == 3
    with pytest.raises(ValueError, match="'train' or 'test', not 'dev'"):
        task.rows("dev")


def test_gsm8k_says_what_is_missing(tmp_path, problems):
    with pytest.raises(FileNotFoundError, match=r"exactly one file train\*.jsonl .*0 fit \(there are: no files"):
        (tmp_path / "empty").mkdir()
        tasks.load("gsm8k", path=str(tmp_path / "empty")).rows()
    with pytest.raises(
        FileNotFoundError, match=r"no such file: .*trian.jsonl \(in .* there are: test.jsonl, train.jsonl\)"
    ):
        tasks.load("gsm8k", path=problems + "/trian.jsonl").rows()
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: the answer has no '####'"):
        bad = write(tmp_path / "bad.jsonl", [PROBLEMS[0], {"question": "?", "answer": "5"}])
        [tasks.load("gsm8k", path=bad).rows(split) for split in ("train", "test")]


# JSONL and Parquet


def test_jsonl_and_parquet_give_the_same_rows(tmp_path):
    import datasets

    records = [{"prompt": f"What is {n}+{n}?", "answer": str(2 * n), "level": n % 3} for n in range(40)]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "sums.parquet")
    lines, table = (
        tasks.load(f"jsonl:{write(tmp_path / 'sums.jsonl', records)}"),
        tasks.load(str(tmp_path / "sums.parquet")),
    )
    for split in ("train", "test"):
        plain = [[{key: row[key] for key in records[0]} for row in task.rows(split)] for task in (lines, table)]
        assert plain[0] == plain[1]
    parts = [{row["prompt"] for row in lines.rows(split)} for split in ("train", "test")]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 40 and 2 <= len(parts[1]) <= 16
    assert table.rows("train")[0]["row_id"].startswith("sums.parquet, row ")
    assert lines.validate() == table.validate() == tasks.Validation(40)


def test_a_file_of_ones_own_may_hold_dataclasses_and_hides_no_library(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "say hello", "word": "hello"}])
    for name in ("greetings_of_words.py", "math.py"):
        (tmp_path / name).write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Word:\n"
            "    text: str\n\n\ndef says(completion, row):\n    return Word(row['word']).text in completion\n"
        )
        task = tasks.load(f"{tmp_path / name}:says", path=path)
        (row,) = task.rows("train") + task.rows("test")
        assert task.verify("oh hello", row) == CORRECT and task_source(task) and sys.modules["math"] is math
    kept = set(sys.modules)
    (tmp_path / "broken.py").write_text("raise KeyError('x')\n")
    with pytest.raises(KeyError):
        tasks.load(f"{tmp_path}/broken.py:says", path=path)
    assert set(sys.modules) == kept


def test_an_instruction_goes_before_the_system_message_there_is(tmp_path):
    user = {"role": "user", "content": "6*7?"}
    for said in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        path = write(tmp_path / "a.jsonl", [{"prompt": [{"role": "system", "content": said}, user], "answer": 42}])
        task = tasks.load(path, template="boxed", test=path)
        (row,) = task.rows("test")
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert message_text(row["prompt"][0]) == TEMPLATES["boxed"].instruction + "\n\nBe brief."


def test_jsonl_columns_template_messages_and_number_answers(tmp_path):
    chat = [{"role": "user", "content": "6*7?"}]
    train = write(
        tmp_path / "a.jsonl",
        [{"q": chat, "gold": 42}, {"q": "Half?", "gold": 0.5}, {"q": "Solve", "gold": r"So \boxed{x+1}"}],
    )
    test = write(tmp_path / "b.jsonl", [{"q": "1+1?", "gold": "2"}])
    task = tasks.load(train, prompt="q", answer="gold", template="boxed", test=test)
    rows = task.rows("train")
    assert [row["answer"] for row in rows] == ["42", "0.5", "x+1"] and len(task.rows("test")) == 1
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"] and "Half?" in rows[1]["prompt"]
    assert jsonl.verify(r"\boxed{1+x}", rows[2]).correct and task.verify("<answer>42.0</answer>", rows[0]).correct
    assert task.validate().passed
    with pytest.raises(ValueError, match="give a template"):
        tasks.load(train, strict=True)


def test_the_data_that_verl_trains_on_is_a_task():
    path = str(Path(__file__).parent / "data" / "logs" / "verl_task" / "train.parquet")
    task = tasks.load(path, evaluated=False, test=path)
    rows = task.rows("test")
    assert [row["answer"] for row in rows] == ["3", "3"] and rows[0]["prompt"][0]["role"] == "user"
    assert task.verify("<answer>3</answer>", rows[0]).correct and task.validate().passed
    named = tasks.load(path, answer="extra_info.index", test=path)
    assert [row["answer"] for row in named.rows("test")] == ["0", "1"]
    with pytest.raises(ValueError, match=r"no answer \(column 'extra_info.gold' is empty; the row has: data_source"):
        tasks.load(path, answer="extra_info.gold").rows()


BAD_ROWS = [
    ({"prompt": "p"}, r"line 3: no answer \(column 'answer' is missing; the row has: prompt\)"),
    ({"prompt": "p", "answers": "1"}, r"line 3: no answer .*did you mean answer='answers'\?"),
    ({"prompt": "p", "answer": None}, r"line 3: no answer \(column 'answer' is empty"),
    ({"prompt": "p", "answer": "  "}, r"line 3: no answer \(column 'answer' is empty"),
    ({"prompt": "p", "answer": {"a": 1}}, r"line 3: an answer is text or a number, not dict"),
    ({"prompt": "p", "answer": True}, r"line 3: an answer is text or a number, not bool"),
    ({"answer": "1"}, r"line 3: no prompt"),
    ({"prompt": ["hello"], "answer": "1"}, r"line 3: a prompt is text or a list of messages"),
    ([1], r"line 3: a row is a JSON object"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "1"}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl.*{message}"):
        tasks.load(str(path)).rows()


def test_bad_files_are_named(tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"prompt": "p", "answer": "1"}\n{"prompt": "p", "ans')
    with pytest.raises(ValueError, match=r"torn.jsonl, line 2: not JSON"):
        tasks.load(str(tmp_path / "torn.jsonl")).rows()
    with pytest.raises(FileNotFoundError, match=r"nor is there a directory"):
        tasks.load(str(tmp_path / "none" / "x.jsonl")).rows()
    with pytest.raises(ValueError, match=r"names end in .jsonl or .parquet, not in '.csv'"):
        tasks.load(f"jsonl:{write(tmp_path / 'x.csv', [])}").rows()


def test_validation_names_the_gold_answers_that_fail(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2" * 1001}])
    validation = tasks.load(path).validate()
    assert validation.checked == 2 and not validation.passed
    assert validation.failures == (f"a.jsonl, line 2: {'2' * 80!r}: unparsed",)


def test_your_own_verifier(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"prompt": "say hello", "word": "hello"}])
    (tmp_path / "greetings.py").write_text("def says(completion, row):\n    return row['word'] in completion\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("greetings:says", f"{tmp_path}/greetings.py:says"):
        task = tasks.load(name, path=path)
        (row,) = task.rows("train") + task.rows("test")
        assert task.verify("oh hello", row) == CORRECT and task.verify("bye", row) == WRONG
    with pytest.raises(ValueError, match="no function 'say'; it has: says"):
        tasks.load("greetings:say", path=path)
    with pytest.raises(FileNotFoundError, match=r"no such file: nowhere\.py"):
        tasks.load("nowhere.py:says", path=path)
