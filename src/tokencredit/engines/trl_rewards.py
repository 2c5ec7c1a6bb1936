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

from tokencredit.engines.trainer import Trainer
from tokencredit.logs.conversation import turn_ends


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


def total(trainer: Trainer, per_function: Tensor) -> Tensor:
    """[N]: the weighted sum of the rewards [N, functions]; a function that gave none counts nothing."""
    return (per_function * trainer.reward_weights.to(per_function.device)).nansum(1)


def succeeded(trainer: Trainer) -> Tensor:
    """[N] bool: whose reward, of the latest rewards of all processes, is above what a success is."""
    return total(trainer, trainer.latest_rewards) > trainer.success_above


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


def check_token_rewards(rewards, completion_ids: list[list[int]], mask: Tensor, name: str) -> Tensor:
    """[B, T]: what a function of token rewards gave each completion, NaN where it gave none.

    rewards   for each completion None, or a list of numbers and None: one per token, or one per turn of the policy,
              which then stands at the turn's last token
    mask      [B, T] the tokens that the policy wrote and that count

    ValueError names the completion whose list is neither, and a reward at a token that the policy did not write.
    """
    if not hasattr(rewards, "__len__") or len(rewards) != len(completion_ids):
        raise ValueError(f"{name} must return a list with an entry for each of the {len(completion_ids)} completions")
    out = torch.full(mask.shape, math.nan, device=mask.device)
    for row, (given, ids, own) in enumerate(zip(rewards, completion_ids, mask.tolist())):
        if given is None or not any(own):
            continue
        given = [x if x is None else _number(x, name, row, ids) for x in given]
        ends = turn_ends(own)
        if len(given) not in (len(ids), len(ends)):
            raise ValueError(
                f"{name} returned {len(given)} rewards for completion {row}, which has {len(ids)} tokens and"
                f" {len(ends)} turns: one for each of either, None where there is none"
            )
        places = range(len(ids)) if len(given) == len(ids) else ends
        for t, reward in zip(places, given):
            if reward is not None and not own[t]:
                raise ValueError(
                    f"{name} gave completion {row} a reward at token {t}, which the policy did not write: put it at the"
                    " last token of the turn that earned it"
                )
            out[row, t] = math.nan if reward is None else reward
    return out


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
