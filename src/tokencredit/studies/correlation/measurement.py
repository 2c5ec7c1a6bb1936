"""What the correlation study needs of a policy: completions, proxies, rollouts of alternatives and, where it can be
had, the exact effects.

The one place where the study meets the language model. Tokens of several completions are laid one after the other:
arrays are [N].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokencredit.agreement.rollouts import Rollouts
from tokencredit.lm.distribution import Settings, seed_of
from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.prompts import encode_prompt
from tokencredit.lm.sampling import Request, Trace, end_tokens
from tokencredit.pivotality.tree import PrefixTree, grow_forest, on_text

PROXIES = (
    "entropy",
    "surprisal",
    "varentropy",
    "margin",
    "head_norm",
    "last_block_norm",
    "gradient_norm",
    "fisher_trace",
    "perturbation_variance",
    "attention",
)
FALLING = frozenset({"margin"})  # small means important; their sign is turned


@dataclass(frozen=True)
class Policy:
    """A model on a task, as it is sampled."""

    model: Any
    tokenizer: Any
    task: Any
    temperature: float
    max_new_tokens: int

    @classmethod
    def load(cls, name: str, task: Any, temperature: float, max_new_tokens: int | None = None) -> Policy:
        path = resolve_model(name)
        limit = max_new_tokens or getattr(task, "max_new_tokens", 256)
        return cls(load_model(path).eval(), load_tokenizer(path), task, temperature, limit)

    @property
    def sampler(self) -> PrefixSampler:
        return PrefixSampler(
            self.model, ends=end_tokens(self.model, self.tokenizer), settings=Settings(self.temperature)
        )

    def verdict(self, ids: Sequence[int], row: dict, truncated: bool) -> Any:
        return self.task.verify(self.tokenizer.decode(ids, skip_special_tokens=True), row, truncated)


def held_out(task: Any, num: int, seed: int) -> list[dict]:
    """`num` different prompts of the test split (fewer where it has fewer)."""
    found: dict[str, dict] = {}
    wanted = num
    while len(found) < num:
        rows = task.rows("test", wanted, seed)
        found = {str(row["prompt"]): row for row in rows}
        if len(rows) < wanted:
            break
        wanted *= 2
    return list(found.values())[:num]


def draw(policy: Policy, rows: Sequence[dict], num: int, seed: int) -> list[list[dict]]:
    """For each prompt `num` sampled completions: {"ids", "tokens", "correct", "reason", "truncated", "answer",
    "role"}.
    """
    prompts = [Trace(tuple(encode_prompt(policy.tokenizer, row["prompt"]))) for row in rows]
    requests = [
        Request(i, 0, policy.max_new_tokens, seed_of("trace", seed, i, k)) for i in range(len(rows)) for k in range(num)
    ]
    found: list[dict] = [{}] * len(requests)
    for index, rollout in policy.sampler.continue_(prompts, requests):
        row = rows[requests[index].trace]
        found[index] = _describe(policy, row, list(rollout.ids), rollout.truncated)
    return [found[i * num : (i + 1) * num] for i in range(len(rows))]


def _describe(policy: Policy, row: dict, ids: list[int], truncated: bool) -> dict:
    text = policy.tokenizer.decode(ids, skip_special_tokens=True)
    verdict = policy.task.verify(text, row, truncated)
    known = hasattr(policy.task, "roles")
    tokens = policy.tokenizer.convert_ids_to_tokens(ids) if known else [policy.tokenizer.decode([i]) for i in ids]
    return {
        "ids": ids,
        "tokens": tokens,
        "correct": bool(verdict.correct),
        "reason": verdict.reason,
        "truncated": truncated,
        "answer": _answer(text, verdict),
        "role": policy.task.roles(row, tokens) if known else None,
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
    rows: Sequence[dict],
    completions: Sequence[Sequence[dict]],
    seed: int,
    kinds: Sequence[str] = PROXIES,
    batch: int = 32,
) -> dict[str, np.ndarray]:
    """{kind: [N]}, larger meaning more important."""
    from tokencredit.lm import importance

    pairs = _pairs(policy, rows, completions)
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        width = max(len(prompt) + len(ids) for _, prompt, ids in some)
        ids, attention, chosen = torch.zeros((3, len(some), width), dtype=torch.long)
        for k, (_, prompt, completion) in enumerate(some):
            whole = len(prompt) + len(completion)
            ids[k, :whole], attention[k, :whole] = torch.tensor([*prompt, *completion]), 1
            chosen[k, len(prompt) : whole] = 1
        result = importance(
            policy.model, ids, attention, chosen, kinds=tuple(kinds), seed=seed, temperature=policy.temperature
        )
        for kind in kinds:
            values = result[kind].value.double().numpy()
            found[kind] += [
                values[k, len(prompt) : len(prompt) + len(done)] for k, (_, prompt, done) in enumerate(some)
            ]
    return {kind: np.concatenate(values) * (-1 if kind in FALLING else 1) for kind, values in found.items()}


def _pairs(
    policy: Policy, rows: Sequence[dict], completions: Sequence[Sequence[dict]]
) -> list[tuple[int, list[int], list[int]]]:
    """(number of the prompt, its ids, completion ids) of every completion, in order."""
    return [
        (i, encode_prompt(policy.tokenizer, row["prompt"]), each["ids"])
        for i, row in enumerate(rows)
        for each in completions[i]
    ]


def roll_out(
    policy: Policy,
    rows: Sequence[dict],
    completions: Sequence[Sequence[dict]],
    num: int,
    seed: int,
    on_done: Callable[[int], None] | None = None,
) -> tuple[Rollouts, dict[str, int]]:
    """`num` rollouts per token that start with another token: drawn from π without the written one, continued
    on-policy, verified.

    Rollouts get the length that is left. A token without alternative has none. Also the cost: rollouts and tokens
    generated.
    """
    pairs = _pairs(policy, rows, completions)
    traces = [Trace(tuple(prompt), tuple(ids)) for _, prompt, ids in pairs]
    sampler, requests, pi, share = policy.sampler, [], [], []
    for b, log_p in enumerate(sampler.distributions(traces)):
        p = log_p.double().exp().numpy()
        for at, token in enumerate(traces[b].completion):
            rest = np.where(np.arange(len(p[at])) == token, 0.0, p[at])
            pi.append(1 - rest.sum())
            if rest.sum() <= 0:
                share.append(np.ones(num))
                continue
            rest /= rest.sum()
            drawn = np.random.default_rng(seed_of("alternatives", seed, b, at)).choice(len(rest), num, p=rest)
            share.append(rest[drawn])
            left = policy.max_new_tokens - at - 1
            requests += [
                (len(pi) - 1, k, Request(b, at, left, seed_of("rollout", seed, b, at, k), int(v)))
                for k, v in enumerate(drawn)
            ]
    rewards, alternative = np.full((len(pi), num), np.nan), np.full((len(pi), num), -1)
    cost = {"rollouts": len(requests), "tokens": 0}
    judged: dict[tuple, float] = {}
    for index, rollout in sampler.continue_(traces, [request for *_, request in requests]):
        token, k, request = requests[index]
        whole = (*traces[request.trace].completion[: request.prefix], request.token, *rollout.ids)
        key = (pairs[request.trace][0], whole, rollout.truncated)
        if key not in judged:
            judged[key] = float(policy.verdict(whole, rows[key[0]], rollout.truncated).correct)
        rewards[token, k], alternative[token, k] = judged[key], request.token
        cost["tokens"] += len(rollout.ids)
        if on_done and index % 500 == 0:
            on_done(500)
    trace = np.repeat(np.arange(len(traces)), [len(t.completion) for t in traces])
    reward = np.array([each["correct"] for group in completions for each in group], float)
    return Rollouts(trace, np.array(pi), reward, rewards, alternative, np.stack(share)), cost


def exact(
    policy: Policy,
    rows: Sequence[dict],
    completions: Sequence[Sequence[dict]],
    *,
    eps: float = 1e-4,
    include_eps: float = 1e-2,
    alternatives: int = 6,
    enough: float = 0.95,
) -> dict[str, np.ndarray]:
    """From prefix trees, [N] each: replace, before_after, spread, value (V before), pi, entropy, and `width`, how wide
    V's bracket is.

    The trees' brackets are rigorous and the value used is the one that completions outside the tree would not move if
    they were worth what those inside are, low / (1 − width). `alternatives` > 0 also looks behind the next tokens that
    hold `enough` of the mass beside the written one, at most that many per token, however rare they are: `replace` asks
    for the value of what is nearly never said.
    """
    prompts = [encode_prompt(policy.tokenizer, row["prompt"]) for row in rows]
    include = [[each["ids"] for each in group] for group in completions]
    if alternatives:
        include = _with_alternatives(policy, prompts, include, alternatives, enough)
    trees = grow_forest(
        policy.model,
        prompts,
        [on_text(policy.task.verify, policy.tokenizer, row) for row in rows],
        eos_token_id=end_tokens(policy.model, policy.tokenizer),
        max_new_tokens=policy.max_new_tokens,
        eps=eps,
        temperature=policy.temperature,
        include=include,
        include_eps=include_eps,
    )
    found: dict[str, list[np.ndarray]] = {}
    for tree, group in zip(trees, completions):
        for each in group:
            for name, values in _along(tree, each["ids"]).items():
                found.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def _along(tree: PrefixTree, ids: list[int]) -> dict[str, np.ndarray]:
    path = tree.path(ids)
    pi, before, after = path.probability.numpy(), _inside(path.before.numpy()), _inside(path.after.numpy())
    other, spread = np.full((2, len(ids)), np.nan)
    for at, token in enumerate(ids):
        found = tree.alternatives(ids[:at])
        q, bracket = _inside(found.value.numpy()), found.value.numpy()
        mass = found.probability.numpy() * (
            1 - (bracket[:, 1] - bracket[:, 0])
        )  # of the completions behind each token that are inside
        beside = np.where(found.token.numpy() == token, 0.0, mass)
        other[at] = (beside * q).sum() / beside.sum() if beside.sum() > 0 else np.nan
        spread[at] = np.sqrt((mass * (q - (mass * q).sum() / mass.sum()) ** 2).sum() / mass.sum())
    replace = after - other
    # Where nothing beside the token is inside the tree, the little mass there moves V by nothing that the tree knows
    # of.
    before_after = np.where(np.isnan(replace), after - before, (1 - pi) * replace)
    return {
        "replace": replace,
        "before_after": before_after,
        "spread": spread,
        "value": before,
        "pi": pi,
        "entropy": path.entropy.numpy(),
        "width": (path.before[:, 1] - path.before[:, 0]).numpy(),
    }


def _inside(bracket: np.ndarray) -> np.ndarray:
    """[T]: the value of the completions that are in the tree, from brackets [T,2]."""
    return bracket[:, 0] / np.maximum(1 - (bracket[:, 1] - bracket[:, 0]), 1e-12)


def _with_alternatives(policy: Policy, prompts: list, include: list, most: int, enough: float) -> list[list[list[int]]]:
    """The completions and, at each of their tokens, the prefix with each of the likeliest other tokens."""
    traces = [(i, ids) for i, group in enumerate(include) for ids in group]
    wider: list[list[list[int]]] = [list(group) for group in include]
    log_ps = policy.sampler.distributions([Trace(tuple(prompts[i]), tuple(ids)) for i, ids in traces])
    for (i, ids), log_p in zip(traces, log_ps):
        p = log_p.double().exp().numpy()
        p[np.arange(len(ids)), ids] = 0
        for at, rest in enumerate(p):
            order = np.argsort(-rest)[:most]
            mass = np.cumsum(rest[order]) / max(rest.sum(), 1e-300)
            wider[i] += [[*ids[:at], int(v)] for v in order[: int((mass < enough).sum()) + 1]]
    return wider
