"""The position-local part of every token's gradient, exact for all tokens in one backward pass; a control variate for
the sketch.

With keys and values held fixed, a token's log-prob depends on the parameters through its own position alone, and the
gradient of a linear layer is one outer product δ xᵀ: its squared norm is ‖δ‖² ‖x‖², and along r cᵀ it is (δ·r)(x·c).
For the gradient g = g_local + g_rest,

    ‖g‖² = ‖g_local‖² + E [s² − s_local²]

along random directions: the same mean as E s², and the fluctuation of s_local² is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tokencredit.lm.directions import Directions, Moved
from tokencredit.lm.readout import Readout, Sequences
from tokencredit.lm.tangents import head_gradient

KEYS = ("k_proj", "v_proj")
FIXED = (*KEYS, "k_norm", "v_norm", "k_layernorm", "key_layernorm")
"""Layers whose outputs reach other positions."""


def fixed_layers(body: nn.Module) -> list[nn.Module]:
    """The layers between the residual stream and the keys and values; none where these are not made by layers of their
    own.
    """
    found = [(name.rpartition(".")[2], m) for name, m in body.named_modules()]
    depth = getattr(getattr(body, "config", None), "num_hidden_layers", -1)
    if any(sum(name == key for name, _ in found) != depth for key in KEYS):
        return []
    return [m for name, m in found if name in FIXED]


@contextmanager
def taped(
    modules: list[nn.Module], fixed: list[nn.Module], copied: bool = False
) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Holds the outputs of `fixed` fixed inside; lists (module, input, output) of `modules` as they are called.

    copied  outputs are handed on as copies, so that what is done to them in place (OLMo clips its queries) is not done
            to those listed
    """
    tape: list = []

    def record(module, args, kwargs, out):
        first = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x)), None)
        tape.append((module, None if first is None else first.detach(), out))
        return out.clone() if copied and torch.is_tensor(out) else None

    handles = [m.register_forward_hook(record, with_kwargs=True) for m in modules]
    handles += [m.register_forward_hook(lambda m, args, out: out.detach()) for m in fixed]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def local_part(
    readout: Readout, moved: Moved, directions: Directions, part: Sequences, states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(‖g_local‖² [N], s_local [K, N]) over linear layers that see every position; zeros where keys cannot be held
    fixed. states: ∂log p_t/∂h [N, D] where it is known.
    """
    device = part.ids.device
    norms2, along = torch.zeros(len(part), device=device), torch.zeros(directions.num, len(part), device=device)
    fixed = fixed_layers(readout.body)
    inside = {inner for m in fixed for inner in m.modules()}
    names = list(moved.sites.values())
    sites = [
        m for m, name in moved.sites.items() if type(m) is nn.Linear and m not in inside and names.count(name) == 1
    ]
    if not fixed or not sites:
        return norms2, along
    with torch.enable_grad(), _watched(sites), taped(sites, fixed) as tape:
        hidden = readout.hidden(part.ids, part.attention)[part.row, part.position]
        slope = head_gradient(hidden.detach(), readout.head, part.target).states if states is None else states
        outputs = [y for _, _, y in tape]
        deltas = torch.autograd.grad(hidden, outputs, slope.to(hidden.dtype), allow_unused=True)
    calls = [module for module, _, _ in tape]
    for (module, x, _), delta in zip(tape, deltas):
        if delta is None or calls.count(module) > 1 or delta.dim() != 3 or delta.shape[:2] != part.ids.shape:
            continue
        x, delta = x[part.row, part.position], delta[part.row, part.position]
        factors = directions.factors[moved.sites[module]]
        norms2 += x.square().sum(1) * delta.square().sum(1)
        along += (factors["r"] @ delta.t()) * (factors["c"] @ x.t())
    return norms2, along


@contextmanager
def _watched(sites: list[nn.Module]) -> Iterator[None]:
    """Weights that ask for gradients inside, so that there is a graph where all are frozen."""
    frozen = [m.weight for m in sites if not m.weight.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
