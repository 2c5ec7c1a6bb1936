"""A verifier of one's own that hangs, crashes, prints or raises: bounded, and otherwise as if it were called here."""

import os
import subprocess
import sys
import threading
import time

import pytest

from tokencredit import tasks
from tokencredit.tasks.isolated import LOST, Isolated
from tokencredit.tasks.verdict import CORRECT, TIMEOUT, UNPARSED, WRONG, VerifierError, as_verifier

ROW = {"answer": "7", "row_id": "row 1"}


def closure(word="7"):
    """A function that cannot be pickled."""

    def verify(completion, row):
        if completion == "hang":
            while True:
                pass
        if completion == "integer":  # inside one operation, which no exception interrupts
            return 9**9**9 > 0
        if completion == "sleep":
            time.sleep(10**6)
        if completion == "crash":
            os._exit(3)
        if completion == "raise":
            raise KeyError(word)
        return row["answer"] == word == completion

    return verify


@pytest.fixture
def verify():
    return as_verifier(closure(), timeout=0.2)


def test_verdicts_are_those_of_the_function(verify):
    assert verify("7", ROW) == CORRECT and verify("8", ROW) == WRONG
    assert as_verifier(lambda completion, row: UNPARSED, timeout=1)("", {}) == UNPARSED
    told = as_verifier(lambda completion, row, truncated: truncated, timeout=1)
    assert told("x", {}, truncated=True) == CORRECT and told("x", {}) == WRONG


@pytest.mark.parametrize("completion", ["hang", "integer", "sleep", "crash"])
def test_a_call_that_does_not_end_is_a_timeout_and_the_next_is_answered(verify, completion):
    assert verify("7", ROW) == CORRECT
    assert verify(completion, ROW) == TIMEOUT
    assert verify("7", ROW) == CORRECT and verify("8", ROW) == WRONG


def test_workers_are_replaced_without_forking_this_process_again(monkeypatch):
    monkeypatch.setattr("tokencredit.tasks.isolated.WALL", 10**4)  # a busy machine takes long to spend 0.2 seconds
    isolated = Isolated(closure(), 0.2)
    started = isolated._process
    assert isolated("7", ROW) is True
    assert [isolated(text, ROW) for text in ("hang", "7", "integer", "7")] == [LOST, True, LOST, True]
    assert isolated.lost == 2 and isolated._process == started
    isolated.close()
    assert isolated("7", ROW) is True and isolated._process != started
    isolated.close()


def test_an_error_is_the_functions_own(verify):
    with pytest.raises(VerifierError, match=r"verifier verify failed on row 1: KeyError: '7'") as caught:
        verify("raise", ROW)
    assert isinstance(caught.value.__cause__, KeyError)
    assert as_verifier(closure(), on_error="verdict", timeout=1)("raise", ROW).reason == "error"
    with pytest.raises(VerifierError, match="a Verdict or a bool, not float"):
        as_verifier(lambda completion, row: 0.5, timeout=1)("x", ROW)


def test_a_row_that_json_cannot_hold_is_verified_here():
    here = os.getpid()
    verify = as_verifier(lambda completion, row: os.getpid() == here, timeout=1)
    assert verify("", {}) == WRONG
    assert verify("", {"day": {1, 2}}) == CORRECT and verify("", {"pair": (1, 2)}) == CORRECT


def test_threads_ask_one_at_a_time():
    verify, wrong = as_verifier(lambda completion, row: completion == row["answer"], timeout=5), []

    def ask(n):
        wrong.extend(k for k in range(50) if verify(str(k), {"answer": str(k + n % 2)}).correct is bool(n % 2))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_task_bounds_its_verifier(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "p", "answer": "7"}\n')
    task = tasks.load("jsonl", path=str(data), verifier=closure(), timeout=0.2)
    (row,) = task.rows("train") + task.rows("test")
    assert task.verify("7", row) == CORRECT and task.verify("hang", row) == TIMEOUT
    here = tasks.load("jsonl", path=str(data), verifier=lambda completion, row: os.getpid() == parent, timeout=None)
    parent = os.getpid()
    assert here.verify("7", row) == CORRECT
    with pytest.raises(ValueError, match="timeout=None is for a verifier of your own"):
        tasks.load("jsonl", path=str(data), timeout=None)
    with pytest.raises(ValueError, match="above 0 seconds"):
        tasks.load("jsonl", path=str(data), verifier=closure(), timeout=0)


def test_a_forked_process_asks_its_own_and_none_outlives_its_parent():
    code = """
import os
from tokencredit.tasks.verdict import as_verifier
verify = as_verifier(lambda completion, row: print("said", completion) or completion == "7", timeout=5)
assert verify("7", {}).correct
if (child := os.fork()) == 0:
    os._exit(0 if verify("7", {}).correct and not verify("8", {}).correct else 1)
assert os.waitpid(child, 0)[1] == 0
assert verify("7", {}).correct
"""
    # This waits until nobody holds the output any more: a worker that stays would keep it open.
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    # The forked process starts a worker of its own, which is warmed by the question that is known to end.
    assert done.stdout.split() == [word for n in "77787" for word in ("said", n)]


def test_a_function_that_always_hangs_is_soon_held_to_the_limit(monkeypatch):
    """Ten times the limit, for what a first call imports, is granted three times and not for a whole batch."""
    limits = []
    isolated = Isolated(lambda completion, row: True, 2.0)
    monkeypatch.setattr(isolated, "_ask", lambda question, seconds: limits.append(seconds) or "timeout")
    assert [isolated("a", {}) for _ in range(5)] == [LOST] * 5 and isolated.lost == 5
    assert limits == [20, 20, 20, 2, 2]
