"""Log-probs and entropies of the policy that sampled, from the logits by which it sampled: what transformers computes
to draw a token says both, so that no pass over the rollouts is made for them.

They are those of a forward pass over the rollouts, at the trainer's temperature over the whole vocabulary, to the
rounding of a key-value cache. At the first rollout batch both are measured, and where they differ by more than rounding
the pass stays. It is made too for every batch whose tokens are not the ones that were fed back, or whose logits were
not seen: those of vLLM, of a `rollout_func`, and of several turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokencredit.engines.trainer import Trainer
from tokencredit.engines.trl_scoring import allowed, apart, distribution, warn
from tokencredit.lm.models import CausalModel
from tokencredit.masked import zero_off

Scores = dict[str, Tensor]


class Listener:
    """Hears the logits of a trainer's generation, for the batch that is scored next."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._agrees: bool | None = None
        self._fed: list[Tensor] = []
        self._logprob: list[Tensor] = []
        self._entropy: list[Tensor] = []
        self._log_p: Tensor | None = None

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
        ids = given.get("input_ids")
        if self._log_p is None or ids is None or ids.shape != (len(self._log_p), 1):
            self._forget()
        else:
            self._fed.append(ids[:, 0])
            self._logprob.append(self._log_p.gather(1, ids)[:, 0])
        self._log_p, entropy = distribution(out.logits[:, -1], self.trainer.temperature)
        self._entropy.append(entropy)

    def _forget(self) -> None:
        self._log_p = None
        for column in (self._fed, self._logprob, self._entropy):
            column.clear()

    def _heard(self, out: dict[str, Tensor]) -> Scores | None:
        """What was heard of the batch; None where it was not heard from its first token to its last."""
        ids, mask = out["completion_ids"], out["completion_mask"].bool()
        if self._log_p is None or len(ids) != len(self._log_p):
            return None
        # A device may run ahead of the end: what was sampled there was dropped.
        width = min(len(self._entropy), ids.shape[1])
        logprob = torch.stack([*self._logprob, self._log_p.gather(1, ids[:, width - 1 : width])[:, 0]][:width], 1)
        fed = torch.stack([*self._fed, ids[:, width - 1]][:width], 1)
        if mask[:, width:].any() or (mask[:, :width] & (fed != ids[:, :width])).any():
            return None
        found = {"logprob": logprob, "entropy": torch.stack(self._entropy[:width], 1)}
        padding = (0, ids.shape[1] - width)
        return {name: zero_off(torch.nn.functional.pad(x, padding), mask) for name, x in found.items()}

    def _farthest(self, here: float) -> float:
        """The largest of all processes'."""
        accelerator = self.trainer.accelerator
        return float(accelerator.gather(torch.tensor([here], device=accelerator.device)).max())


def _one_call_per_token(trainer: Trainer) -> bool:
    """Whether generation calls the model itself, a token of every row at a time, and not a compiled graph of it."""
    others = ("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged")
    compiles = not getattr(getattr(trainer, "generation_config", None), "disable_compile", False)
    return not compiles and not any(getattr(trainer.args, name, False) for name in others)
