"""The task of completions that are there already: no prompts of its own, and nothing that could verify them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokencredit.tasks.task import MAX_NEW_TOKENS
from tokencredit.tasks.verdict import Validation, Verdict

ADVICE = "completions that are given have no task: name one with --task"


@dataclass(frozen=True)
class Given:
    """Stands for a task where completions are only scored. Asked for prompts or verdicts, it raises ValueError."""

    name = "given"
    max_new_tokens = MAX_NEW_TOKENS

    def rows(self, split: str = "train", limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        raise ValueError(f"there are no prompts to draw: {ADVICE}")

    def verify(self, completion: str, row: Mapping[str, Any], truncated: bool = False) -> Verdict:
        raise ValueError(f"there is nothing to verify with: {ADVICE}")

    def validate(self) -> Validation:
        return Validation(0)
