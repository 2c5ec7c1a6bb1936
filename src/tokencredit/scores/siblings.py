"""How far the next-token distributions of a group's rollouts are apart at every position.

    JSₜ = H(p̄ₜ) − mean_i H(pᵢₜ),    p̄ₜ = mean_i pᵢₜ                over the rollouts i of the group that have a token t

Between 0 (all alike, or one rollout left) and the logarithm of their number; the same for all of them. After the first
token that differs, prefixes do, so it grows with position whatever the policy is uncertain about.
Source: TW-GRPO (arXiv:2505.24718) weighs tokens by such a divergence; its released one is no Jensen-Shannon.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokencredit.lm.head import Head
from tokencredit.lm.models import CausalModel
from tokencredit.lm.packing import Ids
from tokencredit.lm.readout import check_finite, evaluating, find_readout
from tokencredit.lm.room import Room
from tokencredit.lm.scoring import pad


def by_prompt(prompts: Ids) -> list[int]:
    """The group of every row where none is given: rows of one prompt are siblings."""
    number: dict[tuple[int, ...], int] = {}
    return [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]


@torch.no_grad()
def js_divergence(
    model: CausalModel,
    prompts: Ids,
    completions: Ids,
    group: Sequence[int],
    *,
    temperature: float = 1.0,
    memory: int | None = None,
) -> list[Tensor]:
    """[T] of every completion, nats, float32. Memory is a group's hidden states, and its logits at one position."""
    members: dict[int, list[int]] = {}
    for row, label in enumerate(group):
        members.setdefault(label, []).append(row)
    found = [torch.zeros(len(ids)) for ids in completions]
    groups = [rows for rows in members.values() if len(rows) > 1 and any(len(completions[row]) for row in rows)]
    if not groups:
        return found
    device, first = next(model.parameters()).device, groups[0][0]
    with evaluating(model):
        own = torch.tensor([*prompts[first], *completions[first]], device=device)
        readout = find_readout(model, own, temperature)
        for rows in groups:
            batch = pad([prompts[row] for row in rows], [completions[row] for row in rows], device)
            hidden: list[Tensor] = [torch.empty(0)] * len(batch)
            for part, keep in batch.chunks(Room.of(model, memory).tokens()):
                states = readout.hidden(part.ids, part.attention)[part.row, part.position]
                check_finite(states, "hidden states")
                for at, state in zip(keep.tolist(), states):
                    hidden[at] = state
            lengths = [len(completions[row]) for row in rows]
            start = [sum(lengths[:k]) for k in range(len(rows))]
            for t in range(max(lengths)):
                living = [k for k, length in enumerate(lengths) if t < length]
                value = divergence(torch.stack([hidden[start[k] + t] for k in living]), readout.head)
                for k in living:
                    found[rows[k]][t] = value
    return found


def divergence(hidden: Tensor, head: Head) -> float:
    """JS of the distributions at hidden states [g, D]."""
    log_p = head.logits(hidden.float()).log_softmax(-1)
    mean = log_p.logsumexp(0) - torch.log(torch.tensor(float(len(log_p))))
    entropies = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
    mixed = -(mean.exp() * mean.clamp_min(torch.finfo(mean.dtype).min)).sum()
    return max(float(mixed - entropies.mean()), 0.0)
