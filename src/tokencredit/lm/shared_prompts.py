"""Completions of one prompt in one row, so that the prompt goes through the model once.

    prompt | a | b | c        positions go on from the prompt's in each completion, and a token attends to the prompt
                              and to what its own completion has before it

The attention of such a row grows with the square of its length: no more completions share one than fill `MOST` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencredit.lm.packing import together
from tokencredit.lm.readout import Readout, Sequences
from tokencredit.masked import wide

MOST = 512
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
"""What configurations call the number of tokens that attention looks back."""
CLOSE = 1e-3
"""Nats by which log-probs behind a shared prompt may differ from those behind one of their own."""


@dataclass(frozen=True, eq=False)
class Packed(Sequences):
    """Rows that hold a prompt and some of its completions; of every token its position behind the prompt, and its
    completion: 0 for the prompt, −1 for padding; [B, L] each.
    """

    place: Tensor = field(kw_only=True)
    branch: Tensor = field(kw_only=True)

    @property
    def inputs(self) -> dict[str, Any]:
        one, other = self.branch[:, :, None], self.branch[:, None, :]
        length = self.ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        seen = ((one == other) | (other == 0)) & earlier
        hidden = torch.zeros(seen.shape, device=self.ids.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        return {"position_ids": self.place, "attention_mask": hidden[:, None]}


def shared(batch: Sequences, start: Tensor, tokens: int) -> Iterator[tuple[Packed, Tensor]]:
    """(rows with at most about `tokens` tokens, the indices of their scored tokens in the batch): every completion up
    to its last scored token.

    start   [B]: tokens of each row's prompt
    """
    needed = torch.zeros(len(batch.ids), dtype=torch.long, device=batch.row.device)
    needed = needed.scatter_reduce(0, batch.row, batch.position + 1, "amax").tolist()
    begin = start.tolist()
    rows: dict[tuple[int, ...], list[list[int]]] = {}
    for row in [row for row, length in enumerate(needed) if length]:
        of_prompt = rows.setdefault(tuple(batch.ids[row, : begin[row]].tolist()), [[]])
        if of_prompt[-1] and begin[row] + sum(needed[i] - begin[i] for i in [*of_prompt[-1], row]) > MOST:
            of_prompt.append([])
        of_prompt[-1].append(row)
    packs = [pack for some in rows.values() for pack in some]
    lengths = [begin[pack[0]] + sum(needed[i] - begin[i] for i in pack) for pack in packs]
    order = sorted(range(len(packs)), key=lengths.__getitem__, reverse=True)
    for some in together(order, lengths, len(order), tokens):
        yield _laid([packs[i] for i in some], batch, needed, begin, max(lengths[i] for i in some))


def _laid(
    packs: list[list[int]], batch: Sequences, needed: list[int], begin: list[int], width: int
) -> tuple[Packed, Tensor]:
    """Some packs of rows, one below the other."""
    device = batch.ids.device
    ids, place = (torch.zeros(len(packs), width, dtype=torch.long, device=device) for _ in range(2))
    branch = torch.full((len(packs), width), -1, device=device)
    moved, shift = torch.full((len(batch.ids),), -1, device=device), torch.zeros_like(batch.ids[:, 0])
    for k, pack in enumerate(packs):
        at = begin[pack[0]]
        ids[k, :at], place[k, :at], branch[k, :at] = batch.ids[pack[0], :at], torch.arange(at, device=device), 0
        for number, row in enumerate(pack):
            first, last = begin[row], needed[row]
            there = slice(at, at + last - first)
            ids[k, there], branch[k, there] = batch.ids[row, first:last], number + 1
            place[k, there] = torch.arange(first, last, device=device)
            moved[row], shift[row], at = k, at - first, there.stop
    keep = (moved[batch.row] >= 0).nonzero()[:, 0]
    row, position = batch.row[keep], batch.position[keep]
    position = position + shift[row] * (position >= torch.tensor(begin, device=device)[row])
    origin = tuple(x[keep] for x in batch.origin)
    scored = (moved[row], position, batch.target[keep], origin)
    return Packed(ids, (branch >= 0).long(), *scored, batch.shape, place=place, branch=branch), keep


@torch.no_grad()
def shares_prompts(readout: Readout, ids: Tensor) -> bool:
    """Whether a model of this readout gives two completions behind one prompt the distributions that it gives them
    alone; tried on a few tokens of `ids` [L].

    Models that see no further back than a window are left out, where few tokens would not show it, and those in half
    precision, where rounding would hide it.
    """
    config = readout.model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = min(len(ids), 24) // 3
    precise = next(readout.model.parameters()).dtype in (torch.float32, torch.float64)
    if any(getattr(config, name, None) for name in WINDOWS) or length < 2 or not precise:
        return False
    two = torch.stack([ids[: 2 * length], torch.cat([ids[:length], ids[2 * length : 3 * length]])])
    row = torch.arange(2, device=ids.device).repeat_interleave(length)
    position = torch.arange(length, 2 * length, device=ids.device).repeat(2)
    alone = Sequences(two, torch.ones_like(two), row, position, position, (row, position), tuple(two.shape))
    pack, order = next(shared(alone, torch.full((2,), length, device=ids.device), 3 * length))
    found = []
    for part in (alone, pack):
        try:
            hidden = readout.hidden(part.ids, part.attention, **part.inputs)[part.row, part.position]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False  # A body that takes no positions, or no such mask.
        found.append(readout.head.logits(wide(hidden)).log_softmax(-1))
    gap = (found[0][order] - found[1]).abs().amax(-1)
    return bool(gap.max() <= CLOSE)
