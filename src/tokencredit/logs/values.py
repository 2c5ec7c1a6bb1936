"""The values of a log's columns, checked: numbers, ids, numbers per token. Errors name the place and the column."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from tokencredit.logs.files import LogRow, Place

NUMBERS = {int, float, bool, NoneType}
"""What a list of numbers may hold; None where there is none."""


def number(row: LogRow, column: str, place: Place) -> float | None:
    """A finite number; None and NaN are no number. Text that is one is read with a warning."""
    value = row.get(column)
    if isinstance(value, str):
        value = _number_in(value, column, place)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int | float):
        hint = " (a reward per token goes into token_reward)" if isinstance(value, list) else ""
        raise ValueError(f"{place}: {column!r} is a {type(value).__name__}, not a number{hint}: {_short(value)}")
    if math.isinf(value):
        raise ValueError(f"{place}: {column!r} is {value}, not a finite number")
    return float(value)


def _number_in(text: str, column: str, place: Place) -> float:
    try:
        found = float(text)
    except ValueError:
        raise ValueError(f"{place}: {column!r} is the text {_short(text)}, not a number") from None
    warnings.warn(f"{place.file}: numbers of {column!r} are written as text ({_short(text)})", stacklevel=4)
    return found


def whole(row: LogRow, column: str, place: Place) -> int | None:
    """An integer, or None."""
    value = number(row, column, place)
    if value is not None and value != int(value):
        raise ValueError(f"{place}: {column!r} is {value:g}, not a whole number")
    return None if value is None else int(value)


def ids(row: LogRow, column: str, place: Place) -> list[int] | None:
    """Token ids, or None."""
    value = row.get(column)
    if value is None:
        return None
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError(f"{place}: {column!r} is no list of token ids: {_short(value)}")
    if value and min(value) < 0:
        raise ValueError(f"{place}: {column!r} has the token id {min(value)}, and ids are not negative")
    return value


def is_numbers(value: Any) -> bool:
    """Whether it is a list of numbers, or of None where there is none."""
    return isinstance(value, list) and bool(value) and set(map(type, value)) <= NUMBERS


def flags(row: LogRow, column: str, place: Place) -> list[bool]:
    """A list of true and false, or of 1 and 0."""
    value = row.get(column)
    if not isinstance(value, list) or not set(map(type, value)) <= {int, bool, float} or not set(value) <= {0, 1}:
        raise ValueError(f"{place}: {column!r} is no list of 0 and 1: {_short(value)}")
    return [bool(x) for x in value]


def aligned(values: Mapping[str, Sequence[Any]], length: int, place: Place) -> None:
    """ValueError where a list of numbers per token has another length than the completion has tokens."""
    for name, column in values.items():
        if len(column) != length:
            raise ValueError(f"{place}: {name!r} has {len(column)} values for {length} tokens")


def finite(column: Sequence[Any]) -> list[float | None]:
    """Numbers per token, NaN and infinities as None."""
    if NoneType not in set(map(type, column)) and math.isfinite(sum(column)):
        return list(column)
    return [None if x is None or not math.isfinite(x) else float(x) for x in column]


def text_or_messages(row: LogRow, column: str, place: Place) -> Any:
    """A prompt or a completion: text, or messages with role and content."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value):
        deep = place.file.suffix == ".parquet"
        return [{"content": ""} | _given(each, deep) for each in value]
    raise ValueError(f"{place}: {column!r} is neither text nor messages with role and content: {_short(value)}")


def _given(value: Any, deep: bool) -> Any:
    """A message without what it does not have; `deep`: also inside of it, where Arrow gives all rows the same keys."""
    if isinstance(value, dict):
        return {k: _given(x, deep) if deep else x for k, x in value.items() if x is not None}
    return [_given(x, deep) for x in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
