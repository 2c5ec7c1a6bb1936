"""FORMATS: what a trainer's log looks like, and who reads a row of it. One entry per layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokencredit.logs import readers
from tokencredit.logs.files import LogRow, Place
from tokencredit.logs.rollout import LoggedRollout


@dataclass(frozen=True)
class Format:
    """The layout of a log.

    what    one line for tables and messages
    needs   columns by which it is told; `a|b` where either will do
    read    a row and its place -> a rollout
    source  the code that writes it
    """

    name: str
    what: str
    needs: tuple[str, ...]
    read: Callable[[LogRow, Place], LoggedRollout]
    source: str

    def missing(self, columns: Iterable[str]) -> list[str]:
        """What of `needs` is not among the columns."""
        there = set(columns)
        return [need for need in self.needs if not there & set(need.split("|"))]


_IDS = "|".join(readers.SYNONYMS["completion_ids"])
_PROMPT_IDS = "|".join(readers.SYNONYMS["prompt_ids"])
FORMATS = {
    each.name: each
    for each in (
        Format(
            "verl",
            "verl's trainer.rollout_data_dir and validation_data_dir: STEP.jsonl",
            ("input", "output", "score", "step"),
            readers.read_verl,
            "volcengine/verl, verl/trainer/ppo/ray_trainer.py, _dump_generations, at 00401103",
        ),
        Format(
            "tokencredit",
            "our run directories: tokens/step_*.parquet",
            ("step", "group", "prompt", "completion", "reward", "success", "token_ids", "tokens"),
            readers.read_own_tokens,
            "tokencredit, runs.py, token_table",
        ),
        Format(
            "trl",
            "TRL's log_completions: completions/completions_*.parquet",
            ("step", "prompt", "completion", "advantage"),
            readers.read_trl,
            "huggingface/trl 1.16.0, trl/trainer/grpo_trainer.py, GRPOTrainer.log",
        ),
        Format("text", "prompt and completion, as text or messages", ("prompt", "completion"), readers.read_text, ""),
        Format("chat", "messages of prompt and completion", ("messages",), readers.read_chat, ""),
        Format("ids", "token ids of prompt and completion", (_PROMPT_IDS, _IDS), readers.read_ids, ""),
    )
}
"""In the order in which they are tried."""


def format_of(columns: Iterable[str], where: str) -> Format:
    """The format that has these columns. ValueError says which came nearest and what it lacks."""
    columns = list(columns)
    for each in FORMATS.values():
        if not each.missing(columns):
            return each
    nearest = min(FORMATS.values(), key=lambda each: len(each.missing(columns)) / len(each.needs))
    raise ValueError(
        f"{where} fits no format. Nearest is {nearest.name} ({nearest.what}), but there is no column"
        f" {' and no '.join(nearest.missing(columns))}; there are: {', '.join(columns) or 'none'}. Say which column is"
        ' which, as in columns={"reward": "score"} or --column reward=score'
    )
