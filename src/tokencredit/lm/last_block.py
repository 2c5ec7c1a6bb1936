"""The exact gradient norm over the last block, for every token at once, in one backward pass.

With the last block's input, keys and values held fixed, its queries, output projection and MLP act on each position
alone, and so do the final norm and the head: a linear layer's gradient at a token is one outer product δ xᵀ, with
squared norm ‖δ‖² ‖x‖², and an elementwise weight's is δ times what it multiplies. Which layers these are is not taken
from their shapes: the gradients of a few tokens are compared with autograd's, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokencredit.lm.directions import Coverage, is_linear
from tokencredit.lm.exact import differentiating
from tokencredit.lm.head import chosen_logprob
from tokencredit.lm.local import KEYS, fixed_layers, taped
from tokencredit.lm.readout import Readout, Sequences, check_finite
from tokencredit.lm.tangents import head_norms

CHECKED = 3
"""Tokens of the first rows whose gradients autograd takes as well."""
CLOSE = {torch.float64: 1e-4, torch.float32: 2e-3}
"""Relative difference to autograd that roundings may make; 0.1 in half precision."""


@torch.no_grad()
def last_block_norms2(readout: Readout, coverage: Coverage, batch: Sequences, tokens: int) -> Tensor:
    """[N]: squared norm of the position-local gradient over the covered linear and norm layers of the last block, final
    norm and head.

    ValueError names the layer that has no such norm: one that does not see every position, or whose gradient is not
    that of a linear or elementwise layer; and models without separate key and value projections.
    """
    name = type(readout.model).__name__
    if readout.whole:
        raise ValueError(f"{name} has no last_block_norm: {readout.why}")
    block, rest = _last_block(readout)
    found = torch.zeros(len(batch), device=batch.ids.device)
    for k, (part, keep) in enumerate(batch.chunks(tokens)):
        found[keep] = _norms2(readout, coverage, part, block, rest, check=k == 0).float()
    return found


def _last_block(readout: Readout) -> tuple[nn.Module, list[nn.Module]]:
    """(the last block, the modules of the body outside of all blocks: the final norm among them)."""
    name = type(readout.model).__name__
    lists = [m for m in readout.body.modules() if isinstance(m, nn.ModuleList) and len(m)]
    depth = getattr(readout.model.config, "num_hidden_layers", None)
    blocks = next((m for m in lists if len(m) == depth), None)
    if blocks is None:
        raise ValueError(f"{name} has no last_block_norm: no list of its {depth} blocks was found")
    if not fixed_layers(readout.body):
        inner = [n for n, _ in blocks[-1].named_modules()]
        fused = [n for n in inner if n.rpartition(".")[2] in ("c_attn", "qkv_proj", "query_key_value", "Wqkv")]
        made = f"; they are made by {fused[0]}" if fused else ""
        raise ValueError(
            f"{name} has no last_block_norm: its blocks have no separate {' and '.join(KEYS)} to hold fixed{made}"
        )
    inside = set(blocks.modules())
    return blocks[-1], [m for m in readout.body.modules() if m not in inside and not isinstance(m, nn.Embedding)]


def _norms2(readout: Readout, coverage: Coverage, part: Sequences, block, rest, check: bool) -> Tensor:
    """[n]; `check`: against autograd, for the first tokens."""
    covered, fixed = {id(p) for p in coverage.named.values()}, fixed_layers(readout.body)
    inside = {inner for m in fixed for inner in m.modules()}
    mine = [
        m
        for m in [*block.modules(), *rest]
        if m not in inside and any(id(p) in covered for p in m.parameters(recurse=False))
    ]
    with differentiating(coverage), _taped_block(block, mine, fixed) as tape:
        hidden = readout.hidden(part.ids, part.attention)
        if any(_ambiguous(t, part.ids.shape[1]) for _, x, y in tape for t in (x, y)):
            return _norms2(readout, coverage, _widened(part), block, rest, check)
        picked = hidden[part.row, part.position]
        check_finite(picked, "hidden states")
        log_p = chosen_logprob(picked.double(), readout.head, part.target)
        for module, x, y in tape:
            if not torch.is_tensor(x) or not torch.is_tensor(y):
                _refuse(readout, module, "does not turn one tensor into another (a router?)")
        deltas = torch.autograd.grad(log_p.sum(), [y for _, _, y in tape], allow_unused=True, retain_graph=check)
        found: dict[nn.Module, Tensor] = {}
        for (module, x, y), delta in zip(tape, deltas):
            if delta is not None:
                if module in found:
                    _refuse(readout, module, "is called more than once")
                found[module] = _layer_norms2(readout, module, x, y, delta, covered, part)
        if check:
            _check(readout, found, mine, log_p, covered)
    norms2 = sum(found.values(), torch.zeros(len(part), dtype=torch.float64, device=hidden.device))
    return norms2 + head_norms(picked.detach(), readout.head, part.target, coverage)[0]


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
        with taped(modules, fixed, copied=True) as tape:
            yield tape
    finally:
        handle.remove()


def _ambiguous(t: object, length: int) -> bool:
    """Whether [B, heads, L, D] and [B, L, heads, D] look the same."""
    return torch.is_tensor(t) and t.dim() == 4 and t.shape[1] == t.shape[2] == length


def _widened(part: Sequences) -> Sequences:
    """The rows with one more column of padding, which no token sees."""
    wider = [torch.nn.functional.pad(x, (0, 1)) for x in (part.ids, part.attention)]
    return Sequences(*wider, part.row, part.position, part.target, part.origin, part.shape)


def _by_position(t: Tensor, shape: torch.Size) -> Tensor | None:
    """[B, L, ...]; also from [B, heads, L, D] and from [B L, D]. None where positions are not to be found."""
    if t.shape[:2] == shape:
        return t
    if t.dim() == 4 and (t.shape[0], t.shape[2]) == tuple(shape):
        return t.transpose(1, 2)
    if t.dim() == 2 and len(t) == shape.numel():
        return t.view(*shape, -1)
    return None


def _layer_norms2(readout, module: nn.Module, x, y, delta: Tensor, covered: set[int], part: Sequences) -> Tensor:
    """[n]: squared gradient norm of one layer's own parameters at each scored token."""
    shape = part.ids.shape
    at = lambda t: t[part.row, part.position].detach().double()  # noqa: E731
    inputs, outputs = _by_position(x, shape), _by_position(delta, shape)
    if inputs is None or outputs is None:
        _refuse(readout, module, "does not see every position once (a mixture of experts? DoRA?)")
    d2 = at(outputs).flatten(1).square().sum(1)
    total = torch.zeros_like(d2)
    for name, p in module.named_parameters(recurse=False):
        if id(p) not in covered:
            continue
        if is_linear(module):
            total += d2 if name == "bias" else d2 * at(inputs).flatten(1).square().sum(1)
        else:
            # An elementwise weight: moving it by 1 shows what multiplies it. Several heads may share one.
            try:
                unit = (functional_call(module, {name: p.detach() + 1}, (x.detach(),)) - y.detach()).double()
            except TypeError:
                _refuse(readout, module, f"takes more than its input, so what its {name} multiplies cannot be seen")
            each = at(_by_position(unit, shape)) * at(outputs)
            if each.shape[1:].numel() % p.numel():
                _refuse(readout, module, f"has a {name} of shape {list(p.shape)} that does not multiply its outputs")
            total += each.reshape(len(each), -1, p.numel()).sum(1).square().sum(1)
    return total


def _check(readout: Readout, found: dict[nn.Module, Tensor], mine: list, log_p: Tensor, covered: set[int]) -> None:
    """ValueError for the first layer whose norms are not those of autograd at the first tokens."""
    owned = [(m, p) for m in mine for p in m.parameters(recurse=False) if id(p) in covered]
    close = CLOSE.get(owned[0][1].dtype, 0.1) if owned else 0.0
    for i in range(min(CHECKED, len(log_p))):
        grads = torch.autograd.grad(log_p[i], [p for _, p in owned], retain_graph=True, allow_unused=True)
        truth = dict.fromkeys(mine, 0.0)
        for (module, _), g in zip(owned, grads):
            truth[module] += 0.0 if g is None else float(g.double().square().sum())
        scale = sum(truth.values())
        for module, there in truth.items():
            mine_here = float(found[module][i]) if module in found else 0.0
            if abs(mine_here - there) > close * max(there, 1e-3 * scale):
                _refuse(
                    readout,
                    module,
                    f"is neither linear nor elementwise in its weights: a token's squared norm is {there:.3g} by"
                    f" autograd and {mine_here:.3g} by its inputs and outputs",
                )


def _refuse(readout: Readout, module: nn.Module, what: str) -> None:
    name = next((n for n, m in readout.model.named_modules() if m is module), "")
    raise ValueError(
        f"{type(readout.model).__name__} has no last_block_norm: its layer {name} ({type(module).__name__}) {what}. Use"
        " head_norm, or gradient_norm with parameters=..."
    )
