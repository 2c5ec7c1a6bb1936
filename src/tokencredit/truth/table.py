"""What is known of every token: completions of the embedded world, and the truth of each of their tokens.

traces.parquet   one row per completion, what an estimator may read: trace, row (the task's, as JSON), prompt,
                 prompt_ids, completion, completion_ids, reward, truncated
truth.parquet    one row per token: trace, position, token_id, token, role, and the columns of `TRUTHS`
truth.json       the policy, its hash, how the truth was found and how wide its brackets are

`value` and the effects are up to `width`, the mass that the prefix trees left out; `reward_change` and `entropy_change`
are first derivatives, exact but for that mass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.durable import plain, write_json, write_parquet
from tokencredit.dynamics.passes import Passes
from tokencredit.lm.fingerprint import model_hash
from tokencredit.lm.policy import Policy
from tokencredit.pivotality.exact import exact_effects, policy_forest
from tokencredit.scores.measure import measure
from tokencredit.tasks.task import Row, Walkable
from tokencredit.truth.goals import Known, known_goals

FORMAT = 1
TRUTHS = {
    "value": "V, success probability before the token",
    "before_after": "Q − V: V after the token less V before it",
    "replace": "V after the token less V where another one stands there",
    "spread": "standard deviation of V over the next token",
    "probability": "of the token",
    "entropy": "of the distribution that the token was drawn from, nats",
    "gradient_norm": "norm of ∇log π over all parameters",
    "fisher_trace": "trace of the Fisher information of the distribution",
    "reward_change": "⟨∇J, ∇log π⟩: expected reward per unit of a plain gradient step on this token's log-prob alone",
    "entropy_change": "⟨∇H̄, ∇log π⟩: mean token entropy, the same, nats",
    "width": "how wide the bracket of V is before the token",
}
OF_GRADIENTS = ("gradient_norm", "fisher_trace", "reward_change", "entropy_change")
FROM_TREES = ("value", "before_after", "replace", "spread", "probability", "entropy", "width")


def write_truth(
    policy: Policy,
    out: Path,
    *,
    prompts: int = 32,
    samples: int = 2,
    seed: int = 0,
    eps: float = 1e-6,
    command: str = "",
    gradients: bool = True,
) -> dict[str, Any]:
    """Samples completions of the task's test prompts, and writes them with what is exactly known of their tokens.

    eps         prefixes that are reached more rarely are not followed, for the goals' gradients those ten times as
                likely
    gradients   whether `OF_GRADIENTS` are found as well, which is most of the time

    Returns what truth.json holds. ValueError where the task is too large for prefix trees.
    """
    if not isinstance(policy.task, Walkable):
        raise ValueError(f"{policy.task.name} is too large for prefix trees: the truth is known of tasks like reckon")
    rows = list({str(row["prompt"]): row for row in policy.task.rows("test", 4 * prompts, seed)}.values())[:prompts]
    asked = policy.encode_rows(rows)
    drawn = policy.complete(asked, samples, seed=seed)
    each = [(i, completion) for i, group in enumerate(drawn) for completion in group]
    own, prompt_ids = [rows[i] for i, _ in each], [list(asked[i]) for i, _ in each]
    completions = [list(completion.ids) for _, completion in each]
    columns = _effects(policy, rows, [[list(c.ids) for c in group] for group in drawn], eps)
    goals: dict[str, float] = {}
    if gradients:
        norms = measure(
            policy, own, prompt_ids, completions, ["gradient_norm", "fisher_trace"], importance={"method": "exact"}
        )
        columns |= {name: np.concatenate([x.numpy() for x in values]) for name, values in norms.items()}
        trees = policy_forest(policy, rows, asked, eps=10 * eps)
        known = known_goals(policy, asked, trees)
        columns |= _changes(policy, prompt_ids, completions, known)
        unresolved = float(np.mean([tree.unresolved for tree in trees]))
        goals = {"reward": known.reward, "entropy": known.entropy, "unresolved": unresolved}
    traces = [
        {
            "trace": k,
            "row": json.dumps(plain(row)),
            "prompt": row["prompt"],
            "prompt_ids": ids,
            "completion": policy.text(c.ids),
            "completion_ids": list(c.ids),
            "reward": float(policy.verdict(c.ids, row, c.truncated).correct),
            "truncated": c.truncated,
        }
        for k, (row, ids, (_, c)) in enumerate(zip(own, prompt_ids, each))
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_parquet(out / "traces.parquet", traces)
    write_parquet(out / "truth.parquet", _tokens(policy, own, completions, columns))
    about = {
        "format": FORMAT,
        "command": command,
        "seed": seed,
        "eps": eps,
        "model": model_hash(policy.model),
        "task": policy.task.name,
        "temperature": policy.temperature,
        "prompts": len(rows),
        "completions": len(traces),
        "tokens": sum(map(len, completions)),
        "width": {"mean": float(columns["width"].mean()), "largest": float(columns["width"].max())},
        **goals,
    }
    write_json(out / "truth.json", about)
    return about


def _effects(
    policy: Policy, rows: Sequence[Row], groups: Sequence[Sequence[Sequence[int]]], eps: float
) -> dict[str, np.ndarray]:
    """What prefix trees say of the tokens, [N] each, by the names of `TRUTHS`."""
    known = exact_effects(policy, rows, groups, eps=eps, include_eps=1000 * eps)
    return {name: known["pi" if name == "probability" else name] for name in FROM_TREES}


def _changes(
    policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], goals: Known
) -> dict[str, np.ndarray]:
    """What a plain gradient step on one token's log-prob does to either goal, [N] each."""
    passes = Passes(policy.model, prompts, completions, temperature=policy.temperature)
    found = {}
    for name, gradient in (("reward_change", goals.reward_gradient), ("entropy_change", goals.entropy_gradient)):
        moved = passes.forward(gradient)[0].numpy()
        found[name] = np.concatenate([row[: len(ids)] for row, ids in zip(moved, completions)])
    return found


def _tokens(
    policy: Policy, rows: Sequence[Row], completions: Sequence[Sequence[int]], columns: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    found, at = [], 0
    for trace, (row, ids) in enumerate(zip(rows, completions)):
        roles: Sequence[str | None] = policy.roles(row, ids) or [None] * len(ids)
        for position, token in enumerate(policy.tokens(ids)):
            known = {name: float(columns[name][at]) for name in TRUTHS if name in columns}
            about = {"trace": trace, "position": position, "token_id": int(ids[position]), "token": token}
            found.append({**about, "role": roles[position], **known})
            at += 1
    return found
