"""A task in the shapes that TRL takes: a dataset of prompts, a reward function, scorers; and its rows in what comes
back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from tokencredit.lm.models import CausalModel, Tokenizer
from tokencredit.lm.prompts import Prompt, as_asked, completion_text
from tokencredit.lm.sampling import end_tokens
from tokencredit.tasks.task import Endless, Row, Task
from tokencredit.tasks.verdict import name_row
from tokencredit.train_config import TrainConfig


def training_rows(config: TrainConfig, task: Task) -> tuple[list[dict], list[int]]:
    """The rows, and their indices in the order in which they are used: the same for every method at the same seed.

    A task with an endless stream of `prompts` gives as many as are needed; a finite one is used whole, shuffled anew
    for every epoch.
    """
    needed = config.steps * config.prompts
    if isinstance(task, Endless):
        rows = task.rows("train", needed, config.seed)
        return rows, list(range(needed))
    rows = task.rows("train", None, config.seed)
    if not rows:
        raise ValueError(f"{config.task} has no prompts to train on")
    order: list[int] = []
    for epoch in range(-(-needed // len(rows))):
        order += random.Random(f"{config.seed} {epoch}").sample(range(len(rows)), len(rows))
    return rows, order[:needed]


def prompts_of(rows: Sequence[Row], order: Sequence[int], chat: bool | None = None) -> Dataset:
    """What TRL sees of the rows: their prompts, in a chat where one is asked for, and their numbers. Arrow holds the
    numbers alone: it would make one type of a column and one set of keys of all rows.

    ValueError names a row where some prompts are text and others are messages: TRL takes a batch as either.
    """
    prompts = [as_asked(row["prompt"], chat) for row in rows]
    for row, prompt in zip(rows, prompts):
        if isinstance(prompt, str) != isinstance(prompts[0], str):
            kinds = ("text", "messages") if isinstance(prompt, str) else ("messages", "text")
            raise ValueError(
                f"{name_row(row)}: the prompt is {kinds[0]}, and that of {name_row(rows[0])} is {kinds[1]}: --chat"
                " (chat=True) asks text as a user's message, or leave one kind out"
            )
    return Dataset.from_dict({"row": list(order)}).with_transform(partial(_with_prompts, prompts))


def _with_prompts(prompts: Sequence[Prompt], batch: dict[str, list[int]]) -> dict[str, list[Any]]:
    return {"prompt": [prompts[i] for i in batch["row"]], **batch}


def make_reward(
    task: Task, tokenizer: Tokenizer, model: CausalModel | None = None, rows: Sequence[Row] | None = None
) -> Callable[..., list[float]]:
    """TRL's reward function of a task's verifier: 1 for correct, 0 otherwise; the verdicts' reasons join TRL's table of
    completions.

    rows    the task's rows, which the dataset's column "row" numbers; None where the dataset's own columns are the rows
    model   whose generation config may name further end tokens
    """
    ends = {tokenizer.eos_token_id} if model is None else set(end_tokens(model, tokenizer))

    def reward(prompts, completions, completion_ids, log_extra=None, **columns):
        verdicts = []
        for i, (completion, ids) in enumerate(zip(completions, completion_ids)):
            row = rows[columns["row"][i]] if rows is not None else _row_of(prompts[i], columns, i)
            verdicts.append(task.verify(completion_text(completion), row, not ends & set(ids)))
        if log_extra:
            log_extra("reason", [v.reason for v in verdicts])
        return [float(v.correct) for v in verdicts]

    reward.__name__ = "correct"
    return reward


def _row_of(prompt: Any, columns: dict[str, Sequence], i: int) -> dict:
    """A row put together from a dataset's columns, without what Arrow filled in where the row had nothing."""
    hidden = ("trainer_state", "log_metric", "environments")
    row = {k: column[i] for k, column in columns.items() if k not in hidden}
    return {"prompt": prompt} | {k: v for k, v in row.items() if v is not None}
