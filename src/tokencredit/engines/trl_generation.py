"""Generation with transformers: in parts where a process has no room for all rows at once, and what it says of the
policy that samples.

Log-probs and entropies of that policy come from the logits by which it samples: what transformers computes to draw a
token says both, so that no pass over the rollouts is made for them.

They are those of a forward pass over the rollouts, at the trainer's temperature over the whole vocabulary, to the
rounding of a key-value cache. At the first rollout batch both are measured, and where they differ by more than rounding
the pass stays. It is made too for every batch whose tokens are not the ones that were fed back, or whose logits were
not seen: those of vLLM, of a `rollout_func`, and of several turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tokencredit.engines.trainer import Trainer
from tokencredit.engines.trl_scoring import allowed, apart, distribution, warn
from tokencredit.lm.models import CausalModel
from tokencredit.masked import zero_off

Scores = dict[str, Tensor]


class Writer(Protocol):
    """A model that writes completions, as transformers' do."""

    generate: Callable[..., Tensor]


@contextmanager
def in_parts(model: Writer, rows: int | None, ended: Callable[[], Any]) -> Iterator[None]:
    """Inside, `model.generate` writes at most `rows` completions together (None: all), in parts of nearly one size;
    `ended` is called after each but the last. Images and the like, which are no row each, are not taken apart.
    """
    whole = model.generate

    def generate(**given: Any) -> Tensor:
        ids = given["input_ids"]
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        if rows is None or len(ids) <= rows or any(len(x) != len(ids) for x in tensors.values()):
            return whole(**given)
        size, written = -(-len(ids) // -(-len(ids) // rows)), []
        for first in range(0, len(ids), size):
            if first:
                ended()
            written.append(whole(**given | {name: x[first : first + size] for name, x in tensors.items()}))
        width, filler = max(part.shape[1] for part in written), given["generation_config"].pad_token_id
        return torch.cat([functional.pad(x, (0, width - x.shape[1]), value=filler) for x in written])

    model.generate = generate
    try:
        yield
    finally:
        del model.generate


@dataclass
class Hearing:
    """One call of generate: the tokens that were fed back, their log-probs, the entropies, a column for each step; and
    the last distribution [b, V], of the token that nothing was fed after.
    """

    fed: list[Tensor] = field(default_factory=list)
    logprob: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    log_p: Tensor | None = None

    def scores(self, ids: Tensor, mask: Tensor) -> Scores | None:
        """Of completions [b, T]; None where they are not what was heard from the first token to the last."""
        # A device may run ahead of the end: what was sampled there was dropped.
        width = min(len(self.entropy), ids.shape[1])
        logprob = torch.stack([*self.logprob, self.log_p.gather(1, ids[:, width - 1 : width])[:, 0]][:width], 1)
        fed = torch.stack([*self.fed, ids[:, width - 1]][:width], 1)
        if mask[:, width:].any() or (mask[:, :width] & (fed != ids[:, :width])).any():
            return None
        padding = (0, ids.shape[1] - width)
        found = {"logprob": logprob, "entropy": torch.stack(self.entropy[:width], 1)}
        return {name: zero_off(functional.pad(x, padding), mask) for name, x in found.items()}


class Listener:
    """Hears the logits of a trainer's generation, for the batch that is scored next."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._agrees: bool | None = None
        self._ended: list[Hearing] = []
        self._part = Hearing()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears what is generated inside."""
        self._forget()
        if self._agrees is False or not _one_call_per_token(self.trainer):
            yield
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        hook = model.register_forward_hook(self._hear, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def next_part(self) -> None:
        """What is heard from now on is of further rows."""
        self._ended.append(self._part)
        self._part = Hearing()

    def scores(self, out: dict[str, Tensor], measured: Callable[[], Scores]) -> Scores:
        """{"logprob", "entropy"} [B, T] of TRL's batch, 0 off the completions; `measured` makes a pass for them. Every
        process takes part.
        """
        heard = self._heard(out)
        self._forget()
        if self._agrees is False or self._farthest(float(heard is None)):
            return measured()
        if self._agrees is None:
            truth, mask = measured(), out["completion_mask"].bool()
            gap = self._farthest(apart([heard[name][mask] for name in heard], [truth[name][mask] for name in heard]))
            self._agrees = gap <= allowed(self.trainer)
            if not self._agrees:
                warn(
                    self.trainer,
                    f"what generation says of its tokens' log-probs and entropies is {gap:.2g} nats in the mean from"
                    " a forward pass over them: they are taken from such a pass for every rollout batch",
                )
                return truth
        return heard

    def _hear(self, model: CausalModel, args: tuple, given: dict[str, Any], out: Any) -> None:
        """The logits of the next token of every row; a call with more than a token of each begins a generation."""
        ids, part = given.get("input_ids"), self._part
        if part.log_p is None or ids is None or ids.shape != (len(part.log_p), 1):
            self._part = part = Hearing()
        else:
            part.fed.append(ids[:, 0])
            part.logprob.append(part.log_p.gather(1, ids)[:, 0])
        part.log_p, entropy = distribution(out.logits[:, -1], self.trainer.temperature)
        part.entropy.append(entropy)

    def _forget(self) -> None:
        self._ended, self._part = [], Hearing()

    def _heard(self, out: dict[str, Tensor]) -> Scores | None:
        """What was heard of the batch; None where it was not heard from its first token to its last."""
        ids, mask = out["completion_ids"], out["completion_mask"].bool()
        parts = [*self._ended, self._part]
        sizes = [0 if part.log_p is None else len(part.log_p) for part in parts]
        if not all(sizes) or sum(sizes) != len(ids):
            return None
        found = [part.scores(*some) for part, *some in zip(parts, ids.split(sizes), mask.split(sizes))]
        if any(each is None for each in found):
            return None
        return {name: torch.cat([each[name] for each in found]) for name in ("logprob", "entropy")}

    def _farthest(self, here: float) -> float:
        """The largest of all processes'."""
        accelerator = self.trainer.accelerator
        return float(accelerator.gather(torch.tensor([here], device=accelerator.device)).max())


def _one_call_per_token(trainer: Trainer) -> bool:
    """Whether generation calls the model itself, a token of every row at a time, and not a compiled graph of it."""
    others = ("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged")
    compiles = not getattr(getattr(trainer, "generation_config", None), "disable_compile", False)
    return not compiles and not any(getattr(trainer.args, name, False) for name in others)
