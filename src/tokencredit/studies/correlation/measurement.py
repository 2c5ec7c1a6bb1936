"""What the correlation study needs of a policy: completions, proxies, rollouts of alternatives and, where it can be
had, the exact effects.

The one place where the study meets the language model. Tokens of several completions are laid one after the other:
arrays are [N].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokencredit.agreement.rollouts import AlternativeRollouts
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.policy import Policy
from tokencredit.lm.sampling import Progress, Request, Trace
from tokencredit.pivotality.exact import exact_effects
from tokencredit.scores.proxies import proxies as score_proxies
from tokencredit.scores.table import SCORES
from tokencredit.studies.correlation.question import PROXIES
from tokencredit.tasks.task import Row, Task


def held_out(task: Task, num: int, seed: int) -> list[Row]:
    """`num` different prompts of the test split (fewer where it has fewer). ValueError where it has none."""
    found: dict[str, dict] = {}
    wanted = num
    while len(found) < num:
        rows = task.rows("test", wanted, seed)
        found = {str(row["prompt"]): row for row in rows}
        if len(rows) < wanted:
            break
        wanted *= 2
    if not found:
        raise ValueError(f"{task.name} has no held-out prompts: give a file of them, as --option test=held_out.jsonl")
    return list(found.values())[:num]


def draw(
    policy: Policy, rows: Sequence[Row], num: int, seed: int, progress: Progress | None = None, first: int = 0
) -> list[list[dict]]:
    """For each prompt `num` sampled completions: {"ids", "tokens", "correct", "reason", "truncated", "answer",
    "role"}. Prompts are numbered from `first` on, as a part of more.
    """
    prompts = [Trace(tuple(policy.encode(row["prompt"]))) for row in rows]
    requests = [
        Request(i, 0, policy.max_new_tokens, seed_of("trace", seed, first + i, k))
        for i in range(len(rows))
        for k in range(num)
    ]
    found: list[dict] = [{}] * len(requests)
    for index, rollout in policy.sampler().continue_(prompts, requests, progress):
        row = rows[requests[index].trace]
        found[index] = _describe(policy, row, list(rollout.ids), rollout.truncated)
    return [found[i * num : (i + 1) * num] for i in range(len(rows))]


def _describe(policy: Policy, row: Row, ids: list[int], truncated: bool) -> dict:
    text = policy.text(ids)
    verdict = policy.task.verify(text, row, truncated)
    return {
        "ids": ids,
        "tokens": policy.tokens(ids),
        "correct": bool(verdict.correct),
        "reason": verdict.reason,
        "truncated": truncated,
        "answer": _answer(text, verdict),
        "role": policy.roles(row, ids),
    }


def _answer(text: str, verdict: Any) -> str:
    """What the completion claims: its marked answer, else its last word; all unreadable ones count as one answer."""
    from tokencredit.tasks.answers import extract

    if not verdict.parsed:
        return "(none)"
    marked = extract(text)
    return marked.text.strip() if marked else (text.split() or ["(none)"])[-1]


def proxies(
    policy: Policy,
    rows: Sequence[Row],
    completions: Sequence[Sequence[dict]],
    seed: int,
    kinds: Sequence[str] = PROXIES,
    batch: int = 32,
) -> dict[str, np.ndarray]:
    """{kind: [N]}, larger meaning more important."""
    pairs = _pairs(policy, rows, completions)
    prompts, ids = [prompt for _, prompt, _ in pairs], [own for *_, own in pairs]
    options = {"seed": seed, "temperature": policy.temperature, "batch": batch, "memory": policy.memory}
    found = score_proxies(policy.model, prompts, ids, kinds, **options)
    return {
        kind: torch.cat(values).double().numpy() * (-1 if SCORES[kind].falling else 1) for kind, values in found.items()
    }


def _pairs(
    policy: Policy, rows: Sequence[Row], completions: Sequence[Sequence[dict]]
) -> list[tuple[int, list[int], list[int]]]:
    """(number of the prompt, its ids, completion ids) of every completion, in order."""
    return [(i, policy.encode(row["prompt"]), each["ids"]) for i, row in enumerate(rows) for each in completions[i]]


def roll_out(
    policy: Policy,
    rows: Sequence[Row],
    completions: Sequence[Sequence[dict]],
    num: int,
    seed: int,
    progress: Progress | None = None,
    first: int = 0,
    places: range | None = None,
) -> tuple[AlternativeRollouts, dict[str, int]]:
    """`num` rollouts per token that start with another token: drawn from π without the written one, continued
    on-policy, verified.

    Rollouts get the length that is left. A token without alternative has none. Also the cost: rollouts and tokens
    generated. Completions are numbered from `first` on, as a part of more; of each the tokens at `places` are looked
    at, or all.
    """
    pairs = _pairs(policy, rows, completions)
    traces = [Trace(tuple(prompt), tuple(ids)) for _, prompt, ids in pairs]
    sampler, requests, pi, share = policy.sampler(), [], [], []
    for b, log_p in enumerate(sampler.distributions(traces)):
        p = log_p.double().exp().numpy()
        for at in range(len(p)) if places is None else places:
            token = traces[b].completion[at]
            rest = np.where(np.arange(len(p[at])) == token, 0.0, p[at])
            pi.append(1 - rest.sum())
            if rest.sum() <= 0:
                share.append(np.ones(num))
                continue
            rest /= rest.sum()
            drawn = np.random.default_rng(seed_of("alternatives", seed, first + b, at)).choice(len(rest), num, p=rest)
            share.append(rest[drawn])
            left = policy.max_new_tokens - at - 1
            requests += [
                (len(pi) - 1, k, Request(b, at, left, seed_of("rollout", seed, first + b, at, k), int(v)))
                for k, v in enumerate(drawn)
            ]
    rewards, alternative = np.full((len(pi), num), np.nan), np.full((len(pi), num), -1)
    cost = {"rollouts": len(requests), "tokens": 0}
    judged: dict[tuple, float] = {}
    for index, rollout in sampler.continue_(traces, [request for *_, request in requests], progress):
        token, k, request = requests[index]
        whole = (*traces[request.trace].completion[: request.prefix], request.token, *rollout.ids)
        key = (pairs[request.trace][0], whole, rollout.truncated)
        if key not in judged:
            judged[key] = float(policy.verdict(whole, rows[key[0]], rollout.truncated).correct)
        rewards[token, k], alternative[token, k] = judged[key], request.token
        cost["tokens"] += len(rollout.ids)
    trace = np.repeat(np.arange(len(traces)), [len(t.completion if places is None else places) for t in traces])
    reward = np.array([each["correct"] for group in completions for each in group], float)
    return AlternativeRollouts(trace, np.array(pi), reward, rewards, alternative, np.stack(share)), cost


def exact(
    policy: Policy, rows: Sequence[Row], completions: Sequence[Sequence[dict]], **options: Any
) -> dict[str, np.ndarray]:
    """The exact effects of the completions' tokens, [N] each; the options are those of `exact_effects`."""
    return exact_effects(policy, rows, [[each["ids"] for each in group] for group in completions], **options)
