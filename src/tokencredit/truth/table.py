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
from tokencredit.lm.policy import Policy
from tokencredit.pivotality.exact import exact_effects, policy_forest
from tokencredit.pivotality.store import model_hash
from tokencredit.scores.measure import measure
from tokencredit.tasks.task import Row, Walkable
from tokencredit.truth.goals import known_goals

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


def write_truth(
    policy: Policy,
    out: Path,
    *,
    prompts: int = 32,
    samples: int = 2,
    seed: int = 0,
    eps: float = 1e-6,
    command: str = "",
) -> dict[str, Any]:
    """Samples completions of the task's test prompts, and writes them with what is exactly known of their tokens.

    eps   prefixes that are reached more rarely are not followed, for the goals' gradients those ten times as likely

    Returns what truth.json holds. ValueError where the task is too large for prefix trees.
    """
    if not isinstance(policy.task, Walkable):
        raise ValueError(f"{policy.task.name} is too large for prefix trees: the truth is known of tasks like reckon")
    rows = list({str(row["prompt"]): row for row in policy.task.rows("test", 4 * prompts, seed)}.values())[:prompts]
    asked = policy.encode_rows(rows)
    drawn = policy.complete(asked, samples, seed=seed)
    groups = [[list(each.ids) for each in group] for group in drawn]
    known = exact_effects(policy, rows, groups, eps=eps, include_eps=1000 * eps)
    each = [(i, completion) for i, group in enumerate(drawn) for completion in group]
    own, completions = [rows[i] for i, _ in each], [list(completion.ids) for _, completion in each]
    columns = {name: known[name] for name in ("value", "before_after", "replace", "spread", "entropy", "width")}
    columns["probability"] = known["pi"]
    exact = {"method": "exact"}
    prompt_ids = [asked[i] for i, _ in each]
    norms = measure(policy, own, prompt_ids, completions, ["gradient_norm", "fisher_trace"], importance=exact)
    columns |= {name: np.concatenate([x.numpy() for x in values]) for name, values in norms.items()}
    trees = policy_forest(policy, rows, asked, eps=10 * eps)
    goals = known_goals(policy, asked, trees)
    passes = Passes(policy.model, prompt_ids, completions, temperature=policy.temperature)
    lengths = [len(ids) for ids in completions]
    for name, gradient in (("reward_change", goals.reward_gradient), ("entropy_change", goals.entropy_gradient)):
        moved = passes.forward(gradient)[0].numpy()
        columns[name] = np.concatenate([row[:length] for row, length in zip(moved, lengths)])
    verdicts = [policy.verdict(c.ids, rows[i], c.truncated) for i, c in each]
    traces = [
        {
            "trace": k,
            "row": json.dumps(plain(rows[i])),
            "prompt": rows[i]["prompt"],
            "prompt_ids": list(asked[i]),
            "completion": policy.text(c.ids),
            "completion_ids": list(c.ids),
            "reward": float(verdict.correct),
            "truncated": c.truncated,
        }
        for k, ((i, c), verdict) in enumerate(zip(each, verdicts))
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
        "tokens": sum(lengths),
        "width": {"mean": float(columns["width"].mean()), "largest": float(columns["width"].max())},
        "reward": goals.reward,
        "entropy": goals.entropy,
        "unresolved": float(np.mean([tree.unresolved for tree in trees])),
    }
    write_json(out / "truth.json", about)
    return about


def _tokens(
    policy: Policy, rows: Sequence[Row], completions: Sequence[Sequence[int]], columns: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    found, at = [], 0
    for trace, (row, ids) in enumerate(zip(rows, completions)):
        roles: Sequence[str | None] = policy.roles(row, ids) or [None] * len(ids)
        for position, token in enumerate(policy.tokens(ids)):
            known = {name: float(columns[name][at]) for name in TRUTHS}
            about = {"trace": trace, "position": position, "token_id": int(ids[position]), "token": token}
            found.append({**about, "role": roles[position], **known})
            at += 1
    return found
