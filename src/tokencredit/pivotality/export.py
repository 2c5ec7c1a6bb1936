"""Preference pairs at pivotal tokens, both sides verified on fresh rollouts.

A run says which tokens seem pivotal and which alternative differs most. Both are then taken as given: V after the token
and V after the alternative are estimated from rollouts made for this purpose alone, so that what is exported does not
carry the luck of its selection. A pair is kept where the interval of their difference leaves out [−margin, margin].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.durable import replace_file
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.models import Tokenizer
from tokencredit.lm.sampling import Progress, Request, Trace
from tokencredit.lm.text import piece_after
from tokencredit.pivotality.crew import Crew
from tokencredit.pivotality.estimator import wilson
from tokencredit.pivotality.store import RolloutStore, prefix_digest

FORMATS = ("dpo", "jsonl")


@dataclass(frozen=True)
class Pair:
    """A prefix and two next tokens. Success rates with Wilson's 95 % intervals, the difference with that of Newcombe
    (1998).
    """

    trace: int
    position: int
    prefix_ids: list[int]
    chosen_id: int
    rejected_id: int
    written_id: int
    chosen_rate: tuple[float, float, float]
    rejected_rate: tuple[float, float, float]
    difference: tuple[float, float, float]
    rollouts: int


def candidates(
    tokens: Sequence[dict], alternatives: Sequence[dict], margin: float, estimand: str = "before_after"
) -> list[tuple[int, int, int]]:
    """(trace, position, alternative that differs most) of tokens whose interval of the estimand leaves out [−margin,
    margin].
    """
    rates: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for row in alternatives:
        # A rate from few rollouts is drawn towards 1/2, so that one lucky rollout does not make the choice.
        rates.setdefault((row["trace"], row["position"]), []).append(
            (row["token_id"], (row["successes"] + 0.5) / (row["rollouts"] + 1))
        )
    found = []
    for row in tokens:
        key = row["trace"], row["position"]
        if row["defined"] and key in rates and (row[f"{estimand}_low"] > margin or row[f"{estimand}_high"] < -margin):
            best = max(rates[key], key=lambda pair: (abs(row["value_after"] - pair[1]), -pair[0]))
            found.append((*key, best[0]))
    return found


def verify_pairs(
    found: Sequence[tuple[int, int, int]],
    traces: Sequence[Trace],
    crew: Crew,
    store: RolloutStore,
    *,
    num: int,
    max_new_tokens: int,
    margin: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Pair]:
    """The pairs that hold on `num` fresh rollouts of either side."""
    requests = []
    for k, i, alternative in found:
        label = prefix_digest(traces[k], len(traces[k].completion))
        for token in (traces[k].completion[i], alternative):
            seeds = [seed_of(seed, "export", label, i, token, n) for n in range(num)]
            requests += [Request(k, i, max_new_tokens - i - 1, s, token) for s in seeds]
    if not requests:
        return []
    outcomes = store.collect(traces, requests, crew, "export", progress)
    if outcomes.failed:
        raise outcomes.failed[min(outcomes.failed)]
    reward = outcomes.reward.reshape(len(found), 2, num)
    pairs = [
        _pair(k, i, alternative, traces[k], *rates.mean(-1), num) for (k, i, alternative), rates in zip(found, reward)
    ]
    return [pair for pair in pairs if pair.difference[1] > margin]


def _pair(k: int, i: int, alternative: int, trace: Trace, written_rate: float, other_rate: float, num: int) -> Pair:
    written = trace.completion[i]
    sides = sorted([(written_rate, written), (other_rate, alternative)], key=lambda side: -side[0])
    rates = [(p, *(float(x) for x in wilson(np.array(p), np.array(num)))) for p, _ in sides]
    (good, good_low, good_high), (bad, bad_low, bad_high) = rates
    difference = good - bad
    low = difference - float(np.hypot(good - good_low, bad_high - bad))
    high = difference + float(np.hypot(good_high - good, bad - bad_low))
    return Pair(
        k,
        i,
        [*trace.prompt, *trace.completion[:i]],
        sides[0][1],
        sides[1][1],
        written,
        rates[0],
        rates[1],
        (difference, low, high),
        num,
    )


def write_pairs(path: Path, pairs: Sequence[Pair], tokenizer: Tokenizer, form: str = "dpo") -> None:
    """`dpo`: JSON lines with prompt_ids, chosen_ids and rejected_ids as `engines.trl_preference` trains on them, one
    token each; `jsonl`: everything besides. Text is for reading, under names that no trainer takes for its own: TRL's
    DPOTrainer, given text, ends each side with an end token, which has more of the gradient than the pivotal one.
    """
    if form not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}, not {form!r}")
    lines = [
        json.dumps(_dpo(pair, tokenizer) if form == "dpo" else asdict(pair) | _dpo(pair, tokenizer)) for pair in pairs
    ]
    replace_file(path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))


def _dpo(pair: Pair, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "prompt_ids": pair.prefix_ids,
        "chosen_ids": [pair.chosen_id],
        "rejected_ids": [pair.rejected_id],
        "prompt_text": tokenizer.decode(pair.prefix_ids),
        "chosen_text": piece_after(tokenizer, pair.prefix_ids, pair.chosen_id),
        "rejected_text": piece_after(tokenizer, pair.prefix_ids, pair.rejected_id),
        "chosen_rate": list(pair.chosen_rate),
        "rejected_rate": list(pair.rejected_rate),
        "difference": list(pair.difference),
    }
