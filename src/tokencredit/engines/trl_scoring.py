"""How the trainer scores rollouts, held once against the plain model, and mended where the two differ.

TRL scores rows that are padded on the left without position ids, multiplies hidden states by the LM head itself, and
leaves dropout active. For most models that is the plain model's log-prob; for some it is off by more than a nat. So the
first rollout batch begins with a comparison on a few ragged prompts: the trainer's path against the model in evaluation
mode on each row alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tokencredit.engines.trainer import Trainer
from tokencredit.lm.models import CausalModel

PROMPTS, COMPLETION = (3, 7, 12), 8
"""Tokens of the prompts and of the completions that the comparison draws."""
ALLOWED = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Mean absolute difference in nats that passes for rounding; 0.15 in half precision."""


@dataclass(frozen=True)
class Scoring:
    """moved  rows are moved to the left before the forward pass, so that no padding stands before a prompt

    plain  log-probs from the model's own logits, which are made in full, instead of TRL's fused head
    """

    moved: bool = False
    plain: bool = False

    def of(self, model: CausalModel, temperature: float) -> Any:
        """The model as TRL's scoring calls it."""
        return _Scored(self, model, temperature) if self.moved or self.plain else model


class _Scored:
    def __init__(self, scoring: Scoring, model: CausalModel, temperature: float) -> None:
        self.scoring, self.model, self.temperature = scoring, model, temperature

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        fused_lm_head: bool = True,
        **extras: Any,
    ) -> Any:
        if labels is None:
            raise ValueError(
                "scores of this model are mended only in a TRL with a fused LM head: pip install trl==1.16"
            )
        first = attention_mask.argmax(1) if self.scoring.moved else attention_mask.new_zeros(len(attention_mask))
        there = torch.arange(input_ids.shape[1], device=input_ids.device)
        index = (there + first[:, None]) % input_ids.shape[1]
        ids, attention, labels = (x.gather(1, index) for x in (input_ids, attention_mask, labels))
        if self.scoring.plain:
            out = self.model(input_ids=ids, attention_mask=attention, **extras)
            scores = _from_logits(out.logits, labels, self.temperature)
        else:
            out = self.model(
                input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=fused_lm_head, **extras
            )
            scores = out.log_probs, out.entropy
        # Column j of a row scores its token j + 1; virtual tokens of a prompt adapter stand before.
        back = (there[:-1] - first[:, None]).clamp(min=0)
        log_probs, entropy = (
            None if x is None else x[:, -back.shape[1] :].gather(1, back.to(x.device)) for x in scores
        )
        return SimpleNamespace(log_probs=log_probs, entropy=entropy, aux_loss=getattr(out, "aux_loss", None))


def _from_logits(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) [b, L − 1], 0 where the label is −100."""
    logits = logits[:, -labels.shape[1] :]
    log_p, entropy = distribution(logits[:, :-1], temperature)
    wanted = labels[:, 1:].to(log_p.device)
    chosen = log_p.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    return tuple(x.masked_fill(wanted < 0, 0) for x in (chosen, entropy))


def distribution(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs [..., V], entropy [...] in nats) of the whole vocabulary at a temperature."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    return log_p, -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)


@contextmanager
def without_dropout(model: CausalModel) -> Iterator[None]:
    """Evaluation mode inside for everything within `model` but itself: TRL reads its phase from the model's own flag.

    A model that is in evaluation mode already is left alone.
    """
    training = [module for module in model.modules() if module.training and module is not model]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def checked_scoring(trainer: Trainer) -> Scoring:
    """The way of scoring that gives the plain model's log-probs and entropies; every process takes part.

    Warns where that is not TRL's own, with the nats by which TRL's is off, and where dropout moves the update's
    log-probs. ValueError where no way gives them.
    """
    if getattr(trainer, "_is_vlm", False):
        warn(trainer, "the trainer's log-probs of a model with images are not held against the plain model's")
        return Scoring()
    with trainer._measuring():
        return _compared(trainer, _ragged(trainer))


def _compared(trainer: Trainer, rows: tuple[Tensor, Tensor, int]) -> Scoring:
    with without_dropout(trainer.model):
        truth = _plain(trainer, rows)
        off: dict[Scoring, float] = {}
        for scoring in (Scoring(), Scoring(moved=True), Scoring(moved=True, plain=True)):
            found = trainer._scored(scoring, trainer.model, *rows, compute_entropy=True)[:2]
            off[scoring] = apart(found, truth)
            if off[scoring] <= allowed(trainer):
                break
        else:
            raise ValueError(_message(trainer, off) + _refusal(trainer))
    if scoring != Scoring():
        warn(trainer, _message(trainer, off) + _mended(scoring))
    if trainer.model.training:
        _warn_of_dropout(trainer, scoring, rows, truth)
    return scoring


def warn(trainer: Trainer, text: str) -> None:
    if trainer.accelerator.is_main_process:
        warnings.warn(text, stacklevel=4)


def _ragged(trainer: Trainer) -> tuple[Tensor, Tensor, int]:
    """(ids, attention [3, L], scored tokens): random tokens, prompts padded on the left as TRL does."""
    config, device = trainer.model.config.get_text_config(), trainer.accelerator.device
    context = getattr(config, "max_position_embeddings", None) or 1 << 20
    lengths = [max(min(n, context - COMPLETION), 1) for n in PROMPTS]
    width, drawn = max(lengths) + COMPLETION, torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (len(lengths), width), generator=drawn)
    there = torch.arange(width) >= max(lengths) - torch.tensor(lengths)[:, None]
    ids = torch.where(there, ids, trainer._tokenizer.pad_token_id)
    return ids.to(device), there.long().to(device), COMPLETION


def _plain(trainer: Trainer, rows: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) [3, COMPLETION] of the model on each row alone, without padding."""
    ids, there, scored = rows
    found = []
    for row, seen in zip(ids, there.bool()):
        own = row[seen][None]
        with trainer.accelerator.autocast():
            logits = trainer.model(input_ids=own, attention_mask=torch.ones_like(own)).logits
        found.append([x[0, -scored:] for x in _from_logits(logits, own, trainer.temperature)])
    return tuple(torch.stack(x) for x in zip(*found))


def apart(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The larger one of the mean absolute differences of log-probs and of entropies, in nats; of no tokens 0,
    infinite where there is a NaN.
    """
    gaps = [float((a.float() - b.float()).abs().sum() / max(a.numel(), 1)) for a, b in zip(found, truth)]
    return max(gaps) if all(gap == gap for gap in gaps) else float("inf")


def allowed(trainer: Trainer) -> float:
    half = trainer.args.bf16 or trainer.args.fp16
    return 0.15 if half else ALLOWED.get(next(trainer.model.parameters()).dtype, 0.15)


def _message(trainer: Trainer, off: dict[Scoring, float]) -> str:
    moved = off.get(Scoring(moved=True))
    after = "" if moved is None else f", {moved:.2g} without padding on the left"
    name = type(trainer.accelerator.unwrap_model(trainer.model)).__name__
    return (
        f"TRL's log-probs and entropies of {name} are {off[Scoring()]:.2g} nats in the mean from those of the model in"
        f" evaluation mode on prompts of {', '.join(map(str, PROMPTS))} tokens{after}"
    )


def _mended(scoring: Scoring) -> str:
    if scoring.plain:
        return (
            ": its head bends the logits in a way that TRL's fused head does not know. They are taken from the model's"
            " own logits, which needs memory for [rows, tokens, vocabulary]: lower per_device_train_batch_size if short"
        )
    return ": padding on the left moves its positions. Rows are moved to the left before they are scored"


def _refusal(trainer: Trainer) -> str:
    return (
        ", and neither rows moved to the left nor the model's own logits give them: it cannot be trained here. Check"
        " that the model is causal and that its forward pass is deterministic in evaluation mode"
    )


def _warn_of_dropout(trainer: Trainer, scoring: Scoring, rows: tuple, truth: tuple[Tensor, Tensor]) -> None:
    """Where dropout, or other noise of training mode, moves the log-probs that the update sees."""
    device = trainer.accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = trainer._scored(scoring, trainer.model, *rows, compute_entropy=True)[:2]
    if (gap := apart(found, truth)) > allowed(trainer):
        warn(
            trainer,
            f"dropout moves the log-probs and entropies of an update by {gap:.2g} nats in the mean. Rollouts are"
            " sampled and scored without it, so ratios of policies hold its noise: set"
            " GRPOConfig(disable_dropout=True), and lora_dropout=0",
        )
