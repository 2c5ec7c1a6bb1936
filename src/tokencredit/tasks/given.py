"""The task of completions that are there already: no prompts of its own, and only their answers to verify them by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokencredit.tasks import jsonl
from tokencredit.tasks.task import MAX_NEW_TOKENS
from tokencredit.tasks.verdict import Validation, Verdict

ADVICE = "completions that are given have no task: name one with --task"


@dataclass(frozen=True)
class Given:
    """Stands for a task where completions are given. A row's "answer", where it has one, verifies them, by math-verify;
    without one, and asked for prompts, it raises ValueError.
    """

    name = "given"
    max_new_tokens = MAX_NEW_TOKENS

    def rows(self, split: str = "train", limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        raise ValueError(f"there are no prompts to draw: {ADVICE}")

    def verify(self, completion: str, row: Mapping[str, Any], truncated: bool = False) -> Verdict:
        if row.get("answer") is None:
            raise ValueError(f"there is nothing to verify with: {ADVICE}")
        return jsonl.verify(completion, dict(row), truncated)

    def validate(self) -> Validation:
        return Validation(0)
