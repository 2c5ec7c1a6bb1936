"""Measures named scores of completions under a policy, whoever asks: a command, a study, a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokencredit.lm.packing import Ids
from tokencredit.lm.policy import Policy
from tokencredit.lm.prefix_sampler import ROWS
from tokencredit.lm.scoring import score
from tokencredit.scores.draws import uniform_draws
from tokencredit.scores.known import exact_value, oracle_positions
from tokencredit.scores.planning import planning
from tokencredit.scores.proxies import proxies
from tokencredit.scores.siblings import by_prompt, js_divergence
from tokencredit.scores.steps import step_gains
from tokencredit.scores.table import SCORES, check_available
from tokencredit.tasks.task import Row


def measure(
    policy: Policy,
    rows: Sequence[Row],
    prompts: Ids,
    completions: Ids,
    names: Sequence[str],
    *,
    seed: int = 0,
    step: int = 0,
    batch: int | None = None,
    importance: Mapping[str, Any] | None = None,
    group: Sequence[int] | None = None,
    first: int = 0,
) -> dict[str, list[Tensor]]:
    """{name of SCORES: [T] of every completion}, on the CPU.

    rows         the task's, one per completion; only scores of the sources "task" and "steps" read them
    seed, step   of what is random: directions, draws, rollouts
    batch        completions that are scored together, at most; None for as many as the policy's memory allows
    group        of every row, for scores of the source "siblings"; without it rows of one prompt are siblings
    first        number of the first row, for rows that are a part of more
    importance   options of `lm.proxies.importance`: num_directions, method, parameters ...

    ValueError names a score that there is not, or that the task cannot give.
    """
    check_available(names, policy.task)
    wanted = {source: [n for n in names if SCORES[n].source == source] for source in ("forward", "importance")}
    found: dict[str, list[Tensor]] = {}
    if wanted["forward"]:
        size = batch or max(len(prompts), 1)
        found |= score(
            policy.model,
            prompts,
            completions,
            temperature=policy.temperature,
            names=wanted["forward"],
            batch=size,
            memory=policy.memory,
        )
    if wanted["importance"]:
        options = {"temperature": policy.temperature, "seed": seed, "memory": policy.memory, **(importance or {})}
        found |= proxies(policy.model, prompts, completions, wanted["importance"], batch=batch, **options)
    if "js_divergence" in names:
        options = {"temperature": policy.temperature, "memory": policy.memory}
        found["js_divergence"] = js_divergence(
            policy.model, prompts, completions, by_prompt(prompts) if group is None else group, **options
        )
    if "planning" in names:
        found["planning"] = planning(policy.tokenizer, completions)
    if "uniform" in names:
        width = max(map(len, completions), default=0)
        drawn = uniform_draws(seed, step, first + torch.arange(len(completions)), width)
        found["uniform"] = [own[: len(ids)] for own, ids in zip(drawn, completions)]
    for name, known in (("exact_value", exact_value), ("oracle_positions", oracle_positions)):
        if name in names:
            found[name] = known(policy, rows, prompts, completions)
    if "step_gain" in names:
        gains = step_gains(policy, rows, prompts, completions, batch=batch or ROWS, seed=seed)
        found["step_gain"] = [torch.tensor(gain, dtype=torch.float64) for gain in gains]
    return {name: found[name] for name in names}
