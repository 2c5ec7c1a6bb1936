"""Easy word problems without end, for small language models: one or two steps of arithmetic in a short story.

    prompt       Tom has 3 apples. Ann gives Tom 4 more. How many apples does Tom have now? Answer in one short
                 sentence.
    completion   Tom has 7 apples now.

The reward is the outcome alone: the last number of the text is the answer. A model of 135M parameters solves a part of
them at once and learns the rest within some hundred rollouts, where GSM8K gives it no signal.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tokencredit.tasks.data import check_split, split_of
from tokencredit.tasks.verdict import CORRECT, TRUNCATED, UNPARSED, WRONG, Validation, Verdict

NAMES = ("Tom", "Ann", "Ben", "Lily", "Omar", "Mia", "Jack", "Nina", "Sam", "Ruth")
THINGS = ("apples", "pens", "books", "coins", "cards", "eggs", "shells", "stamps", "marbles", "cookies")
GAINS = ("{friend} gives {name} {n} more.", "{name} buys {n} more.", "{name} finds {n} more.")
LOSSES = ("{name} loses {n} of them.", "{name} gives {n} of them to {friend}.", "{name} sells {n} of them.")
QUESTION = "How many {things} does {name} have now? Answer in one short sentence."
NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")
DEFAULT_LIMIT = 2048


@dataclass(frozen=True)
class Stories:
    """The task. Dials: `steps`, how many operations a story takes (1 or 2); `largest`, the largest number it names.

    A first step may be a product ("4 boxes with 5 pens in each"); the others add or take away, and never all of it.
    """

    steps: int = 1
    largest: int = 9
    name = "stories"
    max_new_tokens = 32

    def __post_init__(self) -> None:
        if self.steps not in (1, 2):
            raise ValueError(f"steps is 1 or 2, not {self.steps!r}")
        if not 3 <= self.largest <= 1000:
            raise ValueError(f"largest is the largest number in a story, 3 to 1000, not {self.largest!r}")

    def prompts(self, split: str = "train", seed: int = 0) -> Iterator[dict[str, Any]]:
        """Endless independent draws; equal (split, seed) give equal prompts in equal order. A fifth of all prompts, by
        MD5, are "test".
        """
        check_split(split)
        rng = random.Random(f"stories {split} {seed}")
        while True:
            row = self.draw(rng)
            if split_of(row["prompt"]) == split:
                yield row

    def rows(self, split: str = "train", limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """The first `limit` (default 2048) prompts of a stream: `prompt`, `answer`, `equation`, `row_id`."""
        return list(islice(self.prompts(split, seed), DEFAULT_LIMIT if limit is None else limit))

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """One story: how it begins, what happens, what is asked."""
        name, friend = rng.sample(NAMES, 2)
        words = {"name": name, "friend": friend, "things": rng.choice(THINGS)}
        total = self._number(rng)
        equation, sentences, left = str(total), [f"{name} has {total} {words['things']}."], self.steps
        if rng.random() < 1 / 3:
            each = self._number(rng)
            equation, sentences = (
                f"{total} * {each}",
                [f"{name} has {total} boxes with {each} {words['things']} in each."],
            )
            total, left = total * each, left - 1
        for _ in range(left):
            n = self._number(rng)
            loses = rng.random() < 0.5 and n < total
            sentences.append(rng.choice(LOSSES if loses else GAINS).format(n=n, **words))
            equation += f" {'-' if loses else '+'} {n}"
            total += -n if loses else n
        prompt = " ".join([*sentences, QUESTION.format(**words)])
        return {"prompt": prompt, "answer": str(total), "equation": equation, "row_id": prompt}

    def verify(self, completion: str, row: dict[str, Any], truncated: bool = False) -> Verdict:
        """Outcome only: is the last number of the text the answer? A text that was cut off has not answered."""
        if truncated:
            return TRUNCATED
        found = NUMBER.findall(completion)
        if not found:
            return UNPARSED
        return CORRECT if float(found[-1].replace(",", "").replace("−", "-")) == float(row["answer"]) else WRONG

    def validate(self, num: int = 200) -> Validation:
        """A sentence with the answer passes; one with another number, cut short or without a number does not."""
        failures = []
        for row in self.rows("test", num):
            other = int(row["answer"]) + 1
            cases = (
                (f"The answer is {row['answer']}.", False, "correct"),
                (f"{row['equation']} = {other}", False, "wrong"),
                (f"It is {row['answer']}", True, "truncated"),
                ("I do not know.", False, "unparsed"),
            )
            for text, truncated, reason in cases:
                if (found := self.verify(text, row, truncated).reason) != reason:
                    failures.append(f"{row['prompt']} {text}: {found}, expected {reason}")
        return Validation(4 * num, tuple(failures))

    def _number(self, rng: random.Random) -> int:
        return rng.randint(2, self.largest)
