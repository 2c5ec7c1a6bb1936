"""One row of each writer's layout -> `LoggedRollout`. Nothing that was logged is dropped: what has no field of its own is
in `rewards`, `tokens` or `others`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokencredit.logs.files import LogRow, Place
from tokencredit.logs.rollout import LoggedRollout
from tokencredit.logs.values import aligned, finite, ids, is_numbers, number, text_or_messages, whole

SYNONYMS = {
    "step": ("step", "global_step"),
    "group": ("group", "group_id", "prompt_id", "prompt_idx", "uid"),
    "reward": ("reward", "score"),
    "answer": ("answer", "ground_truth", "gts", "solution"),
    "prompt_ids": ("prompt_ids", "prompt_token_ids", "prompt_tokens"),
    "completion_ids": ("completion_ids", "token_ids", "response_ids", "response_tokens"),
    "mask": ("mask", "loss_mask", "completion_mask", "response_mask", "tool_mask"),
}
"""Columns that are read as a field of `LoggedRollout`, the first that is there."""
TOKENS = {
    "advantage": ("advantages", "advantage", "credit"),
    "sampler_logprob": ("sampler_logprob", "inference_logprobs", "logprobs", "logprob", "rollout_log_probs"),
    "trainer_logprob": ("trainer_logprob", "trainer_logprobs", "old_log_probs"),
    "entropy": ("entropy", "entropies"),
    "token_reward": ("token_reward", "token_rewards", "rewards", "token_level_rewards"),
}
"""Lists that are read as numbers per token of this name, the first that is there."""


def column_of(row: LogRow, field: str) -> str | None:
    """The column that holds a field."""
    return next((name for name in SYNONYMS[field] if row.get(name) is not None), None)


def read_text(row: LogRow, place: Place) -> LoggedRollout:
    """`prompt` and `completion`, text or messages; ids of either may stand beside them."""
    return _generic(row, place, text_or_messages(row, "prompt", place), text_or_messages(row, "completion", place))


def read_chat(row: LogRow, place: Place) -> LoggedRollout:
    """`messages`: what comes before the first assistant's turn is the prompt."""
    messages = text_or_messages(row, "messages", place)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if isinstance(messages, str) or not turns:
        raise ValueError(f"{place}: 'messages' has no assistant's turn, so there is no completion")
    return _generic(row, place, messages[: turns[0]], messages[turns[0] :], "messages")


def read_ids(row: LogRow, place: Place) -> LoggedRollout:
    """Token ids of prompt and completion, without their text."""
    return _generic(row, place, row.get("prompt_text") or "", row.get("completion_text") or "")


def _generic(row: LogRow, place: Place, prompt: Any, completion: Any, *used: str) -> LoggedRollout:
    found = {field: column_of(row, field) for field in SYNONYMS}
    names = {field: name or field for field, name in found.items()}
    completion_ids = ids(row, names["completion_ids"], place)
    length = None if completion_ids is None else len(completion_ids)
    tokens = per_token(row, place, length)
    mask = _mask(row, found["mask"], length, place)
    group, ended = row.get(names["group"]), row.get("finish_reason")
    truncated = row.get("truncated", None if ended is None else ended == "length")
    taken = {*found.values(), *tokens.values(), *used, "prompt", "completion", "truncated"}
    rest = {name: value for name, value in row.items() if name not in taken}
    return LoggedRollout(
        prompt=prompt,
        completion=completion,
        reward=number(row, names["reward"], place),
        place=str(place),
        step=whole(row, names["step"], place),
        group=None if group is None else str(group),
        prompt_ids=ids(row, names["prompt_ids"], place),
        completion_ids=completion_ids,
        mask=mask,
        tokens={name: finite(row[column]) for name, column in tokens.items()},
        truncated=truncated if isinstance(truncated, bool) else None,
        answer=row.get(names["answer"]),
        others=rest,
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
    ours = {column for columns in (*SYNONYMS.values(), *TOKENS.values()) for column in columns}
    more = {c: c for c, x in row.items() if c not in ours and is_numbers(x) and len(x) == length}
    return known | more


def _mask(row: LogRow, column: str | None, length: int | None, place: Place) -> list[bool] | None:
    if column is None:
        return None
    value = row[column]
    if not isinstance(value, list) or any(x not in (0, 1) for x in value):
        raise ValueError(f"{place}: {column!r} is no list of 0 and 1")
    if length is not None:
        aligned({column: value}, length, place)
    return [bool(x) for x in value]


def read_verl(row: LogRow, place: Place) -> LoggedRollout:
    """verl's dump: texts decoded without special tokens; every further number is a reward's."""
    known = ("input", "output", "gts", "score", "step")
    return LoggedRollout(
        prompt=text_or_messages(row, "input", place),
        completion=text_or_messages(row, "output", place),
        reward=number(row, "score", place),
        place=str(place),
        step=whole(row, "step", place),
        group=None if row.get("uid") is None else str(row["uid"]),
        rewards=_scalars(row, known, place),
        answer=row.get("gts"),
        others={k: v for k, v in row.items() if k not in known and not _is_number(v)},
    )


def read_trl(row: LogRow, place: Place) -> LoggedRollout:
    """TRL's table of completions: a column per reward function, NaN where one does not apply. Their sum is the reward,
    since the table has no weights; a column `reward` says otherwise.
    """
    known = ("step", "prompt", "completion", "advantage", "completion_ids", "prompt_ids", "reward")
    completion_ids = ids(row, "completion_ids", place)
    tokens = {} if completion_ids is None else per_token(row, place, len(completion_ids))
    rewards = _scalars(row, known, place)
    given = [value for value in rewards.values() if value is not None]
    advantage = row.get("advantage")
    return LoggedRollout(
        prompt=text_or_messages(row, "prompt", place),
        completion=text_or_messages(row, "completion", place),
        reward=number(row, "reward", place) if "reward" in row else (sum(given) if given else None),
        place=str(place),
        step=whole(row, "step", place),
        rewards=rewards,
        prompt_ids=ids(row, "prompt_ids", place),
        completion_ids=completion_ids,
        tokens={name: finite(row[column]) for name, column in tokens.items()},
        others={k: v for k, v in row.items() if k not in known and k not in tokens.values() and not _is_number(v)}
        | ({"advantage": advantage} if _is_number(advantage) else {}),
    )


def read_own_tokens(row: LogRow, place: Place) -> LoggedRollout:
    """A run directory's `tokens/step_*.parquet`."""
    length = len(row["token_ids"])
    named = ("step", "group", "prompt", "completion", "reward", "token_ids", "tokens", "role")
    tokens = per_token(row, place, length)
    return LoggedRollout(
        prompt=row["prompt"],
        completion=row["completion"],
        reward=number(row, "reward", place),
        place=str(place),
        step=whole(row, "step", place),
        group=str(row["group"]),
        completion_ids=ids(row, "token_ids", place),
        tokens={name: finite(row[column]) for name, column in tokens.items()},
        others={k: v for k, v in row.items() if k not in named and k not in tokens.values() and v is not None}
        | {k: row[k] for k in ("tokens", "role") if row.get(k) is not None},
    )


def _scalars(row: LogRow, known: Iterable[str], place: Place) -> dict[str, float | None]:
    return {name: number(row, name, place) for name, x in row.items() if name not in known and _is_number(x)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def as_json(text: Any) -> Any:
    """What a JSON text says; anything else as it is."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text
