"""The effects of tokens from prefix trees: what re-sampling estimates, exact where the world is small enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokencredit.lm.policy import Policy
from tokencredit.lm.sampling import Trace
from tokencredit.pivotality.tree import PrefixTree, grow_forest, on_text
from tokencredit.tasks.task import Row


def policy_forest(
    policy: Policy, rows: Sequence[Row], prompts: Sequence[Sequence[int]], **options: Any
) -> list[PrefixTree]:
    """One tree per row of a policy's task, as the policy is sampled; `prompts` are their token ids, the options those
    of `grow_forest`.
    """
    return grow_forest(
        policy.model,
        prompts,
        [on_text(policy.task.verify, policy.tokenizer, row) for row in rows],
        eos_token_id=policy.ends,
        max_new_tokens=policy.max_new_tokens,
        temperature=policy.temperature,
        **options,
    )


def exact_effects(
    policy: Policy,
    rows: Sequence[Row],
    completions: Sequence[Sequence[Sequence[int]]],
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
    prompts = [policy.encode(row["prompt"]) for row in rows]
    include = [[list(ids) for ids in group] for group in completions]
    if alternatives:
        include = _with_alternatives(policy, prompts, include, alternatives, enough)
    trees = policy_forest(policy, rows, prompts, eps=eps, include=include, include_eps=include_eps)
    found: dict[str, list[np.ndarray]] = {}
    for tree, group in zip(trees, completions):
        for ids in group:
            for name, values in _along(tree, list(ids)).items():
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
    log_ps = policy.sampler().distributions([Trace(tuple(prompts[i]), tuple(ids)) for i, ids in traces])
    for (i, ids), log_p in zip(traces, log_ps):
        p = log_p.double().exp().numpy()
        p[np.arange(len(ids)), ids] = 0
        for at, rest in enumerate(p):
            order = np.argsort(-rest)[:most]
            mass = np.cumsum(rest[order]) / max(rest.sum(), 1e-300)
            wider[i] += [[*ids[:at], int(v)] for v in order[: int((mass < enough).sum()) + 1]]
    return wider
