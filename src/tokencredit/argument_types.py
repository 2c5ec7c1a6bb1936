"""Numbers on the command line: a flag's name says what kind of number it takes, in every command the same.

`WHOLE` and `REAL` are the kinds by name; `give_kinds` puts them in the place of a parser's int and float, so that what
means nothing is refused before anything is loaded, and argparse says which flag it was:

    argument --prompts: must be at least 1, got 0
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from tokencredit.limits import check_rows

SEEDS = 2**32
"""NumPy's seeds are below this."""


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number


def _held(number: int) -> int:
    try:
        return check_rows(number, "a number of")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """How many of what a machine has to hold: at least one."""
    return _held(_whole(text, 1))


def count_or_none(text: str) -> int:
    """How many; 0 for none."""
    return _held(_whole(text, 0))


def step(text: str) -> int:
    """An optimizer step, from 0."""
    return _whole(text, 0)


def seed(text: str) -> int:
    """A seed that every generator takes."""
    number = _whole(text, 0)
    if number >= SEEDS:
        raise argparse.ArgumentTypeError(f"must be below {SEEDS:,}, got {number:,}")
    return number


def _real(text: str, meaning: str, fits: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not (math.isfinite(number) and fits(number)):
        raise argparse.ArgumentTypeError(f"must be {meaning}, got {text}")
    return number


def finite(text: str) -> float:
    """A reward: any number."""
    return _real(text, "a number", lambda x: True)


def positive(text: str) -> float:
    """A rate, a speed, a size: above 0."""
    return _real(text, "a number above 0", lambda x: x > 0)


def not_negative(text: str) -> float:
    """A cost: 0 or above."""
    return _real(text, "a number not below 0", lambda x: x >= 0)


def temperature(text: str) -> float:
    """Of a softmax that is sampled: above 0."""
    return _real(text, "a temperature above 0", lambda x: x > 0)


def size(text: str) -> int:
    """Bytes of memory: 4G, 1.5G, 800M; a number alone is bytes.

    >>> size("1.5G")
    1610612736
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    plain = text.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (plain[:-1], units[plain[-1]]) if plain[-1:] in units else (plain, 1)
    try:
        found = float(number) * unit
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found >= 1):
        raise argparse.ArgumentTypeError(f"must be a size like 4G or 800M, got {text!r}")
    return int(found)


def fraction(text: str) -> float:
    """A share or a probability, the ends included."""
    return _real(text, "between 0 and 1", lambda x: 0 <= x <= 1)


def positive_fraction(text: str) -> float:
    """A share that is not nothing."""
    return _real(text, "above 0 and at most 1", lambda x: 0 < x <= 1)


COUNTS = (
    *("prompts", "samples", "completions", "rollouts", "group", "batch", "sub_batch", "num", "operands"),
    *("seeds", "check_seeds", "steps", "updates", "rates", "workers", "max_new_tokens", "bootstraps"),
    *("confirm", "fresh", "eval_prompts", "sweep_prompts", "sweep_fresh", "condition_prompts", "final_prompts"),
    *("final_samples", "marks", "held_out", "entropy", "reward", "effect_rollouts", "pairs", "tokens"),
)
WHOLE: dict[str, Callable[[str], int]] = {
    **dict.fromkeys(COUNTS, count),
    **dict.fromkeys(("top_k", "trees", "directions", "spent"), count_or_none),
    **dict.fromkeys(("checkpoint", "step"), step),
    "seed": seed,
}
REAL: dict[str, Callable[[str], float]] = {
    **dict.fromkeys(("temperature", "temperatures"), temperature),
    **dict.fromkeys(("tokens_per_second", "cost_rollout", "budget", "rates", "decades", "eps"), positive),
    **dict.fromkeys(("minutes", "learning_rate", "gpus_per_worker"), positive),
    "success_above": finite,
    **dict.fromkeys(("success", "select", "control", "skip_below", "margin", "threshold", "collapse"), fraction),
    "cost_prompt": not_negative,
    "top_p": positive_fraction,
}


def give_kinds(parser: argparse.ArgumentParser) -> None:
    """Give every flag of a parser and of its commands that takes an int or a float the kind that its name has."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                give_kinds(command)
        elif action.type in (int, float):
            action.type = (WHOLE if action.type is int else REAL).get(action.dest, action.type)
