"""How the prompts of a training run went before: the score `past_pass_rate`, and what a trainer's scorers remember from
one rollout batch to the next, through checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import gather_object
from torch import Tensor

from tokencredit.engines.trainer import Trainer
from tokencredit.engines.trl_carried import read_carried, write_carried
from tokencredit.engines.trl_groups import share
from tokencredit.engines.trl_rewards import succeeded
from tokencredit.lm.models import CausalModel
from tokencredit.method import Method

FILE = "scorers.json"


@runtime_checkable
class Stateful(Protocol):
    """A scorer with a state, which JSON holds and which is the same on every process."""

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


@dataclass
class PassRates:
    """The scorer `past_pass_rate` [B, T], equal at all tokens of a prompt's rollouts: which share of those before this
    rollout batch succeeded, the later ones weighing more.

        p = W / N          after every visit of the prompt    W ← γ W + successes,    N ← γ N + rollouts

    Everything that was sampled in training counts, the rounds that dynamic sampling left out included; evaluation reads
    and adds nothing. A prompt that was not seen before has the share of its own group. Prompts are told apart by their
    text or messages alone.

    decay   γ: 1 counts all rollouts alike, 0 those of the last visit alone. The policy learns, so what is long past
            says a prompt is harder than it is

        CreditTrainer(method=METHODS["entropy_bonus"].replace(difficulty=0.5, rate="past_pass_rate"),
                      scorers={"past_pass_rate": PassRates(decay=0.8)}, ...)
    """

    decay: float = 0.5
    seen: dict[str, tuple[float, float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"PassRates.decay must be in [0, 1], got {self.decay}")

    def __call__(self, trainer: Trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        training, ids = trainer.model.training, batch["completion_ids"]
        size = trainer.num_generations if training else trainer.num_generations_eval
        keys = gather_object([_key(row) for row in inputs])[::size]
        wins = succeeded(trainer).view(-1, size).sum(1).tolist()
        rates = torch.tensor([self.rate(key, won / size) for key, won in zip(keys, wins)])
        if training:
            known = sum(key in self.seen for key in keys) / len(keys)
            trainer._metrics["train"]["past_pass_rate"].append(float(rates.mean()))
            trainer._metrics["train"]["past_pass_rate/known"].append(known)
            for key, won in zip(keys, wins):
                self.add(key, won, size)
        own = rates.repeat_interleave(size)[share(trainer, size * len(keys))]
        return own[:, None].expand(ids.shape).to(ids.device)

    def rate(self, key: str, unseen: float) -> float:
        """p of a prompt, `unseen` where there is none."""
        won, drawn = self.seen.get(key, (0.0, 0.0))
        return won / drawn if drawn else unseen

    def add(self, key: str, won: int, drawn: int) -> None:
        """A visit of the prompt."""
        before = self.seen.get(key, (0.0, 0.0))
        self.seen[key] = (self.decay * before[0] + won, self.decay * before[1] + drawn)

    def state(self) -> dict[str, tuple[float, float]]:
        return self.seen

    def restore(self, state: dict[str, list[float]]) -> None:
        self.seen = {key: (won, drawn) for key, (won, drawn) in state.items()}


def _key(row: dict) -> str:
    """A prompt, shortly."""
    if any(row.get(name) is not None for name in ("image", "images")):
        raise ValueError("past_pass_rate knows a prompt by its text, and these have images: give a scorer of your own")
    return hashlib.sha256(json.dumps(row.get("prompt", ""), sort_keys=True).encode()).hexdigest()[:20]


class Remembers:
    """Mixin of a trainer: the state of the scorers that its method reads is in the checkpoint."""

    method: Method
    scorers: dict[str, Any]

    def _stateful(self) -> dict[str, Stateful]:
        read = sorted(self.scorers.keys() & self.method.needs)
        return {name: self.scorers[name] for name in read if isinstance(self.scorers[name], Stateful)}

    def _save_checkpoint(self, model: CausalModel, trial):
        super()._save_checkpoint(model, trial)
        write_carried(self, trial, FILE, {name: scorer.state() for name, scorer in self._stateful().items()})

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        kept = read_carried(checkpoint, FILE)
        for name, scorer in self._stateful().items():
            if name in kept:
                scorer.restore(kept[name])
