"""Random directions in parameter space that cost no second copy of the weights, and a model that is moved along one.

A matrix W [R, C] moves along r cᵀ with independent signs r ∈ {±1}^R, c ∈ {±1}^C; a vector moves along random signs; E[u
uᵀ] = I for both. A linear layer that moves by ε r cᵀ adds ε (x·c) r to its output, an embedding ε r[id] c: forward
hooks do this, with ε a number (finite differences) or a dual number (forward mode). Parameters of any other layer are
replaced by W + ε u for the call. A weight that two layers share has one direction, and so has each parameter across
calls, models and numbers of directions: seed and name determine it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

LORA = "lora_"


@dataclass(frozen=True, eq=False)
class Coverage:
    """The parameters that count. `named` are theirs; `uncovered` names what the selection asks for and cannot be moved,
    and why.
    """

    named: dict[str, nn.Parameter]
    uncovered: dict[str, str]
    selection: str | tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.named.values())

    def name_of(self, parameter: Tensor | None) -> str | None:
        return next((name for name, p in self.named.items() if p is parameter), None)


def select_parameters(model: nn.Module, parameters: str | Sequence[str] = "all", uncovered: str = "refuse") -> Coverage:
    """The parameters that "all", "trainable" (those that require a gradient: under LoRA the adapter's), "lora", or name
    patterns (`*.mlp.*`, or a sequence of them) select.

    Weights that are stored quantised cannot be moved: ValueError names them, or with uncovered="report" they are listed
    and left out.
    """
    patterns = (
        {"all": ("*",), "trainable": ("*",), "lora": (f"*{LORA}*",)}.get(parameters, (parameters,))
        if isinstance(parameters, str)
        else tuple(parameters)
    )
    chosen = {n: p for n, p in model.named_parameters() if any(fnmatchcase(n, pattern) for pattern in patterns)}
    if parameters == "trainable":
        chosen = {n: p for n, p in chosen.items() if p.requires_grad}
    named = {n: p for n, p in chosen.items() if p.is_floating_point() and not _packed(p)}
    missing = {n: f"stored as {p.dtype} in {type(p).__name__}" for n, p in chosen.items() if n not in named}
    for name, buffer in model.named_buffers():
        packed = (
            not buffer.is_floating_point()
            and not buffer.is_complex()
            and buffer.dtype != torch.bool
            and buffer.dim() >= 2
        )
        if packed and parameters != "trainable" and any(fnmatchcase(name, pattern) for pattern in patterns):
            missing[name] = f"a {buffer.dtype} buffer, as quantised layers keep their weights"
    selection = parameters if isinstance(parameters, str) else tuple(parameters)
    if not named:
        hint = " (is it a PEFT model?)" if parameters == "lora" else ""
        raise ValueError(
            f"{type(model).__name__}: no parameter that can be moved matches {selection!r}{hint}; cannot be moved:"
            f" {missing}"
        )
    if missing and uncovered == "refuse":
        shown = "; ".join(f"{name} ({why})" for name, why in list(missing.items())[:5])
        raise ValueError(
            f"{len(missing)} of the selected parameters cannot be moved: {shown}. Select others (parameters='lora' or a"
            " name pattern), or leave them out and have them listed with uncovered='report'"
        )
    return Coverage(named, missing, selection)


def _packed(p: nn.Parameter) -> bool:
    return hasattr(p, "quant_state") or hasattr(p, "tensor_impl") or p.element_size() < 2


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def signs(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """±1 with equal probability; drawn on the CPU, so that every device gets the same."""
    return (torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8) * 2 - 1).to(
        like.device, like.dtype
    )


class Directions:
    """K directions over a coverage: for each parameter a dict of factors, each [K, ...].

    "r" [K, ..., R] and "c" [K, ..., C] of matrices (and of stacks of matrices), "v" of vectors. More directions begin
    with the same ones.
    """

    def __init__(self, coverage: Coverage, num: int, seed: int = 0):
        self.num, self.coverage = num, coverage
        self.factors: dict[str, dict[str, Tensor]] = {}
        for name, p in coverage.named.items():
            generator = _generator(seed, name)
            if p.dim() < 2:
                self.factors[name] = {"v": torch.stack([signs(p.shape, generator, p) for _ in range(num)])}
            else:
                stack, (rows, columns) = p.shape[:-2], p.shape[-2:]
                drawn = [
                    (signs((*stack, rows), generator, p), signs((*stack, columns), generator, p)) for _ in range(num)
                ]
                self.factors[name] = dict(zip("rc", map(torch.stack, zip(*drawn))))

    def __getitem__(self, k: int) -> dict[str, dict[str, Tensor]]:
        return {name: {kind: x[k] for kind, x in factors.items()} for name, factors in self.factors.items()}

    def dense(self, k: int) -> dict[str, Tensor]:
        """The direction in full, parameter by parameter: for tests and for small models."""
        return {name: expand(factors) for name, factors in self[k].items()}


def expand(factors: dict[str, Tensor]) -> Tensor:
    return factors["v"] if "v" in factors else factors["r"][..., :, None] * factors["c"][..., None, :]


class Moved:
    """A module whose parameters are W + ε u while it is called: `Moved(body, coverage)(ε, u, input_ids=..., ...)`.

    Layers whose output is known to be linear in their weight get hooks; all other parameters are replaced for the call.
    Which is which is settled by a trial call: a hook that does not fire belongs to a weight that is used some other
    way, and so does a weight that a layer of another type holds as well (a scaled embedding tied to the LM head).
    """

    def __init__(self, body: nn.Module, coverage: Coverage, **trial: Any):
        self.body = body
        by_identity = {id(p): name for name, p in coverage.named.items()}
        self.sites = {
            m: by_identity[id(m.weight)] for m in body.modules() if _hookable(m) and id(m.weight) in by_identity
        }
        fired: set[nn.Module] = set()
        handles = [m.register_forward_hook(lambda m, args, out: fired.add(m)) for m in self.sites]
        try:
            with torch.no_grad():
                body(**trial)
        finally:
            for handle in handles:
                handle.remove()
        held = [(m, p) for m in body.modules() for p in m.parameters(recurse=False) if id(p) in by_identity]
        otherwise = {by_identity[id(p)] for m, p in held if m not in fired or p is not m.weight}
        self.sites = {m: name for m, name in self.sites.items() if name not in otherwise}
        hooked, local = set(self.sites.values()), dict(body.named_parameters())
        self.replaced = {
            n: by_identity[id(p)] for n, p in local.items() if id(p) in by_identity and by_identity[id(p)] not in hooked
        }
        self.reached = frozenset(hooked | set(self.replaced.values()))

    def __call__(self, eps: Any, direction: dict[str, dict[str, Tensor]], **inputs: Any) -> Any:
        handles = [m.register_forward_hook(_injection(eps, direction[name])) for m, name in self.sites.items()]
        local = dict(self.body.named_parameters())
        moved = {n: _step(local[n], eps, expand(direction[name])) for n, name in self.replaced.items()}
        try:
            return functional_call(self.body, moved, (), inputs) if moved else self.body(**inputs)
        finally:
            for handle in handles:
                handle.remove()


def _step(p: Tensor, eps: Any, u: Tensor) -> Tensor:
    return p + (eps * u).to(p.dtype)


def is_linear(module: nn.Module) -> bool:
    """Layers of exactly these types: a subclass may use its weight differently."""
    kind = type(module)
    return kind is nn.Linear or (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _hookable(module: nn.Module) -> bool:
    return type(module) is nn.Embedding or is_linear(module)


def _injection(eps: Any, factors: dict[str, Tensor]):
    r, c = factors["r"], factors["c"]

    def outer(out, along, sign):
        if torch.is_tensor(eps):  # forward mode has no quick rule for addcmul
            return out + (along[..., None] * sign * eps).to(out.dtype)
        return torch.addcmul(out, (along[..., None] * eps).to(out.dtype), sign.to(out.dtype))

    def linear(module, args, out):
        return outer(out, args[0] @ c, r)

    def transposed(module, args, out):
        return outer(out, args[0] @ r, c)

    def embedding(module, args, out):
        row = r[args[0]]
        if module.padding_idx is not None:
            row = row.masked_fill(args[0] == module.padding_idx, 0)
        return out + (row[..., None] * c * eps).to(out.dtype)

    def hook(module, args, out):
        if type(module) is nn.Embedding:
            return embedding(module, args, out)
        return linear(module, args, out) if type(module) is nn.Linear else transposed(module, args, out)

    return hook
