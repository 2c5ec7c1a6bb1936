"""Word problems: the answer is what the story says, the two parts share no prompt, and the verdict is the outcome."""

import re
from collections import Counter

import pytest

from tokencredit import tasks
from tokencredit.tasks.stories import Stories

TASKS = [Stories(), Stories(steps=2), Stories(steps=2, largest=99)]


def told(prompt: str) -> int:
    """The answer by reading the story, sentence by sentence."""
    total = None
    for sentence in prompt.partition(" How many")[0].split(". "):
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if total is None:
            total = numbers[0] * (numbers[1] if "boxes" in sentence else 1)
        else:
            total += numbers[0] * (-1 if re.search(r"loses|sells|of them to", sentence) else 1)
    return total


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_what_the_story_says(task):
    rows = task.rows("train", 300)
    assert [row["answer"] for row in rows] == [str(told(row["prompt"])) for row in rows]
    assert all(int(row["answer"]) >= 1 for row in rows)
    assert {len(re.findall(r"[-+*]", row["equation"])) for row in rows} == {task.steps}


def test_parts_share_no_prompt_and_a_seed_is_a_stream():
    task = Stories()
    train, test = (Counter(row["prompt"] for row in task.rows(split, 2000)) for split in ("train", "test"))
    assert not train.keys() & test.keys()
    assert task.rows("train", 50, seed=3) == task.rows("train", 80, seed=3)[:50] != task.rows("train", 50, seed=4)


@pytest.mark.parametrize(
    ("text", "truncated", "reason"),
    [
        ("Tom has 12 apples.", False, "correct"),
        ("3 + 9 = 12", False, "correct"),
        ("He had 12 and now has 1,200.", False, "wrong"),
        ("It is -12.", False, "wrong"),
        ("It is 12.0", False, "correct"),
        ("Twelve.", False, "unparsed"),
        ("Tom has 12", True, "truncated"),
    ],
)
def test_the_last_number_is_the_answer(text, truncated, reason):
    assert Stories().verify(text, {"answer": "12"}, truncated).reason == reason


def test_it_is_a_task_by_name_and_its_dials_are_checked():
    task = tasks.load("stories", steps=2)
    assert task.validate().passed
    for options in ({"steps": 3}, {"largest": 2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            tasks.load("stories", **options)
