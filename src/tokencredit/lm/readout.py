"""Where a Hugging Face model's logits come from: its hidden states and its LM head, told apart and checked; and batches
without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokencredit.lm.head import Head
from tokencredit.masked import wide

PROBE = 8
"""Tokens of the short sequence on which head(hidden) is compared with the model's own logits."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A causal LM as `body` (token ids -> hidden states) and `head` (hidden states -> logits).

    Where the two cannot be told apart, the body is the whole model, its "hidden states" are logits, and the head has no
    weight.
    """

    model: Any
    body: nn.Module
    head: Head
    whole: bool

    def hidden(self, ids: Tensor, attention: Tensor, body: Any = None, **options: Any) -> Tensor:
        """[B, L, D]; `body` stands in for the body where given."""
        out = (body or self.body)(input_ids=ids, attention_mask=attention, use_cache=False, **options)
        return out.logits if self.whole else out[0]


def find_readout(model: Any, ids: Tensor, temperature: float = 1.0) -> Readout:
    """The readout of a model, checked on the first tokens of `ids` [L]: wherever its head does not reproduce its
    logits, the whole model.

    PEFT models are read through their base model, adapters included. ValueError where the logits are not finite.
    """
    inner = unwrap(model)
    head = _declared_head(inner, temperature)
    body = getattr(inner, "base_model", None)
    ids = ids[None, :PROBE]
    with torch.no_grad(), evaluating(model):
        logits = wide(inner(input_ids=ids, use_cache=False).logits[0]) / temperature
        check_finite(logits, "logits")
        if head is not None and isinstance(body, nn.Module) and body is not inner:
            hidden = body(input_ids=ids, use_cache=False)[0][0]
            if hidden.shape[-1] == head.weight.shape[1] and _agree(head.logits(wide(hidden)), logits, hidden.dtype):
                return Readout(inner, body, head, False)
    return Readout(inner, inner, Head(None, temperature=temperature), True)


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a PEFT model whose adapters are layers of it; the model itself otherwise."""
    if hasattr(model, "get_base_model") and not getattr(
        getattr(model, "active_peft_config", None), "is_prompt_learning", False
    ):
        return model.get_base_model()
    return model


def _declared_head(model: Any, temperature: float) -> Head | None:
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(layer) is not nn.Linear or not layer.weight.is_floating_point():
        return None
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(layer.weight, layer.bias, temperature, getattr(config, "final_logit_softcapping", None), scale)


def _agree(found: Tensor, logits: Tensor, dtype: torch.dtype) -> bool:
    close = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
    if found.shape != logits.shape:
        return False
    return bool((found - logits).abs().max() <= close * (1 + logits.abs().max()))


def check_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(
            f"the model's {what} are not finite (NaN or infinite): check its weights, its dtype and its inputs"
        )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside, the former mode of every module after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True, eq=False)
class Sequences:
    """Rows without padding on the left: ids, attention [B, L]; the tokens to score, in order: their row, the position
    that predicts them, the token itself ([N] each), and where they came from in the caller's batch."""

    ids: Tensor
    attention: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    origin: tuple[Tensor, Tensor]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.target)

    def scatter(self, values: Tensor) -> Tensor:
        """[N] -> [B, L] of the caller's batch, 0 elsewhere."""
        return values.new_zeros(self.shape).index_put_(self.origin, values)

    def chunks(self, tokens: int) -> Iterator[tuple[Sequences, Tensor]]:
        """(rows of similar length with at most about `tokens` tokens, the indices of their scored tokens in the
        whole).
        """
        length = self.attention.sum(1)
        order = [i for i in torch.argsort(length).tolist() if (self.row == i).any()]
        while order:
            width = int(length[order[-1]])
            rows, order = order[-max(tokens // width, 1) :], order[: -max(tokens // width, 1)]
            place = torch.full((len(self.ids),), -1, device=self.row.device)
            place[rows] = torch.arange(len(rows), device=self.row.device)
            keep = (place[self.row] >= 0).nonzero()[:, 0]
            yield (
                Sequences(
                    self.ids[rows, :width],
                    self.attention[rows, :width],
                    place[self.row[keep]],
                    self.position[keep],
                    self.target[keep],
                    tuple(x[keep] for x in self.origin),
                    self.shape,
                ),
                keep,
            )


def sequences(
    input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, context: int | None = None
) -> Sequences:
    """The batch with its rows moved to the left: what padding there is, and on which side, cannot matter after this.

    ValueError where shapes differ, where a completion token is padding or has nothing before it, or where a row exceeds
    the context.
    """
    shapes = [tuple(x.shape) for x in (input_ids, attention_mask, completion_mask)]
    if len(set(shapes)) != 1 or input_ids.dim() != 2:
        raise ValueError(
            f"input_ids, attention_mask and completion_mask must be [B, L] alike, got {', '.join(map(str, shapes))}"
        )
    there, wanted = attention_mask.bool(), completion_mask.bool()
    if (wanted & ~there).any():
        row = int((wanted & ~there).any(1).nonzero()[0])
        raise ValueError(f"row {row}: completion_mask marks tokens that attention_mask calls padding")
    place = there.long().cumsum(1) - 1
    if (wanted & (place == 0)).any():
        row = int((wanted & (place == 0)).any(1).nonzero()[0])
        raise ValueError(
            f"row {row}: the first token has nothing before it that could predict it; leave it out of completion_mask"
        )
    length = there.sum(1)
    if context and len(length) and int(length.max()) > context:
        raise ValueError(
            f"row {int(length.argmax())} has {int(length.max())} tokens, more than the model's context of {context}"
        )
    width = max(int(length.max()) if len(length) else 0, 1)
    at = there.nonzero(as_tuple=True)
    ids = input_ids.new_zeros(len(input_ids), width).index_put_((at[0], place[at]), input_ids[at])
    attention = (torch.arange(width, device=ids.device) < length[:, None]).long()
    origin = wanted.nonzero(as_tuple=True)
    return Sequences(ids, attention, origin[0], place[origin] - 1, input_ids[origin], origin, shapes[0])
