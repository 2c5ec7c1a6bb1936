"""Evaluates a policy on a task: pass@1 and pass@k sampled, greedy accuracy, entropy and length, all with intervals by
prompt.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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
from tokencredit.tasks.verdict import Verdict

SCORED = 2
"""Samples of a prompt whose entropies are measured."""


@dataclass(frozen=True)
class Answers:
    """What a policy answered to one prompt: of each sample the verdict, whether it was cut and its length; whether the
    greedy answer is right (None where none was asked for); the entropies of two samples' tokens, and their roles."""

    verdicts: tuple[Verdict, ...]
    truncated: tuple[bool, ...]
    length: tuple[int, ...]
    greedy: bool | None
    entropy: tuple[float, ...]
    roles: tuple[str, ...]


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
    options = {"greedy": greedy, "seed": seed, "batch": batch, "progress": progress}
    return figures_of(ask(policy, rows, num_samples=num_samples, **options), ks=ks, temperature=policy.temperature)


def ask(
    policy: Policy,
    rows: Sequence[Row],
    *,
    num_samples: int,
    greedy: bool = True,
    seed: int = 0,
    batch: int = ROWS,
    progress: Progress | None = None,
    first: int = 0,
) -> list[Answers]:
    """What the policy answers to each of the rows. They may be a part of more, from number `first` on: answers depend
    on a row's number among all, so that parts which are asked apart are one whole.
    """
    prompts = policy.encode_rows(rows)
    if num_samples < 1 or policy.temperature <= 0:
        raise ValueError(
            f"an evaluation needs samples ({num_samples}) and a temperature above 0 ({policy.temperature})"
        )
    options = {"seed": seed, "batch": batch, "progress": progress, "first": first}
    sampled = policy.complete(prompts, num_samples, **options)
    verdicts = [tuple(policy.verdict(c.ids, row, c.truncated) for c in group) for row, group in zip(rows, sampled)]
    best = policy.complete(prompts, 1, greedy=True, **options) if greedy else [[]] * len(rows)
    right = [[policy.verdict(c.ids, row, c.truncated).correct for c in group] for row, group in zip(rows, best)]
    entropies = _entropies(policy, prompts, sampled)
    return [
        Answers(
            told,
            tuple(c.truncated for c in group),
            tuple(len(c.ids) for c in group),
            next(iter(found), None),
            tuple(entropy),
            tuple(role for c in group[:SCORED] for role in policy.roles(row, c.ids) or ()),
        )
        for row, group, told, found, entropy in zip(rows, sampled, verdicts, right, entropies)
    ]


def figures_of(answers: Sequence[Answers], *, ks: Sequence[int], temperature: float) -> dict[str, Any]:
    """The figures of `evaluate`, of the answers to all prompts."""
    num_samples = len(answers[0].verdicts)
    correct = [sum(v.correct for v in a.verdicts) for a in answers]
    figures: dict[str, Any] = {
        f"pass@{k}": _figure(share_of_units(pass_at_k(np.array(correct), num_samples, k)), "share of prompts")
        for k in ks
        if k <= num_samples
    }
    if answers[0].greedy is not None:
        figures["greedy"] = _figure(share_of_units([float(a.greedy) for a in answers]), "share of prompts")
    cut = share_of_units([np.mean(a.truncated) for a in answers])
    figures["truncated"] = _figure(cut, "share of samples")
    lengths = [float(np.mean(a.length)) for a in answers]
    figures["length"] = _figure(mean_of_units(lengths).within(least=0), "tokens")
    entropies = [float(np.mean(a.entropy)) if a.entropy else None for a in answers]
    known = [value for value in entropies if value is not None] or [0.0]
    figures["entropy"] = _figure(mean_of_units(known).within(least=0), "nats per token")
    by_role = defaultdict(list)
    for a in answers:
        for role, value in zip(a.roles, a.entropy):
            by_role[role].append(value)
    if by_role:
        figures["entropy_by_role"] = {role: float(np.mean(values)) for role, values in sorted(by_role.items())}
    figures["by_prompt"] = {"correct": correct, "length": lengths, "entropy": entropies}
    reasons = Counter(verdict.reason for a in answers for verdict in a.verdicts)
    return figures | {
        "reasons": dict(reasons),
        "num_prompts": len(answers),
        "num_samples": num_samples,
        "temperature": temperature,
    }


def _figure(estimate: Estimate, unit: str) -> dict[str, Any]:
    return Figure.of(estimate, unit).as_json()


def _entropies(
    policy: Policy, prompts: Sequence[Sequence[int]], sampled: Sequence[Sequence[Completion]]
) -> list[list[float]]:
    """Entropies of the tokens of every prompt's first SCORED samples, one after the other."""
    scored = [(i, c.ids) for i, group in enumerate(sampled) for c in group[:SCORED]]
    own, completions = [prompts[i] for i, _ in scored], [ids for _, ids in scored]
    entropies = score(policy.model, own, completions, temperature=policy.temperature, memory=policy.memory)["entropy"]
    found: list[list[float]] = [[] for _ in prompts]
    for (i, _), entropy in zip(scored, entropies):
        found[i] += entropy.tolist()
    return found
