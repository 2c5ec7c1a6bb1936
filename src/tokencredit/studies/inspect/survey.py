"""One pass over a log: what is counted of every group of rollouts, in memory that grows with the groups alone; and
which of them are looked at closely.

Arrays are over groups [G], the rollouts of one prompt in one step. A group is known by a number made of its step and
its name, so that a second pass finds it again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokencredit.lm.prompts import prompt_text
from tokencredit.logs import LoggedRollout
from tokencredit.logs.encoding import prompt_key

NUMBERS = (
    *("step", "group", "prompt", "rollouts", "rewarded", "reward", "low", "high", "success", "length"),
    *("known_cut", "cut", "entropy", "entropy_tokens", "distinct"),
)
START = (0, 0, 0.0, np.inf, -np.inf, 0, 0, 0, 0, 0.0, 0, 0)
"""Of the numbers behind step, group and prompt."""
MOST_COLUMNS = 8
"""Reward columns whose sums are kept; of more, the first ones are."""


def number_of(text: str) -> int:
    """63 bits that name a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def group_number(rollout: LoggedRollout) -> int:
    """What names the group of a rollout, of whichever step."""
    name = prompt_number(rollout) if rollout.group is None else rollout.group
    return number_of(f"{step_of(rollout)} {name}")


def prompt_number(rollout: LoggedRollout) -> int:
    """What names its prompt."""
    return number_of(str(prompt_key(rollout, rollout.prompt_ids or ())))


def step_of(rollout: LoggedRollout) -> int:
    """0 where the log knows no steps."""
    return rollout.step or 0


def length_of(rollout: LoggedRollout) -> int:
    """Tokens of a completion, those of tools and other turns left out; characters where the log has no tokens."""
    if rollout.mask is not None:
        return sum(rollout.mask)
    for each in (rollout.completion_ids, *rollout.tokens.values()):
        if each is not None:
            return len(each)
    return len(prompt_text(rollout.completion))


def has_tokens(rollout: LoggedRollout) -> bool:
    """Whether the log knows the tokens of the completion, by id or by what was measured on them."""
    return any(each is not None for each in (rollout.mask, rollout.completion_ids)) or bool(rollout.tokens)


@dataclass(frozen=True, eq=False)
class Survey:
    """What was counted.

    counts     {name of NUMBERS: [G]}; sums over a group's rollouts but for step, group, prompt (numbers), low and high
    rewards    {reward column: [G, 3]}: how many have it, its sum, its sum of squares
    products   {(column, column): [G, 6]}: both known: n, Σx, Σy, Σx², Σy², Σxy
    about      how many rollouts have what: tokens, a reward, an answer, a step, log-probs ...; and the columns
    """

    counts: Mapping[str, np.ndarray]
    rewards: Mapping[str, np.ndarray]
    products: Mapping[tuple[str, str], np.ndarray]
    about: Mapping[str, Any]

    @property
    def steps(self) -> np.ndarray:
        """The steps that there are, ascending."""
        return np.unique(self.counts["step"])

    @property
    def unit(self) -> str:
        """Of lengths: tokens where the log knows them of every rollout."""
        return "tokens" if self.about["has"].get("tokens", 0) == self.about["rollouts"] else "characters"

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it but `about`, by name; `of_arrays` reads it."""
        found = {f"counts/{name}": x for name, x in self.counts.items()}
        found |= {f"rewards/{name}": x for name, x in self.rewards.items()}
        return found | {f"products/{a}\n{b}": x for (a, b), x in self.products.items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Survey:
        parts: dict[str, dict[Any, np.ndarray]] = {"counts": {}, "rewards": {}, "products": {}}
        for name, x in arrays.items():
            part, _, rest = name.partition("/")
            parts[part][tuple(rest.split("\n")) if part == "products" else rest] = x
        return cls(parts["counts"], parts["rewards"], parts["products"], about)


def survey(rollouts: Iterable[LoggedRollout], success_above: float = 0.0) -> Survey:
    """Counts a log. ValueError where it has no rollout."""
    place: dict[int, int] = {}
    rows: list[list[float]] = []
    seen: list[set[int]] = []
    sums: dict[Any, array] = {}
    has: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for rollout in rollouts:
        key = group_number(rollout)
        at = place.setdefault(key, len(rows))
        if at == len(rows):
            rows.append(
                [step_of(rollout), key, prompt_number(rollout), 0, 0, 0.0, np.inf, -np.inf, 0, 0, 0, 0, 0.0, 0, 0]
            )
            seen.append(set())
        _count(rows[at], seen[at], rollout, success_above)
        _add_columns(sums, at, rollout.rewards)
        _note(has, others, rollout)
    if not rows:
        raise ValueError("the log has no rollout")
    table = np.array([[*row[:-1], len(own)] for row, own in zip(rows, seen)], float)
    # The names are 63 bits long, more than a float keeps.
    counts = {name: table[:, k] for k, name in enumerate(NUMBERS)}
    for k, name in ((1, "group"), (2, "prompt")):
        counts[name] = np.array([row[k] for row in rows], np.int64)
    about = {"rollouts": has.pop("rollouts"), "has": dict(has), "others": dict(others.most_common(64))}
    rewards = {name: _table(x, 3, len(rows)) for name, x in sums.items() if isinstance(name, str)}
    products = {pair: _table(x, 6, len(rows)) for pair, x in sums.items() if not isinstance(pair, str)}
    return Survey(counts, rewards, products, about)


def _count(row: list[float], seen: set[int], rollout: LoggedRollout, success_above: float) -> None:
    row[3] += 1
    if rollout.reward is not None:
        row[4] += 1
        row[5] += rollout.reward
        row[6], row[7] = min(row[6], rollout.reward), max(row[7], rollout.reward)
        row[8] += rollout.reward > success_above
    row[9] += length_of(rollout)
    if rollout.truncated is not None:
        row[10] += 1
        row[11] += rollout.truncated
    if known := [x for x in rollout.tokens.get("entropy", ()) if x is not None]:
        row[12] += sum(known)
        row[13] += len(known)
    ids = rollout.completion_ids
    seen.add(number_of(prompt_text(rollout.completion)) if ids is None else hash(tuple(ids)))


def _note(has: Counter[str], others: Counter[str], rollout: LoggedRollout) -> None:
    has["rollouts"] += 1
    has["tokens"] += has_tokens(rollout)
    for name in ("reward", "advantage", "step", "group", "answer", "truncated", "completion_ids", "prompt_ids", "mask"):
        has[name] += getattr(rollout, name) is not None
    has.update(f"tokens/{name}" for name in rollout.tokens)
    others.update(list(rollout.others))


def _add_columns(sums: dict[Any, array], at: int, rewards: Mapping[str, float | None]) -> None:
    """Sums of every column, and of products of two on the rollouts that have both; flat, a group's after another's."""
    known = [(name, x) for name, x in rewards.items() if x is not None]
    for name, x in known:
        if name in sums or sum(isinstance(each, str) for each in sums) < MOST_COLUMNS:
            _add(sums, name, at, (1.0, x, x * x))
    kept = [(name, x) for name, x in known if name in sums]
    for k, (name, x) in enumerate(kept):
        for other, y in kept[k + 1 :]:
            _add(sums, (name, other), at, (1.0, x, y, x * x, y * y, x * y))


def _add(sums: dict[Any, array], key: Any, at: int, values: tuple[float, ...]) -> None:
    stored, width = sums.setdefault(key, array("d")), len(values)
    if len(stored) < width * (at + 1):
        stored.extend([0.0] * (width * (at + 1) - len(stored)))
    for k, value in enumerate(values, start=width * at):
        stored[k] += value


def _table(stored: array, width: int, num: int) -> np.ndarray:
    """[num, width]; groups that the column never met are 0."""
    found = np.zeros(num * width)
    found[: len(stored)] = stored
    return found.reshape(num, width)


@dataclass(frozen=True)
class Chosen:
    """Which groups are looked at closely: `focus`, the step that is audited and taken apart; `others` {step: groups},
    steps spread over the log; `near` {step: groups}, those nearest to it with prompts that it does not have."""

    focus: int
    groups: Mapping[int, frozenset[int]]
    others: Mapping[int, frozenset[int]]
    near: Mapping[int, frozenset[int]]

    @property
    def wanted(self) -> frozenset[int]:
        return frozenset().union(*self.groups.values(), *self.others.values(), *self.near.values())


def choose(
    survey: Survey, *, step: int | None = None, prompts: int = 64, spread: int = 8, each: int = 12, seed: int = 0
) -> Chosen:
    """At most `prompts` groups of the step (the last one by default), as many of other prompts from the steps nearest
    to it, and `each` of `spread` steps. ValueError names the steps there are.
    """
    counts, rng = survey.counts, np.random.default_rng(seed)
    steps = survey.steps.astype(int)
    focus = int(steps[-1]) if step is None else step
    if focus not in steps:
        shown = ", ".join(map(str, steps[:: max(1, len(steps) // 12)]))
        raise ValueError(f"--step {step}: the log has no such step; it has {len(steps)}, among them {shown}")
    order = rng.permutation(len(counts["step"]))

    def some(at: int, num: int, without: np.ndarray | None = None) -> frozenset[int]:
        inside = order[counts["step"][order] == at]
        if without is not None:
            inside = inside[~np.isin(counts["prompt"][inside], without)]
        return frozenset(counts["group"][inside[:num]].tolist())

    own = counts["prompt"][counts["step"] == focus]
    near: dict[int, frozenset[int]] = {}
    for at in sorted((int(x) for x in steps if x != focus), key=lambda x: (abs(x - focus), x)):
        left = prompts - sum(map(len, near.values()))
        if left <= 0:
            break
        if found := some(at, left, own):
            near[at] = found
    places = np.unique(np.linspace(0, len(steps) - 1, min(spread, len(steps))).round().astype(int))
    others = {int(steps[k]): some(int(steps[k]), each) for k in places if steps[k] != focus}
    return Chosen(focus, {focus: some(focus, prompts)}, others, near)


def collect(rollouts: Iterable[LoggedRollout], wanted: frozenset[int]) -> dict[int, list[LoggedRollout]]:
    """{group number: its rollouts, in the log's order} of the groups that are wanted."""
    found: dict[int, list[LoggedRollout]] = {}
    for rollout in rollouts:
        if (key := group_number(rollout)) in wanted:
            found.setdefault(key, []).append(rollout)
    return found


def of_steps(
    found: Mapping[int, list[LoggedRollout]], groups: Mapping[int, frozenset[int]]
) -> Iterator[tuple[int, list[LoggedRollout]]]:
    """(step, its collected rollouts) of a choice, in the order of the log."""
    for step in sorted(groups):
        yield step, [rollout for key, some in found.items() if key in groups[step] for rollout in some]
