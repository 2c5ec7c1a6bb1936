"""What a number of rollouts buys: pairs of completions, the same with measured effects, or pairs at pivotal tokens.

Prompts are taken in order until the next one would cost more than is left. Every rollout counts: those that sample
completions, those that measure a token's effect, those that verify a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokencredit.lm.distribution import seed_of
from tokencredit.lm.policy import Policy
from tokencredit.lm.sampling import Trace
from tokencredit.pivotality.budgets import Fixed
from tokencredit.pivotality.crew import Here
from tokencredit.pivotality.export import candidates, verify_pairs
from tokencredit.pivotality.measure import MeasuredTrace, measure
from tokencredit.pivotality.record import alternative_rows, token_rows
from tokencredit.pivotality.store import RolloutStore
from tokencredit.studies.preference.question import PreferenceConfig
from tokencredit.tasks.task import Row

CHUNK = 64
"""Prompts that are worked on at once."""


@dataclass
class Lot:
    """What one prompt gave: pairs, as rows of `PreferenceTrainer`, and the rollouts that they cost."""

    rollouts: int = 0
    pairs: list[dict[str, Any]] = field(default_factory=list)


def buy(kind: str, policy: Policy, config: PreferenceConfig, seed: int) -> dict[str, Any]:
    """{"pairs", "rollouts", "prompts"} that `config.rollouts` rollouts buy, of training prompts of this seed."""
    make = {"completions": completions, "effects": effects, "pivots": pivots}[kind]
    bought, left, used = [], config.rollouts, 0
    for lot in _lots(make, policy, config, seed):
        if lot.rollouts > left:
            break
        bought += lot.pairs
        left -= lot.rollouts
        used += 1
    if not bought:
        raise ValueError(
            f"{config.rollouts} rollouts gave no pair of {kind}: give more (--rollouts), or take a task of which the"
            " policy solves some prompts and not others"
        )
    return {"pairs": bought, "rollouts": config.rollouts - left, "prompts": used}


def _lots(make: Callable[..., list[Lot]], policy: Policy, config: PreferenceConfig, seed: int) -> Iterator[Lot]:
    rows = policy.task.rows("train", config.rollouts, seed)
    chunk = min(CHUNK, config.rollouts // config.group)
    for start in range(0, len(rows), chunk):
        yield from make(policy, rows[start : start + chunk], config, seed_of(seed, "pairs", start))


def completions(policy: Policy, rows: Sequence[Row], config: PreferenceConfig, seed: int) -> list[Lot]:
    """`config.group` completions of every prompt; the first right one is paired with the first wrong one, and so on."""
    prompts = policy.encode_rows(rows)
    sampled = policy.complete(prompts, config.group, seed=seed)
    found = []
    for row, prompt, group in zip(rows, prompts, sampled):
        sides: dict[bool, list[list[int]]] = {True: [], False: []}
        for each in group:
            if each.ids:
                sides[policy.verdict(each.ids, row, each.truncated).correct].append(list(each.ids))
        pairs = [
            {"prompt_ids": prompt, "chosen_ids": right, "rejected_ids": wrong}
            for right, wrong in zip(sides[True], sides[False])
        ]
        found.append(Lot(config.group, pairs))
    return found


def effects(policy: Policy, rows: Sequence[Row], config: PreferenceConfig, seed: int) -> list[Lot]:
    """The same pairs with `before_after` of every token, measured; 0 where a token has no alternative that counts."""
    lots = completions(policy, rows, config, seed)
    sides = [(n, pair, side) for n, lot in enumerate(lots) for pair in lot.pairs for side in ("chosen", "rejected")]
    traces = [Trace(tuple(pair["prompt_ids"]), tuple(pair[f"{side}_ids"])) for _, pair, side in sides]
    measured = _measured(policy, traces, [rows[n] for n, _, _ in sides], config, seed)
    for (n, pair, side), each in zip(sides, measured):
        pair[f"{side}_before_after"] = np.nan_to_num(each.estimate.before_after.value).tolist()
        lots[n].rollouts += each.rollouts
    return lots


def pivots(policy: Policy, rows: Sequence[Row], config: PreferenceConfig, seed: int) -> list[Lot]:
    """One completion of every prompt, the effects of its tokens, and where one is pivotal the token against the
    alternative that differs most, if that holds on fresh rollouts.
    """
    prompts = policy.encode_rows(rows)
    sampled = [group[0] for group in policy.complete(prompts, 1, seed=seed)]
    traces = [Trace(tuple(prompt), each.ids) for prompt, each in zip(prompts, sampled) if each.ids]
    owners = [n for n, each in enumerate(sampled) if each.ids]
    own = [rows[n] for n in owners]
    measured = _measured(policy, traces, own, config, seed)
    tokens = [row for k, each in enumerate(measured) for row in token_rows(k, each, policy)]
    alternatives = [row for k, each in enumerate(measured) for row in alternative_rows(k, each, policy)]
    wanted = candidates(tokens, alternatives, config.margin)
    pairs = verify_pairs(
        wanted,
        traces,
        Here(policy.sampler(), _judge(policy, own)),
        RolloutStore(None, {}, part=4096),
        num=config.fresh,
        max_new_tokens=policy.max_new_tokens,
        margin=config.margin,
        seed=seed,
    )
    lots = [Lot(1) for _ in rows]
    for n, each in zip(owners, measured):
        lots[n].rollouts += each.rollouts
    for k, _, _ in wanted:
        lots[owners[k]].rollouts += 2 * config.fresh
    for pair in pairs:
        ids = {"prompt_ids": pair.prefix_ids, "chosen_ids": [pair.chosen_id], "rejected_ids": [pair.rejected_id]}
        lots[owners[pair.trace]].pairs.append(ids)
    return lots


def _measured(
    policy: Policy, traces: Sequence[Trace], rows: Sequence[Row], config: PreferenceConfig, seed: int
) -> list[MeasuredTrace]:
    if not traces:
        return []
    return measure(
        traces,
        policy.sampler(),
        _judge(policy, rows),
        budget=Fixed(config.effect_rollouts, config.skip_below, control=0.0),
        max_new_tokens=policy.max_new_tokens,
        store=RolloutStore(None, {}, part=4096),
        seed=seed,
    )


def _judge(policy: Policy, rows: Sequence[Row]) -> Callable[[int, tuple[int, ...], bool], Any]:
    return lambda k, ids, truncated: policy.verdict(ids, rows[k], truncated)
