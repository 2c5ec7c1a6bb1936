"""A task in the shapes that TRL takes: a dataset of prompts, a reward function, scorers; and its rows in what comes
back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from tokencredit.engines import scorers
from tokencredit.engines.config import TrainConfig
from tokencredit.engines.recorder import Recorder
from tokencredit.engines.vine import step_gain
from tokencredit.lm.sampling import end_tokens


def training_rows(config: TrainConfig, task: Any) -> tuple[list[dict], list[int]]:
    """The rows, and their indices in the order in which they are used: the same for every method at the same seed.

    A task with an endless stream of `prompts` gives as many as are needed; a finite one is used whole, shuffled anew
    for every epoch.
    """
    needed = config.steps * config.prompts
    if hasattr(task, "prompts"):
        rows = task.rows("train", needed, config.seed)
        return rows, list(range(needed))
    rows = task.rows("train", None, config.seed)
    if not rows:
        raise ValueError(f"{config.task} has no prompts to train on")
    order: list[int] = []
    for epoch in range(-(-needed // len(rows))):
        order += random.Random(f"{config.seed} {epoch}").sample(range(len(rows)), len(rows))
    return rows, order[:needed]


def prompts_of(rows: Sequence[dict], order: Sequence[int]) -> Dataset:
    """What TRL sees of the rows: their prompts and numbers. Arrow would make one type of a column and one set of keys
    of all rows.
    """
    return Dataset.from_dict({"prompt": [row["prompt"] for row in rows], "row": list(range(len(rows)))}).select(order)


def make_reward(task: Any, tokenizer: Any, model: Any = None, rows: Sequence[dict] | None = None) -> Callable:
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
            verdicts.append(task.verify(_text_of(completion), row, not ends & set(ids)))
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


def _text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def judged(recorder: Recorder, task: Any, rows: Sequence[dict]) -> Callable[[dict], None]:
    """The recorder, given the task's rows and the verifier's reasons with every batch."""

    def record(batch: dict) -> None:
        own = [rows[row["row"]] for row in batch["rows"]]
        reasons = []
        for row, text, cut, success in list(zip(own, batch["texts"], batch["truncated"], batch["success"]))[
            : recorder.config.record_rows
        ]:
            verdict = task.verify(_text_of(text), row, cut)
            reasons.append(verdict.reason if verdict.correct == success else "correct" if success else "wrong")
        recorder.record(batch | {"rows": own, "reasons": reasons})

    return record


def on_rows(scorer: Callable, rows: Sequence[dict]) -> Callable:
    """The scorer, given the task's rows in place of the dataset's."""
    return lambda trainer, inputs, batch: scorer(trainer, [rows[row["row"]] for row in inputs], batch)


def make_scorers(task: Any, tokenizer: Any, max_new_tokens: int, batch: int = 512) -> dict[str, Callable]:
    """Scores beyond a forward pass that the task can give: `step_gain`, of the embedded world `exact_value` and
    `oracle_positions`.

    batch    completions sampled at once
    """
    found = {"step_gain": step_gain(task, tokenizer, max_new_tokens, batch=batch)}
    if getattr(task, "name", "") == "reckon":
        found["exact_value"] = _exact_value(task, tokenizer, max_new_tokens)
    if hasattr(task, "deciding"):
        found["oracle_positions"] = _oracle_positions(task, tokenizer)
    return found


def _exact_value(task: Any, tokenizer: Any, max_new_tokens: int) -> Callable:
    """Q − V of every token from the model's own prefix tree, where the world is small enough for it."""

    def exact_value(trainer, inputs, batch):
        model = trainer.accelerator.unwrap_model(trainer.model)
        training = model.training
        model.eval()
        scores = scorers.exact_value(
            model,
            tokenizer,
            task,
            inputs,
            batch["completion_ids"],
            batch["completion_mask"].bool(),
            max_new_tokens=max_new_tokens,
            temperature=trainer.temperature,
        )
        model.train(training)
        return scores

    return exact_value


def _oracle_positions(task: Any, tokenizer: Any) -> Callable:
    return lambda trainer, inputs, batch: scorers.oracle_positions(
        tokenizer, task, inputs, batch["completion_ids"], batch["completion_mask"].bool()
    )
