"""What a credit model reads of a token: the policy's hidden states before and after it, and what one forward pass says.

    states    [N, 4, D]  h_{i−1} and h_i, of the middle layer and of the last
    scores    [N, 8]     log π, H, 1 − π, Var log p, margin, Σ p²; relative position, log of the length

h_{i−1} is what the token was drawn from, h_i what the model makes of it. Never the difference of two values of a
critic: its noise is that of both, and the effects are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencredit.lm.models import CausalModel
from tokencredit.lm.readout import evaluating
from tokencredit.lm.scoring import pad, score

SCORES = ("logprob", "entropy", "rarity", "varentropy", "margin", "sum_p2", "position", "length")
FORWARD = ("logprob", "entropy", "varentropy", "margin", "sum_p2")
STATES = ("before, middle layer", "after, middle layer", "before, last layer", "after, last layer")


@dataclass(frozen=True)
class TokenFeatures:
    """Of N tokens, completion after completion, float32: states [N, 4, D], scores [N, 8], outcome [N] (the completion's
    reward).
    """

    states: Tensor
    scores: Tensor
    outcome: Tensor


@torch.no_grad()
def features(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    rewards: Sequence[float],
    *,
    temperature: float = 1.0,
    batch: int = 32,
) -> TokenFeatures:
    """The features of every completion token; `rewards` has one number per completion."""
    found = score(model, prompts, completions, temperature=temperature, batch=batch, names=FORWARD)
    columns = [
        torch.stack(
            [
                *(found[name][i] for name in ("logprob", "entropy")),
                1 - found["logprob"][i].exp(),
                *(found[name][i] for name in ("varentropy", "margin", "sum_p2")),
                torch.arange(len(ids)) / max(len(ids), 1),
                torch.full((len(ids),), float(len(ids))).log1p(),
            ],
            1,
        )
        for i, ids in enumerate(completions)
    ]
    device = next(model.parameters()).device
    states = []
    with evaluating(model):
        for start in range(0, len(completions), batch):
            some = slice(start, start + batch)
            rows = pad(prompts[some], completions[some], device)
            seen = torch.ones_like(rows.attention)
            layers = model(
                input_ids=rows.ids, attention_mask=seen, use_cache=False, output_hidden_states=True
            ).hidden_states
            chosen = (layers[len(layers) // 2], layers[-1])
            for i, ids in enumerate(completions[some]):
                first = len(prompts[start + i])
                at = torch.arange(first, first + len(ids), device=device)
                states.append(torch.stack([layer[i, at + by] for layer in chosen for by in (-1, 0)], 1).float().cpu())
    lengths = torch.tensor([len(ids) for ids in completions])
    return TokenFeatures(
        torch.cat(states),
        torch.cat(columns),
        torch.tensor(rewards, dtype=torch.float32).repeat_interleave(lengths),
    )
