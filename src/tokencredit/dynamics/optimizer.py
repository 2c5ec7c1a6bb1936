"""One step of torch's AdamW, Adam or SGD as an affine map of the gradient, read from a saved state, without making the
step.

    Δθ = μ + δ − a ⊙ g          g the gradient after clipping, μ what momentum does, δ what weight decay does

AdamW (Loshchilov & Hutter, arXiv:1711.05101, as torch.optim computes it), with t counting this step:

    v′ = β₂ v + (1 − β₂) g²          D = √v′ / √(1 − β₂ᵗ) + ε
    μ = −η β₁ m / ((1 − β₁ᵗ) D)      a = η (1 − β₁) / ((1 − β₁ᵗ) D)      δ = −η λ θ

so a depends on the whole batch through D, and given D the map is linear: the step splits exactly into momentum, decay
and one term per rollout. Adam adds λ θ to g before everything else, and δ = −a λ θ. SGD has a = η times a number.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokencredit.dynamics.vectors import Filed, trained
from tokencredit.lm.models import CausalModel

FILE = "optimizer.pt"
ADAM = frozenset({"lr", "betas", "eps", "weight_decay", "params"})
SGD = frozenset({"lr", "momentum", "dampening", "nesterov", "weight_decay", "params"})
FOREIGN = {
    "state1": "an 8-bit or paged optimizer (bitsandbytes)",
    "qmap1": "an 8-bit optimizer (bitsandbytes)",
    "exp_avg_sq_row": "Adafactor",
    "exp_avg_sq_col": "Adafactor",
    "prev": "Adagrad or Rprop",
    "square_avg": "RMSprop",
    "z": "a schedule-free optimizer",
    "momentum_buffer_list": "Muon",
}


@dataclass(frozen=True)
class Rule:
    """How one parameter moves. kind "adamw" (decoupled decay), "adam" or "sgd"; lr is η, weight_decay λ."""

    kind: str
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    amsgrad: bool = False
    maximize: bool = False


class Moments(NamedTuple):
    """What the optimizer remembers of one parameter: steps made, m (SGD: its buffer), v, AMSGrad's largest v; None for
    what is absent.
    """

    step: int = 0
    first: Tensor | None = None
    second: Tensor | None = None
    largest: Tensor | None = None


class _FiledMoments(Mapping[str, Moments]):
    """Moments that are read from files, parameter by parameter."""

    def __init__(self, steps: Mapping[str, int], kept: Mapping[str, Filed]) -> None:
        self.steps, self.kept = steps, kept

    def __getitem__(self, name: str) -> Moments:
        return Moments(self.steps[name], **{field: x[name] for field, x in self.kept.items() if name in x.entries})

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


class Step(NamedTuple):
    """Δθ = momentum + decay − gain ⊙ g of one parameter."""

    momentum: Tensor
    decay: Tensor
    gain: Tensor


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """Rule and moments of every trainable parameter, by name."""

    rules: Mapping[str, Rule]
    moments: Mapping[str, Moments]

    def at(self, lr: float) -> OptimizerState:
        """The same state at another learning rate, for all groups."""
        if not lr > 0:
            raise ValueError(f"a learning rate is positive, got {lr}")
        return replace(self, rules={name: replace(rule, lr=lr) for name, rule in self.rules.items()})

    def filed(self, folder: Path) -> OptimizerState:
        """The same state with its moments in a file of the folder: `vectors.Filed`."""
        kept = {
            field: Filed(
                {name: x for name, each in self.moments.items() if (x := getattr(each, field)) is not None}, folder
            )
            for field in ("first", "second", "largest")
        }
        return replace(self, moments=_FiledMoments({n: each.step for n, each in self.moments.items()}, kept))

    @property
    def decays(self) -> bool:
        """Whether weight decay moves a parameter."""
        return any(rule.weight_decay for rule in self.rules.values())

    @property
    def lr(self) -> float:
        """The largest learning rate of the groups."""
        return max(rule.lr for rule in self.rules.values())

    @classmethod
    def fresh(cls, names: Sequence[str], rule: Rule) -> OptimizerState:
        """The state of an optimizer that has not made a step."""
        return cls({name: rule for name in names}, {name: Moments() for name in names})


def step_parts(
    theta: Tensor, gradient: Tensor, rule: Rule, moments: Moments, dtype: torch.dtype = torch.float64
) -> Step:
    """The parts of one step from the clipped gradient, computed in a dtype."""
    theta, g, sign = theta.detach().to(dtype), gradient.to(dtype), -1.0 if rule.maximize else 1.0
    coupled = 0.0 if rule.kind == "adamw" else rule.weight_decay
    first = torch.zeros_like(theta) if moments.first is None else moments.first.to(theta.device, dtype)
    if rule.kind == "sgd":
        slope, carried = _sgd(rule, moments.first is not None)
        gain = torch.full_like(theta, rule.lr * slope * sign)
        return Step(-rule.lr * carried * first, -rule.lr * slope * coupled * theta, gain)
    (beta1, beta2), t = rule.betas, moments.step + 1
    driving = g + coupled * sign * theta if coupled else g
    second = torch.zeros_like(theta) if moments.second is None else moments.second.to(theta.device, dtype) * beta2
    second.addcmul_(driving, driving, value=1 - beta2)
    if rule.amsgrad and moments.largest is not None:
        second = torch.maximum(second, moments.largest.to(theta.device, dtype))
    scale = second.sqrt_().div_((1 - beta2**t) ** 0.5).add_(rule.eps).reciprocal_().mul_(rule.lr / (1 - beta1**t))
    gain = (1 - beta1) * sign * scale
    decay = -gain * coupled * sign * theta if coupled else -rule.lr * rule.weight_decay * theta * (rule.kind == "adamw")
    return Step(scale.mul_(-beta1).mul_(first), decay, gain)


def _sgd(rule: Rule, later: bool) -> tuple[float, float]:
    """(factor of the gradient, factor of the momentum buffer) in a step; torch's first step fills the buffer without
    dampening.
    """
    mu, fresh = rule.momentum, 1 - rule.dampening if later else 1.0
    if not mu:
        return 1.0, 0.0
    return (1 + mu * fresh, mu * mu) if rule.nesterov else (fresh, mu)


def read_optimizer(path: str | Path, model: CausalModel, kind: str | None = None) -> OptimizerState:
    """The state in a checkpoint folder (its optimizer.pt) or file, matched to the model's trainable parameters.

    kind  "adam" or "adamw" where the file does not say (torch before 2.7) and weight decay makes a difference

    FileNotFoundError where there is none; ValueError where it belongs to another optimizer or to another set of
    parameters. Nothing but tensors and plain values is unpickled.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(
            f"{path} has no optimizer state ({FILE}): save checkpoints with it (save_only_model=False), or ask for a "
            "fresh optimizer (sgd or adamw): momentum is zero, and AdamW's first step is a sign step"
        )
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is not a torch optimizer state that can be read safely: {reason}") from error
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            f"{file} is not an optimizer's state_dict: it has no `state` and `param_groups`. Gather a sharded state "
            "(DeepSpeed, FSDP) into one file first"
        )
    return match_state(saved, model, kind)


def match_state(saved: Mapping[str, Any], model: CausalModel, kind: str | None = None) -> OptimizerState:
    """A `state_dict` of a torch optimizer over the trainable parameters of `model`, by name; see `read_optimizer`."""
    groups, states = saved["param_groups"], saved["state"]
    names = _names(groups, states, model)
    rules, moments = {}, {}
    for group, some in zip(groups, names):
        for name, index in zip(some, group["params"]):
            state = states.get(index, {})
            rules[name], moments[name] = _rule(group, state, kind), _moments(state)
    return OptimizerState(rules, moments)


def _rule(group: Mapping[str, Any], state: Mapping[str, Any], kind: str | None) -> Rule:
    for key, what in FOREIGN.items():
        if key in state or key in group:
            raise ValueError(
                f"the state is that of {what}: its step is not read here. Supported: torch's AdamW, Adam and SGD"
            )
    if group.keys() >= SGD:
        keys = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")
        return Rule("sgd", **{key: _number(group[key]) for key in keys if key in group})
    if not group.keys() >= ADAM or (state and not {"step", "exp_avg", "exp_avg_sq"} <= state.keys()):
        there = (
            f"its groups have {', '.join(sorted(group.keys() - {'params'}))}, its moments"
            f" {', '.join(map(str, state)) or 'nothing'}"
        )
        raise ValueError(f"the state is not that of torch's AdamW, Adam or SGD: {there}")
    decoupled = group.get("decoupled_weight_decay")
    if decoupled is None and kind is None and group["weight_decay"]:
        raise ValueError(
            "the state does not say whether its weight decay is AdamW's or Adam's: give kind='adamw' or 'adam'"
        )
    kind = kind or ("adam" if decoupled is False else "adamw")
    keys = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
    return Rule(kind, **{key: _number(group[key]) for key in keys if key in group})


def _number(value: Any) -> Any:
    return (
        value.item()
        if isinstance(value, Tensor)
        else tuple(map(float, value))
        if isinstance(value, (tuple, list))
        else value
    )


def _moments(state: Mapping[str, Any]) -> Moments:
    if "exp_avg" in state:
        return Moments(int(state["step"]), state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"))
    return Moments(0, state.get("momentum_buffer"))


def _names(groups: Sequence[Mapping], states: Mapping, model: CausalModel) -> list[list[str]]:
    """Names of every group's parameters: as saved, in the order of transformers' Trainer, or in the order of the
    model.
    """
    trainable = trained(model)
    candidates = [
        [list(group.get("param_names") or []) for group in groups],
        _trainer_order(model, trainable, len(groups)),
    ]
    if len(groups) == 1:
        candidates.append([list(trainable)])
    for found in candidates:
        if _fits(found, groups, states, trainable):
            return found
    sizes = " + ".join(str(len(group["params"])) for group in groups)
    shapes = sorted(
        {tuple(state["exp_avg"].shape) for state in states.values() if "exp_avg" in state}
        - {tuple(p.shape) for p in trainable.values()}
    )
    odd = f"; shapes that the model does not have: {', '.join(map(str, shapes[:3]))}" if shapes else ""
    raise ValueError(
        f"the optimizer state belongs to another set of parameters: it has {sizes} of them, the model {len(trainable)}"
        f" to be trained{odd}. Open the checkpoint with the model (and LoRA adapter) that it was saved with"
    )


def _trainer_order(model: CausalModel, trainable: Mapping[str, Tensor], num_groups: int) -> list[list[str]]:
    """transformers' Trainer: parameters with weight decay, then those without (biases and norms)."""
    from torch import nn
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decays = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    both = [[name for name in trainable if name in decays], [name for name in trainable if name not in decays]]
    return both if num_groups == 2 else [group for group in both if group]


def _fits(names: list[list[str]], groups: Sequence[Mapping], states: Mapping, trainable: Mapping[str, Tensor]) -> bool:
    if [len(some) for some in names] != [len(group["params"]) for group in groups] or {
        n for s in names for n in s
    } != trainable.keys():
        return False
    pairs = (
        (name, states.get(index, {}))
        for some, group in zip(names, groups)
        for name, index in zip(some, group["params"])
    )
    kept = ((name, state.get("exp_avg", state.get("momentum_buffer"))) for name, state in pairs)
    return all(moment is None or moment.shape == trainable[name].shape for name, moment in kept)
