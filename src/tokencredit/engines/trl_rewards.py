"""Reward functions for the TRL engine, checked: one finite number for each completion, and errors that name the
function.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor


def checked(function: Callable, name: str) -> Callable:
    """The function with its results checked. Reward models (modules) are left alone: TRL reads their logits itself."""
    if isinstance(function, torch.nn.Module) or not callable(function):
        return function
    if _is_async(function):

        async def reward(completions, **columns):
            with _naming(name):
                rewards = await function(completions=completions, **columns)
            return check(rewards, completions, name)

    else:

        def reward(completions, **columns):
            with _naming(name):
                rewards = function(completions=completions, **columns)
            return check(rewards, completions, name)

    reward.__name__ = name
    return reward


def check(rewards, completions: list, name: str) -> list[float | None]:
    """A reward function's result as a list of finite numbers; None, as in TRL, means that it does not apply to that
    completion.
    """
    if not hasattr(rewards, "__iter__"):
        raise TypeError(
            f"reward function {name} returned {type(rewards).__name__}, not a list with one reward for each completion"
        )
    rewards = rewards.tolist() if isinstance(rewards, Tensor) else list(rewards)
    if len(rewards) != len(completions):
        raise ValueError(
            f"reward function {name} returned {len(rewards)} rewards for {len(completions)} completions, not one for"
            " each"
        )
    return [
        value if value is None else _number(value, name, row, completions[row]) for row, value in enumerate(rewards)
    ]


def check_scored(per_function: Tensor, names: list[str]) -> None:
    """Raise ValueError for the first rollout to which no reward function gave a number ([N, functions], NaN for
    None).
    """
    unscored = torch.isnan(per_function).all(1)
    if unscored.any():
        row = int(unscored.nonzero()[0, 0])
        raise ValueError(
            f"every reward function ({', '.join(names)}) returned None for completion {row}: give each completion a"
            " number (0.0 for no answer)"
        )


def _number(value, name: str, row: int, completion) -> float:
    if not isinstance(value, Real) and not (hasattr(value, "item") and getattr(value, "ndim", 1) == 0):
        raise TypeError(
            f"reward function {name} returned {value!r} for completion {row}: {str(completion)[:200]!r}, not a number"
        )
    if not math.isfinite(value):
        raise ValueError(
            f"reward function {name} returned {value} for completion {row}: {str(completion)[:200]!r}. "
            "Rewards must be finite; None means that the function does not apply"
        )
    return float(value)


class _naming:
    """Adds the name of the reward function to whatever it raises."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Exception):
            error.add_note(f"raised by the reward function {self.name}")


def _is_async(function: Callable) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)
