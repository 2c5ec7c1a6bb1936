"""What a forward pass decides on the way: which experts a router takes, which side of a threshold a number falls on.

A derivative takes every decision as given: autograd differentiates through the values that a top-k has chosen and never
through the choice. A finite difference whose step crosses such a border instead adds the jump, divided by the step. So
the decisions of the unmoved pass are recorded, and the moved passes are given them again: the difference is then that
of the function that autograd differentiates. Recorded are the integers and truth values that operators make from
floating-point numbers, numbers that they hand to Python, roundings and signs, and what the model detaches (the weight
norms of DoRA).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CHOICES = {aten.topk.default: (2, -1), aten.sort.default: (1, -1), aten.max.dim: (1, None), aten.min.dim: (1, None)}
"""Operators that return chosen values and their indices: the place of their argument `dim`, and its default."""
CONSTANT = {
    getattr(aten, name).default for name in ("round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside", "detach")
}
"""Operators with floating-point results through which nothing is differentiated."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Decisions:
    """The decisions of one forward pass, in order.

    with decisions.recorded(): ...   the pass without a move          with decisions.given(): ...   every pass after it
    """

    def __init__(self) -> None:
        self.made: list[tuple[Any, Any]] = []
        self.routed = False

    @contextmanager
    def recorded(self) -> Iterator[None]:
        self.made.clear()
        with _Recording(self):
            yield

    @contextmanager
    def given(self) -> Iterator[None]:
        """ValueError where the pass inside decides on something else than the recorded one."""
        if not self.made:
            yield
            return
        with _Replaying(self):
            yield


def num_experts(config: Any) -> int:
    """Experts per layer that a model's config declares; 0 for none."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return max((n for n in (getattr(config, name, None) for name in COUNTS) if isinstance(n, int)), default=0)


class _Recording(TorchDispatchMode):
    def __init__(self, decisions: Decisions) -> None:
        super().__init__()
        self.decisions = decisions

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in CHOICES and _floating(args):
            self.decisions.routed = True
            self.decisions.made.append((func, out[1].clone()))
        elif _decides(func, args, out):
            self.decisions.made.append((func, out.clone() if torch.is_tensor(out) else out))
        return out


class _Replaying(TorchDispatchMode):
    def __init__(self, decisions: Decisions) -> None:
        super().__init__()
        self.left = iter(decisions.made)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CHOICES and _floating(args):
            index = self._next(func)
            return _chosen(func, args, kwargs, index), index.clone()
        out = func(*args, **kwargs)
        if not _decides(func, args, out):
            return out
        found = self._next(func)
        if torch.is_tensor(out) and found.shape != out.shape:
            self._differs(func)
        return found.clone() if torch.is_tensor(found) else found

    def _next(self, func: Any) -> Any:
        recorded, found = next(self.left, (None, None))
        if recorded is not func:
            self._differs(func)
        return found

    def _differs(self, func: Any) -> None:
        raise ValueError(
            f"a forward pass with moved weights takes another path ({func} where the unmoved pass had something else):"
            " finite differences do not see its derivative; use method='jvp' or 'exact'"
        )


def _floating(args: tuple) -> bool:
    return any(torch.is_tensor(a) and a.is_floating_point() for a in args)


def _decides(func: Any, args: tuple, out: Any) -> bool:
    if not _floating(args):
        return False
    if torch.is_tensor(out):
        return func in CONSTANT or not (out.is_floating_point() or out.is_complex())
    return isinstance(out, bool | int | float)


def _chosen(func: Any, args: tuple, kwargs: dict, index: Tensor) -> Tensor:
    """The values at the recorded indices."""
    place, default = CHOICES[func]
    dim = args[place] if len(args) > place else kwargs.get("dim", default)
    if index.dim() < args[0].dim():
        return args[0].gather(dim, index.unsqueeze(dim)).squeeze(dim)
    return args[0].gather(dim, index)
