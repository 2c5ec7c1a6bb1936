"""The credit model: two small networks on features of a frozen policy, one for the size of a token's effect, one for
its sign.

    size²(x)     = c · mean_k softplus(f_k(x))          ≈ E[(Q − V)² | x]
    credit(x, R) = mean_k g_k(x, R)                      ≈ E[Q − V | x, R]

f and g are networks of one hidden layer, an ensemble of `MEMBERS`, fitted by weighted least squares to labels of a
pivotality run (`labels`). Prompts are split three ways: to fit, to stop early, and to find c, so that sizes are right
on average on prompts that neither saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tokencredit.credit_model.features import SCORES, STATES, TokenFeatures, features
from tokencredit.credit_model.labels import ESTIMAND, Labels
from tokencredit.durable import read_mapping, replace_file, write_json
from tokencredit.lm.models import CausalModel

MEMBERS, HIDDEN, MOST = 3, 32, 64
EPOCHS, PATIENCE, RATE, DECAY = 400, 40, 3e-3, 1e-2
PARTS = (0.65, 0.85)
"""Shares of the prompts up to which they are fitted, and stop the fitting; the rest calibrates."""


@dataclass(frozen=True, eq=False)
class CreditModel:
    """A fitted credit model. `weights` {name: tensor}; `card` says of which policy it is and what it was fitted to."""

    weights: dict[str, Tensor]
    card: dict[str, Any]

    @classmethod
    def fit(
        cls, found: TokenFeatures, labels: Labels, *, seed: int = 0, about: dict[str, Any] | None = None
    ) -> CreditModel:
        """ValueError with fewer than 10 prompts: nothing could be held out."""
        count = len(labels.prompts)
        if count < 10:
            raise ValueError(
                f"{count} prompts are too few to fit, stop and calibrate on different ones: 10 are the least"
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator)
        place = order.argsort()[labels.prompt].double() / count
        fit, stop = place < PARTS[0], (place >= PARTS[0]) & (place < PARTS[1])
        rest = place >= PARTS[1]
        weights = _scales(found, fit)
        x = _inputs(found, weights)
        with_outcome = torch.cat([x, found.outcome[:, None]], 1)
        weight = (labels.weight / labels.weight[fit].mean()).float()
        scale = labels.size[fit].clamp(min=0).mean().sqrt().clamp(min=1e-6)
        size, effect = (labels.size / scale**2).float(), (labels.effect / scale).float()
        stopped = {}
        for name, inputs, target, link in (
            ("size", x, size, softplus),
            ("credit", with_outcome, effect, nn.Identity()),
        ):
            for member in range(MEMBERS):
                network, stopped[f"{name}.{member}"] = _train(inputs, target, weight, fit, stop, link, generator)
                weights |= {f"{name}.{member}.{key}": value for key, value in network.state_dict().items()}
        weights |= {"scale": scale.float(), "factor": torch.ones(())}
        model = cls(weights, {})
        predicted = model.size(found)[rest].square()
        factor = float((labels.size[rest] * labels.weight[rest]).sum() / (predicted * labels.weight[rest]).sum())
        weights["factor"] = torch.tensor(max(factor, 1e-6))
        parts = {"fit": fit, "stop": stop, "calibrate": rest}
        card = {
            "what": f"size and sign of a token's {ESTIMAND}",
            "prompts": {name: len(labels.prompt[part].unique()) for name, part in parts.items()},
            "tokens": {name: int(part.sum()) for name, part in parts.items()},
            "tokens_spent_on_labels": labels.spent,
            "seed": seed,
            "loss_at_stop": stopped,
            "features": [*STATES, *SCORES],
            "prompt_ids": list(labels.prompts),
            **(about or {}),
        }
        return cls(weights, card)

    def size(self, found: TokenFeatures) -> Tensor:
        """[N] ≥ 0: root of the expected squared effect."""
        x = _inputs(found, self.weights)
        mean = torch.stack([softplus(self._network("size", k)(x)[:, 0]) for k in range(MEMBERS)]).mean(0)
        return (mean * self.weights["factor"]).sqrt() * self.weights["scale"]

    def credit(self, found: TokenFeatures) -> Tensor:
        """[N]: the expected effect, given the outcome."""
        x = torch.cat([_inputs(found, self.weights), found.outcome[:, None]], 1)
        return (
            torch.stack([self._network("credit", k)(x)[:, 0] for k in range(MEMBERS)]).mean(0) * self.weights["scale"]
        )

    def predict(
        self,
        model: CausalModel,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        rewards: Sequence[float],
        *,
        temperature: float = 1.0,
        batch: int = 32,
    ) -> dict[str, list[Tensor]]:
        """{"learned_size", "learned_credit"}: [T] of every completion, in the unit of the reward."""
        found = features(model, prompts, completions, rewards, temperature=temperature, batch=batch)
        lengths = [len(ids) for ids in completions]
        values = {"learned_size": self.size(found), "learned_credit": self.credit(found)}
        return {name: list(x.split(lengths)) for name, x in values.items()}

    def save(self, folder: Path) -> None:
        """weights.safetensors and card.json."""
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        data = save({name: x.contiguous() for name, x in self.weights.items()})
        replace_file(folder / "weights.safetensors", lambda file: file.write(data))
        write_json(folder / "card.json", self.card)

    @classmethod
    def load(cls, folder: Path) -> CreditModel:
        """ValueError where the directory holds no credit model."""
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "weights.safetensors").exists():
            raise ValueError(
                f"{folder} holds no credit model: fit one with `tokencredit credit-model fit RUN --out {folder}`"
            )
        return cls(load_file(folder / "weights.safetensors"), read_mapping(folder / "card.json"))

    def _network(self, name: str, member: int) -> Callable[[Tensor], Tensor]:
        w = {key: self.weights[f"{name}.{member}.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")}
        return lambda x: torch.relu(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]


def _scales(found: TokenFeatures, fit: Tensor) -> dict[str, Tensor]:
    """Mean and directions of every kind of state, mean and deviation of every score, of the tokens that are fitted."""
    weights: dict[str, Tensor] = {}
    for kind in range(found.states.shape[1]):
        some = found.states[fit, kind]
        mean = some.mean(0)
        _, s, v = torch.linalg.svd(some - mean, full_matrices=False)
        keep = min(MOST, len(s))
        deviation = (s[:keep] / max(len(some) - 1, 1) ** 0.5).clamp(min=1e-4 * float(s[0]) + 1e-12)
        weights |= {f"state.{kind}.mean": mean, f"state.{kind}.basis": v[:keep].T / deviation}
    scores = found.scores[fit]
    return weights | {"scores.mean": scores.mean(0), "scores.deviation": scores.std(0).clamp(min=1e-6)}


def _inputs(found: TokenFeatures, weights: dict[str, Tensor]) -> Tensor:
    """[N, F]: whitened states, and scores in standard units."""
    states = [
        (found.states[:, kind] - weights[f"state.{kind}.mean"]) @ weights[f"state.{kind}.basis"]
        for kind in range(found.states.shape[1])
    ]
    scores = (found.scores - weights["scores.mean"]) / weights["scores.deviation"]
    return torch.cat([*states, scores], 1)


def _train(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    fit: Tensor,
    stop: Tensor,
    link: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> tuple[nn.Sequential, float]:
    """The network with the smallest loss on the tokens that stop it, and that loss."""
    first, second = nn.Linear(x.shape[1], HIDDEN), nn.Linear(HIDDEN, 1)
    network = nn.Sequential(first, nn.ReLU(), second)
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)

    def loss(some: Tensor) -> Tensor:
        return (weight[some] * (link(network(x[some])[:, 0]) - target[some]).square()).mean()

    best, kept, waited = float("inf"), None, 0
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        loss(fit).backward()
        optimizer.step()
        with torch.no_grad():
            now = float(loss(stop))
        if now < best - 1e-6:
            best, waited = now, 0
            kept = {key: value.clone() for key, value in network.state_dict().items()}
        elif (waited := waited + 1) >= PATIENCE:
            break
    if kept is not None:
        network.load_state_dict(kept)
    return network.eval(), best


def same_prompts(card: dict[str, Any], prompts: Sequence[str]) -> int:
    """How many of these prompts the model was fitted, stopped or calibrated on."""
    return len(set(card.get("prompt_ids", ())) & set(prompts))
