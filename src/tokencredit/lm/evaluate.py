"""Evaluates a policy on a task: pass@1 and pass@k sampled, greedy accuracy, entropy and length, all with intervals by
prompt.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokencredit.figure import Figure
from tokencredit.lm.completions import Completion
from tokencredit.lm.policy import Policy
from tokencredit.lm.prefix_sampler import ROWS
from tokencredit.lm.sampling import Progress
from tokencredit.lm.scoring import score
from tokencredit.stats import Estimate, mean_of_units, pass_at_k, share_of_units
from tokencredit.tasks.task import Row


def evaluate(
    policy: Policy,
    rows: Sequence[Row],
    *,
    num_samples: int = 8,
    ks: Sequence[int] = (1, 8),
    greedy: bool = True,
    seed: int = 0,
    batch: int = ROWS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Figures as JSON (`Figure.as_json`), clustered by prompt:

    "pass@k" for every k <= num_samples (unbiased), "greedy", "truncated", "length", "entropy" (mean over tokens of a
    prompt's samples), and where the task knows roles "entropy_by_role" {role: mean}; "reasons" counts the verdicts of
    all samples; "by_prompt" holds, prompt by prompt, how many samples were correct, their length and their entropy.
    At most `batch` completions are sampled at a time. VerifierError names the row on which a verifier of your own
    raises.
    """
    prompts = policy.encode_rows(rows)
    if num_samples < 1 or policy.temperature <= 0:
        raise ValueError(
            f"an evaluation needs samples ({num_samples}) and a temperature above 0 ({policy.temperature})"
        )
    sampled = policy.complete(prompts, num_samples, seed=seed, batch=batch, progress=progress)
    verdicts = [[policy.verdict(c.ids, row, c.truncated) for c in group] for row, group in zip(rows, sampled)]
    correct = np.array([[v.correct for v in group] for group in verdicts])
    figures: dict[str, Any] = {
        f"pass@{k}": _figure(share_of_units(pass_at_k(correct.sum(1), num_samples, k)), "share of prompts")
        for k in ks
        if k <= num_samples
    }
    if greedy:
        best = policy.complete(prompts, 1, seed=seed, batch=batch, greedy=True, progress=progress)
        right = [float(policy.verdict(c[0].ids, row, c[0].truncated).correct) for row, c in zip(rows, best)]
        figures["greedy"] = _figure(share_of_units(right), "share of prompts")
    cut = share_of_units([np.mean([c.truncated for c in group]) for group in sampled])
    figures["truncated"] = _figure(cut, "share of samples")
    lengths = [float(np.mean([len(c.ids) for c in group])) for group in sampled]
    figures["length"] = _figure(mean_of_units(lengths), "tokens")
    entropies, by_role = _entropies(policy, rows, prompts, sampled)
    known = [value for value in entropies if value is not None] or [0.0]
    figures["entropy"] = _figure(mean_of_units(known), "nats per token")
    figures |= {"entropy_by_role": by_role} if by_role else {}
    figures["by_prompt"] = {"correct": correct.sum(1).tolist(), "length": lengths, "entropy": entropies}
    reasons = Counter(verdict.reason for group in verdicts for verdict in group)
    return figures | {
        "reasons": dict(reasons),
        "num_prompts": len(rows),
        "num_samples": num_samples,
        "temperature": policy.temperature,
    }


def _figure(estimate: Estimate, unit: str) -> dict[str, Any]:
    return Figure.of(estimate, unit).as_json()


def _entropies(
    policy: Policy, rows: Sequence[Row], prompts: Sequence[Sequence[int]], sampled: Sequence[Sequence[Completion]]
) -> tuple[list[float | None], dict[str, float]]:
    """Mean token entropy of every prompt (two of its samples are scored; None where they are empty), and by role."""
    scored = [(i, c.ids) for i, group in enumerate(sampled) for c in group[:2]]
    own, completions = [prompts[i] for i, _ in scored], [ids for _, ids in scored]
    entropies = score(policy.model, own, completions, temperature=policy.temperature, memory=policy.memory)["entropy"]
    by_prompt, by_role = defaultdict(list), defaultdict(list)
    for (i, completion), entropy in zip(scored, entropies):
        by_prompt[i] += entropy.tolist()
        for role, value in zip(policy.roles(rows[i], completion) or (), entropy.tolist()):
            by_role[role].append(value)
    means = [float(np.mean(by_prompt[i])) if by_prompt[i] else None for i in range(len(rows))]
    return means, {role: float(np.mean(values)) for role, values in sorted(by_role.items())}
