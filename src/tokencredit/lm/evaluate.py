"""Evaluates a policy on a task: pass@1 and pass@k sampled, greedy accuracy, entropy and length, all with intervals by
prompt.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokencredit.lm.prompts import encode_prompts
from tokencredit.lm.sampling import Completion, sample
from tokencredit.lm.scoring import score
from tokencredit.stats import mean_of_units, pass_at_k, share_of_units


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Any,
    rows: Sequence[dict],
    *,
    num_samples: int = 8,
    ks: Sequence[int] = (1, 8),
    greedy: bool = True,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 512,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Figures as {"value", "low", "high", "num", "level"}, clustered by prompt:

    "pass@k" for every k <= num_samples (unbiased), "greedy", "truncated", "length", "entropy" (mean over tokens of a
    prompt's samples), and where the task knows roles "entropy_by_role" {role: mean}; "reasons" counts the verdicts of
    all samples; "by_prompt" holds, prompt by prompt, how many samples were correct, their length and their entropy.
    `batch` completions are sampled at a time. VerifierError names the row on which a verifier of your own raises.
    """
    if not rows or num_samples < 1 or temperature <= 0:
        raise ValueError(
            f"an evaluation needs prompts ({len(rows)}), samples ({num_samples}) and a temperature above 0"
            f" ({temperature})"
        )
    prompts = encode_prompts(tokenizer, rows, model.config, max_new_tokens)
    options = {"max_new_tokens": max_new_tokens, "seed": seed, "batch": batch, "on_batch": progress}
    sampled = sample(model, tokenizer, prompts, num_samples, temperature=temperature, **options)
    verdicts = [[judge(tokenizer, task, row, c) for c in group] for row, group in zip(rows, sampled)]
    correct = np.array([[v.correct for v in group] for group in verdicts])
    figures: dict[str, Any] = {
        f"pass@{k}": share_of_units(pass_at_k(correct.sum(1), num_samples, k)).as_dict() for k in ks if k <= num_samples
    }
    if greedy:
        best = sample(model, tokenizer, prompts, 1, temperature=0.0, **options)
        figures["greedy"] = share_of_units(
            [float(judge(tokenizer, task, row, c[0]).correct) for row, c in zip(rows, best)]
        ).as_dict()
    figures["truncated"] = share_of_units([np.mean([c.truncated for c in group]) for group in sampled]).as_dict()
    lengths = [float(np.mean([len(c.ids) for c in group])) for group in sampled]
    figures["length"] = mean_of_units(lengths).as_dict()
    entropies, by_role = _entropies(model, tokenizer, task, rows, prompts, sampled, temperature)
    figures["entropy"] = mean_of_units([value for value in entropies if value is not None] or [0.0]).as_dict()
    figures |= {"entropy_by_role": by_role} if by_role else {}
    figures["by_prompt"] = {"correct": correct.sum(1).tolist(), "length": lengths, "entropy": entropies}
    reasons = Counter(verdict.reason for group in verdicts for verdict in group)
    return figures | {
        "reasons": dict(reasons),
        "num_prompts": len(rows),
        "num_samples": num_samples,
        "temperature": temperature,
    }


def judge(tokenizer: Any, task: Any, row: dict, completion: Completion) -> Any:
    """The task's verdict on sampled token ids."""
    return task.verify(tokenizer.decode(completion.ids, skip_special_tokens=True), row, completion.truncated)


def _entropies(
    model, tokenizer, task, rows, prompts, sampled, temperature
) -> tuple[list[float | None], dict[str, float]]:
    """Mean token entropy of every prompt (two of its samples are scored; None where they are empty), and by role."""
    scored = [(i, c) for i, group in enumerate(sampled) for c in group[:2]]
    entropies = score(model, [prompts[i] for i, _ in scored], [c.ids for _, c in scored], temperature=temperature)[
        "entropy"
    ]
    by_prompt, by_role = defaultdict(list), defaultdict(list)
    for (i, completion), entropy in zip(scored, entropies):
        by_prompt[i] += entropy.tolist()
        if hasattr(task, "roles"):
            names = task.roles(rows[i], tokenizer.convert_ids_to_tokens(list(completion.ids)))
            for role, value in zip(names, entropy.tolist()):
                by_role[role].append(value)
    means = [float(np.mean(by_prompt[i])) if by_prompt[i] else None for i in range(len(rows))]
    return means, {role: float(np.mean(values)) for role, values in sorted(by_role.items())}
