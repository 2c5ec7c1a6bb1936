"""The exact gradient norm over the last block, for every token at once, in one backward pass.

With the last block's input, keys and values held fixed, its queries, output projection and MLP act on each position
alone, and so do the final norm and the head: a weight's gradient at a token is one outer product δ xᵀ, with squared
norm ‖δ‖² ‖x‖².
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokencredit.lm.directions import Coverage
from tokencredit.lm.exact import differentiating
from tokencredit.lm.head import chosen_logprob
from tokencredit.lm.local import KEYS, fixed_layers, taped
from tokencredit.lm.readout import Readout, Sequences, check_finite
from tokencredit.lm.tangents import logit_norms
from tokencredit.masked import wide


@torch.no_grad()
def last_block_norms2(readout: Readout, coverage: Coverage, batch: Sequences, tokens: int) -> Tensor:
    """[N]: squared norm of the position-local gradient over the covered linear and norm layers of the last block, final
    norm and head.

    ValueError where the block has no separate key and value projections, or layers that do not see every position.
    """
    if readout.whole:
        raise ValueError(
            f"{type(readout.model).__name__}: its LM head cannot be told from its body, so its last block cannot either"
        )
    block, rest = _last_block(readout)
    found = torch.zeros(len(batch), device=batch.ids.device)
    for part, keep in batch.chunks(tokens):
        found[keep] = _norms2(readout, coverage, part, block, rest).float()
    return found


def _last_block(readout: Readout) -> tuple[nn.Module, list[nn.Module]]:
    """(the last block, the modules of the body outside of all blocks: the final norm among them)."""
    lists = [m for m in readout.body.modules() if isinstance(m, nn.ModuleList) and len(m)]
    depth = getattr(readout.model.config, "num_hidden_layers", None)
    blocks = next((m for m in lists if len(m) == depth), None)
    if blocks is None:
        raise ValueError(f"{type(readout.model).__name__}: no list of its {depth} blocks was found")
    if not fixed_layers(readout.body):
        raise ValueError(
            f"{type(readout.model).__name__}: its blocks have no separate {' and '.join(KEYS)} to hold fixed"
        )
    inside = set(blocks.modules())
    return blocks[-1], [m for m in readout.body.modules() if m not in inside and not isinstance(m, nn.Embedding)]


def _norms2(readout: Readout, coverage: Coverage, part: Sequences, block: nn.Module, rest: list[nn.Module]) -> Tensor:
    covered, fixed = {id(p) for p in coverage.named.values()}, fixed_layers(readout.body)
    inside = {inner for m in fixed for inner in m.modules()}
    mine = [
        m
        for m in [*block.modules(), *rest]
        if m not in inside and any(id(p) in covered for p in m.parameters(recurse=False))
    ]
    with differentiating(coverage), _taped_block(block, mine, fixed) as tape:
        hidden = readout.hidden(part.ids, part.attention)
        picked = hidden[part.row, part.position]
        check_finite(picked, "hidden states")
        total = chosen_logprob(picked.double(), readout.head, part.target).sum()
        odd = next((m for m, _, y in tape if not torch.is_tensor(y)), None)
        if odd is not None:
            raise ValueError(
                f"the last block's {type(odd).__name__} returns several tensors (a router?): no local norm"
            )
        deltas = torch.autograd.grad(total, [y for _, _, y in tape], allow_unused=True)
    norms2 = torch.zeros(hidden.shape[:2], dtype=torch.float64, device=hidden.device)
    for (module, x, y), delta in zip(tape, deltas):
        if delta is not None:
            norms2 += _layer_norms2(module, x, y, delta, covered, hidden.shape[:2])
    found = norms2[part.row, part.position]
    if id(readout.head.weight) in covered:
        found = found + logit_norms(picked.detach(), readout.head, part.target)[0] * wide(picked.detach()).square().sum(
            1
        )
    return found


@contextmanager
def _taped_block(
    block: nn.Module, modules: list[nn.Module], fixed: list[nn.Module]
) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """`taped`, with the block's input fixed as well."""

    def detach_input(module, args, kwargs):
        return tuple(a.detach() if torch.is_tensor(a) and a.is_floating_point() else a for a in args), {
            k: v.detach() if k == "hidden_states" else v for k, v in kwargs.items()
        }

    handle = block.register_forward_pre_hook(detach_input, with_kwargs=True)
    try:
        with taped(modules, fixed) as tape:
            yield tape
    finally:
        handle.remove()


def _layer_norms2(
    module: nn.Module, x: Tensor, y: Tensor, delta: Tensor, covered: set[int], shape: torch.Size
) -> Tensor:
    """[B, L]: squared gradient norm of one layer's own parameters at each position."""
    if delta.shape[:2] != shape or x.shape[:2] != shape:
        raise ValueError(
            f"the last block's {type(module).__name__} does not see every position (a mixture of experts?): no local"
            " norm"
        )
    own = {name: p for name, p in module.named_parameters(recurse=False) if id(p) in covered}
    delta = delta.detach().double()
    total = torch.zeros(shape, dtype=torch.float64, device=delta.device)
    flat = lambda t: t.flatten(2).square().sum(2)  # noqa: E731
    for name, p in own.items():
        if p.dim() == 2:
            total += flat(delta) * flat(x.double())
        elif name == "bias":
            total += flat(delta)
        else:
            # A norm's output is affine in its weight: moving the weight by 1 shows what multiplies it. Several heads
            # share one weight.
            unit = (functional_call(module, {name: p.detach() + 1}, (x,)) - y).detach().double() * delta
            total += unit.reshape(*shape, -1, p.numel()).sum(2).square().sum(2)
    return total
