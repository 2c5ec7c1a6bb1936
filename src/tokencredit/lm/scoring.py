"""Scores of sampled tokens from one forward pass: what the sampling distribution says about each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokencredit.lm.head import Fold, Head, target_logits, tile_size, tiles
from tokencredit.lm.models import CausalModel
from tokencredit.lm.packing import Ids, pack, together
from tokencredit.lm.readout import Sequences, check_finite, evaluating, find_readout, sequences
from tokencredit.lm.room import Room
from tokencredit.masked import wide

FORWARD_SCORES = ("logprob", "entropy", "sum_p2", "varentropy", "margin")


@torch.no_grad()
def score(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    batch: int = 64,
    names: Sequence[str] = ("logprob", "entropy"),
    memory: int | None = None,
) -> dict[str, list[Tensor]]:
    """{name: [...]}: one float32 tensor [T] per completion, at `temperature`, over the full vocabulary.

    logprob, entropy (nats); sum_p2 (Σ p²); varentropy (Var of log p, nats²); margin (the largest probability less the
    second). Completions of similar length are scored together, at most `batch` of them and no more than `memory`
    bytes of the process allow (`lm.room`); no [tokens, vocabulary] matrix is made where the model's head can be told
    from its body. ValueError where a sequence exceeds the model's context or its logits are
    not finite.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    unknown = sorted(set(names) - set(FORWARD_SCORES))
    if unknown:
        raise ValueError(f"no score is called {', '.join(unknown)}; there are: {', '.join(FORWARD_SCORES)}")
    if temperature <= 0:
        raise ValueError(
            f"scores are those of a sampling distribution: temperature must be positive, got {temperature}"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    total = [len(p) + len(c) for p, c in zip(prompts, completions)]
    for row, length in enumerate(total):
        if not len(prompts[row]):
            raise ValueError(f"row {row} has an empty prompt: its first token has no distribution")
        if limit and length > limit:
            raise ValueError(f"row {row} has {length} tokens, more than the model's context of {limit}")
    found: dict[str, list[Tensor]] = {name: [torch.zeros(0)] * len(total) for name in names}
    order = sorted((i for i in range(len(total)) if len(completions[i])), key=total.__getitem__)
    if not order:
        return found
    device = next(model.parameters()).device
    with evaluating(model):
        readout = find_readout(
            model, torch.tensor([*prompts[order[0]], *completions[order[0]]], device=device), temperature
        )
        for rows in together(order, total, batch, Room.of(model, memory).tokens()):
            some = pad([prompts[i] for i in rows], [completions[i] for i in rows], device)
            hidden = readout.hidden(some.ids, some.attention)[some.row, some.position]
            lengths = [len(completions[i]) for i in rows]
            for name, values in token_scores(hidden, readout.head, some.target, names).items():
                for row, piece in zip(rows, values.float().cpu().split(lengths)):
                    found[name][row] = piece
    return found


def pad(prompts: Ids, completions: Ids, device: Any = "cpu") -> Sequences:
    """Prompts and completions as one batch, padded on the right, whose completion tokens are to be scored."""
    return sequences(*pack(prompts, completions, device))


@torch.no_grad()
def token_scores(
    hidden: Tensor, head: Head, targets: Tensor, names: Sequence[str] = FORWARD_SCORES
) -> dict[str, Tensor]:
    """{name of SCORES: [N]} from hidden states [N, D], in one pass over the vocabulary, tile by tile."""
    h, found = wide(hidden), []
    for rows, pieces in tiles(len(h), head.vocabulary(h), tile_size(h)):
        fold, top = Fold.start(h[rows], second_moment="varentropy" in names), h.new_full((len(h[rows]), 2), -torch.inf)
        for columns in pieces:
            z = head.logits(h[rows], columns)
            fold.add(z)
            if "margin" in names:
                top = torch.cat([top, z], 1).topk(2).values
        lse = fold.lse()
        check_finite(lse, "logits")
        values = {
            "logprob": lambda: target_logits(h[rows], head, targets[rows]) - lse,  # noqa: B023
            "entropy": fold.entropy,
            "sum_p2": fold.sum_p2,
            "varentropy": fold.varentropy,
            "margin": lambda: (top - lse[:, None]).exp().diff(dim=1)[:, 0].neg(),  # noqa: B023
        }
        found.append([values[name]() for name in names])
    return {
        name: torch.cat(parts) if parts else h.new_zeros(0)
        for name, parts in zip(names, zip(*found) if found else [()] * len(names))
    }


@torch.no_grad()
def kl_divergence(hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head) -> Tensor:
    """[N]: KL(p ‖ p_ref) over the full vocabulary, in nats."""
    h, ref, found = wide(hidden), wide(ref_hidden), []
    rows = max((4 * tile_size(h)) // head.vocabulary(h), 1)
    if head.vocabulary(h) != ref_head.vocabulary(ref):
        raise ValueError(
            f"the reference model has {ref_head.vocabulary(ref)} tokens in its vocabulary, the model"
            f" {head.vocabulary(h)}"
        )
    for start in range(0, len(h), rows):
        some = slice(start, start + rows)
        log_p = head.logits(h[some]).log_softmax(1)
        gap = (log_p - ref_head.logits(ref[some]).log_softmax(1)).masked_fill(log_p == -torch.inf, 0)
        found.append((log_p.exp() * gap).sum(1).clamp(min=0))
    return torch.cat(found) if found else h.new_zeros(0)
