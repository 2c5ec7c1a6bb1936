"""A row of any layout -> `LoggedRollout`. Nothing that was logged is dropped: what has no field of its own is in
`rewards`, `tokens` or `others`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from tokencredit.logs.files import LogRow, Place
from tokencredit.logs.rollout import LoggedRollout
from tokencredit.logs.values import aligned, finite, flags, ids, is_numbers, number, text_or_messages, whole

SYNONYMS = {
    "step": ("step", "global_step"),
    "group": ("group", "group_id", "prompt_id", "prompt_idx", "example_id", "uid"),
    "reward": ("reward", "score"),
    "answer": ("answer", "ground_truth", "gts", "solution"),
    "prompt_ids": ("prompt_ids", "prompt_token_ids", "prompt_tokens"),
    "completion_ids": ("completion_ids", "token_ids", "response_ids", "response_tokens"),
    "mask": ("mask", "loss_mask", "completion_mask", "response_mask", "tool_mask"),
    "truncated": ("truncated", "is_truncated"),
    "turn_reward": ("turn_reward", "turn_rewards"),
}
"""Columns that are read as a field of `LoggedRollout`, the first that is there."""
TOKENS = {
    "advantage": ("advantages", "advantage", "credit"),
    "sampler_logprob": ("sampler_logprob", "inference_logprobs", "logprobs", "logprob", "rollout_log_probs"),
    "trainer_logprob": ("trainer_logprob", "trainer_logprobs", "old_log_probs"),
    "entropy": ("entropy", "entropies"),
    "token_reward": ("token_reward", "token_rewards", "token_level_rewards"),
}
"""Lists that are read as numbers per token of this name, the first that is there."""
NAMED = frozenset(name for columns in (*SYNONYMS.values(), *TOKENS.values()) for name in columns)


def read_text(row: LogRow, place: Place) -> LoggedRollout:
    """`prompt` and `completion`, as text, messages or ids; ids of text may stand beside it."""
    for name in ("prompt", "completion"):
        if isinstance(row[name], list) and row[name] and type(row[name][0]) is int:
            row = {**row, name: "", f"{name}_ids": row[name]}
    return build(row, place, *texts(row, place), ("prompt", "completion"))


def read_chat(row: LogRow, place: Place) -> LoggedRollout:
    """`messages`: what comes before the first assistant's turn is the prompt."""
    messages = text_or_messages(row, "messages", place)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if isinstance(messages, str) or not turns:
        raise ValueError(f"{place}: 'messages' has no assistant's turn, so there is no completion")
    return build(row, place, messages[: turns[0]], messages[turns[0] :], ("messages",))


def read_ids(row: LogRow, place: Place) -> LoggedRollout:
    """Token ids of prompt and completion, without their text."""
    return build(row, place, "", "")


def texts(row: LogRow, place: Place, prompt: str = "prompt", completion: str = "completion") -> tuple[Any, Any]:
    """The prompt and the completion in these columns, text or messages."""
    return text_or_messages(row, prompt, place), text_or_messages(row, completion, place)


def build(
    row: LogRow, place: Place, prompt: Any, completion: Any, used: Collection[str] = (), scalars: bool = False
) -> LoggedRollout:
    """A rollout of these texts, with what the row says besides.

    used     columns that have been read already
    scalars  every further number is a reward function's; else it is in `others`
    """
    at = {field: next((c for c in names if row.get(c) is not None), None) for field, names in SYNONYMS.items()}
    names = {field: column or field for field, column in at.items()}
    completion_ids = ids(row, names["completion_ids"], place)
    length = None if completion_ids is None else len(completion_ids)
    tokens = per_token(row, place, length)
    mask = None if at["mask"] is None else flags(row, names["mask"], place)
    if mask is not None and length is not None:
        aligned({names["mask"]: mask}, length, place)
    advantage = next((c for c in TOKENS["advantage"] if is_number(row.get(c))), None)
    taken = {*used, *at.values(), *tokens.values(), advantage, "finish_reason"}
    left = {name: value for name, value in row.items() if name not in taken and value is not None}
    rewards = {n: number(row, n, place) for n, x in left.items() if is_number(x)} if scalars else {}
    group = None if at["group"] is None else str(row[names["group"]])
    turns = row.get(names["turn_reward"])
    return LoggedRollout(
        prompt=prompt,
        completion=completion,
        reward=number(row, names["reward"], place),
        place=str(place),
        step=step_of(place) if at["step"] is None else whole(row, names["step"], place),
        group=group,
        rewards=rewards,
        advantage=None if advantage is None else number(row, advantage, place),
        turn_reward=finite(turns) if isinstance(turns, list) and is_numbers(turns) else None,
        prompt_ids=ids(row, names["prompt_ids"], place),
        completion_ids=completion_ids,
        mask=mask,
        tokens={name: finite(row[column]) for name, column in tokens.items()},
        truncated=_truncated(row, names["truncated"], place),
        answer=row.get(names["answer"]),
        others={name: value for name, value in left.items() if name not in rewards}
        | {name: row[name] for name in ("finish_reason",) if row.get(name) is not None},
    )


def per_token(row: LogRow, place: Place, length: int | None) -> dict[str, str]:
    """{name: column} of the numbers per token of a completion of `length` tokens: those of TOKENS, which must have a
    value for each, and any other list of numbers that has.
    """
    known = {
        name: column
        for name, columns in TOKENS.items()
        for column in [next((c for c in columns if is_numbers(row.get(c))), None)]
        if column is not None
    }
    if length is None:
        return known
    aligned({column: row[column] for column in known.values()}, length, place)
    more = {c: c for c, x in row.items() if c not in NAMED and isinstance(x, list) and len(x) == length}
    return known | {name: column for name, column in more.items() if is_numbers(row[column])}


def is_number(value: Any) -> bool:
    """Whether it is one number."""
    return isinstance(value, int | float)


def step_of(place: Place) -> int | None:
    """The step that a path names, as in `step_12/`."""
    found = re.findall(r"step[_-]?(\d+)", str(place.file))
    return int(found[-1]) if found else None


def _truncated(row: LogRow, column: str, place: Place) -> bool | None:
    value, ended = row.get(column), row.get("finish_reason")
    if value is None:
        return None if ended is None else ended == "length"
    if value not in (0, 1):
        raise ValueError(f"{place}: {column!r} is {value!r}, neither true nor false")
    return bool(value)
