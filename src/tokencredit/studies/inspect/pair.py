"""Two logs: the same prompts before and after. What changed of each prompt, where its completions part, and which
tokens' log-probs moved behind the same prefix.

The unit of every interval is the prompt, which is paired with itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tokencredit.stats import Estimate, holm, mean_of_units, paired_difference, share_of_units
from tokencredit.studies.book import Book
from tokencredit.studies.inspect.sample import LoggedStep
from tokencredit.studies.inspect.source import Missing
from tokencredit.studies.inspect.survey import Survey, prompt_number

FEW = 3
SHOWN = 12
AFTER = 12
"""Tokens that are shown behind the first difference."""
FLIP = 0.5


def by_prompt(survey: Survey, top: str, bottom: str) -> dict[int, float]:
    """{prompt: Σ top / Σ bottom} over all groups of a prompt that know it."""
    prompt, x, n = (survey.counts[name] for name in ("prompt", top, bottom))
    known = n > 0
    names, index = np.unique(prompt[known], return_inverse=True)
    return dict(zip(names.tolist(), (np.bincount(index, x[known]) / np.bincount(index, n[known])).tolist()))


def shared_prompts(before: Survey, after: Survey) -> np.ndarray:
    """The prompts of both. Missing where there are none, or fewer than `FEW`."""
    both = np.intersect1d(before.counts["prompt"], after.counts["prompt"])
    if len(both) < FEW:
        raise Missing(
            f"the two logs share {len(both)} prompts, letter by letter: they are compared on the same ones, {FEW} at"
            " the least"
        )
    return both


def pair_block(before: Survey, after: Survey, book: Book) -> dict[str, Any]:
    """Paired changes of all shared prompts, and how many verdicts flipped."""
    both, changes = shared_prompts(before, after), {}
    block: dict[str, Any] = {"prompts": len(both), "changes": changes, "flips": {}}
    for name, top, bottom, unit in (
        ("pass rate", "success", "rewarded", "share of rollouts"),
        ("reward", "reward", "rewarded", "reward"),
        ("length", "length", "rollouts", after.unit),
        ("entropy", "entropy", "entropy_tokens", "nats per token"),
    ):
        old, new = by_prompt(before, top, bottom), by_prompt(after, top, bottom)
        some = [prompt for prompt in both.tolist() if prompt in old and prompt in new]
        if len(some) < FEW or (name == "length" and before.unit != after.unit):
            continue
        values = [[side[prompt] for prompt in some] for side in (new, old)]
        changes[name] = book.enter(f"pair/{name}", paired_difference(*values), unit, over="shared prompts")
        if name == "pass rate":
            won = [float(b <= FLIP < a) for a, b in zip(*values)]
            lost = [float(a <= FLIP < b) for a, b in zip(*values)]
            for what, flips in (("won", won), ("lost", lost)):
                block["flips"][what] = book.enter(
                    f"pair/{what}", share_of_units(flips), "share of prompts", over="shared prompts"
                )
    return block


def wanted(survey: Survey, prompts: Iterable[int]) -> frozenset[int]:
    """The last group of each of these prompts."""
    counts, found = survey.counts, {}
    keep = np.isin(counts["prompt"], np.fromiter(prompts, np.int64))
    for at in np.flatnonzero(keep)[np.argsort(counts["step"][keep], kind="stable")].tolist():
        found[int(counts["prompt"][at])] = int(counts["group"][at])
    return frozenset(found.values())


def of_prompts(step: LoggedStep) -> dict[int, list[int]]:
    """{prompt: its rows}."""
    found: dict[int, list[int]] = {}
    for i, each in enumerate(step.encoded.logged):
        found.setdefault(prompt_number(each), []).append(i)
    return found


def partings(before: LoggedStep, after: LoggedStep, num: int = SHOWN) -> list[dict[str, Any]]:
    """Where completions of one prompt part: of every prompt the pair with the longest common beginning, those first
    whose outcomes differ.
    """
    old, new, found = of_prompts(before), of_prompts(after), []
    for prompt in old.keys() & new.keys():
        pairs = [(_common(before.pieces[i], after.pieces[j]), i, j) for i in old[prompt] for j in new[prompt]]
        apart = [pair for pair in pairs if before.pieces[pair[1]] != after.pieces[pair[2]]]
        if not apart:
            continue
        at, i, j = max(apart, key=lambda pair: (_differ(before, after, pair), pair[0]))
        found.append(
            {
                "prompt": before.prompts[i],
                "position": at,
                "common": "".join(before.pieces[i][max(0, at - 2 * AFTER) : at]),
                "before": "".join(before.pieces[i][at : at + AFTER]),
                "after": "".join(after.pieces[j][at : at + AFTER]),
                "success": [bool(before.rollouts.success[i]), bool(after.rollouts.success[j])],
                "places": [before.encoded.logged[i].place, after.encoded.logged[j].place],
            }
        )
    return sorted(found, key=lambda each: (each["success"][0] == each["success"][1], -each["position"]))[:num]


def _differ(before: LoggedStep, after: LoggedStep, pair: tuple[int, int, int]) -> bool:
    return bool(before.rollouts.success[pair[1]] != after.rollouts.success[pair[2]])


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def moved_tokens(before: LoggedStep, after: LoggedStep, book: Book, num: int = SHOWN) -> list[dict[str, Any]] | None:
    """The tokens whose log-prob changed most behind the same prompt and prefix, those alone whose change holds after
    Holm; None where one of the logs has no log-probs.
    """
    old, new = _along(before), _along(after)
    if old is None or new is None:
        return None
    gaps: dict[str, dict[int, list[float]]] = {}
    for key in old.keys() & new.keys():
        prompt, _, piece = key
        gaps.setdefault(piece, {}).setdefault(prompt, []).append(new[key] - old[key])
    tested: dict[str, Estimate] = {}
    p = []
    for piece, prompts in gaps.items():
        values = [float(np.mean(some)) for some in prompts.values()]
        if len(values) < FEW or not np.ptp(values):
            continue
        tested[piece] = mean_of_units(values)
        p.append(_p(values))
    kept = [piece for piece, each in zip(tested, holm(p)) if each < 0.05] if p else []
    order = sorted(kept, key=lambda piece: -abs(tested[piece].value))[:num]
    return [
        {"token": piece, "figure": book.enter(f"pair/token {piece!r}", tested[piece], "nats", over="shared prompts")}
        for piece in order
    ]


def _p(values: Sequence[float]) -> float:
    from scipy import stats

    return float(stats.ttest_1samp(values, 0.0).pvalue)


def _along(step: LoggedStep) -> Mapping[tuple[int, int, str], float] | None:
    """{(prompt, prefix, token): log-prob}; rollouts that begin alike say the same of a token."""
    logprob = step.rollouts.scores.get("logprob")
    if logprob is None:
        return None
    found = {}
    for i, each in enumerate(step.encoded.logged):
        prompt, prefix = prompt_number(each), 0
        for t, piece in enumerate(step.pieces[i]):
            found[prompt, prefix, piece] = float(logprob[i, t])
            prefix = hash((prefix, piece))
    return found
