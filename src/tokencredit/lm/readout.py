"""Where a Hugging Face model's logits come from: its hidden states and its LM head, told apart and checked; and batches
without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokencredit.lm.head import Head
from tokencredit.lm.models import CausalModel
from tokencredit.masked import wide

PROBE = 32
"""Tokens on which a readout is checked."""
PADDED = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Nats by which the log-probs of half the tokens may differ with later tokens and padding present; 0.5 in half
precision.
"""


@dataclass(frozen=True, eq=False)
class Readout:
    """A causal LM as `body` (token ids -> hidden states) and `head` (hidden states -> logits).

    Where the two cannot be told apart, the body is the whole model, its "hidden states" are logits, and the head has no
    weight; `why` says what did not fit.
    """

    model: Any
    body: nn.Module
    head: Head
    whole: bool
    why: str = ""

    def hidden(self, ids: Tensor, attention: Tensor, body: Any = None, **options: Any) -> Tensor:
        """[B, L, D] of rows that are padded on the right, by `attention`; `body` stands in for the body where given.

        No token sees what comes after it, so the padding is not masked: a masked query may have nothing left to attend
        to, and its NaN spreads.
        """
        seen = torch.ones_like(attention)
        out = (body or self.body)(**{"input_ids": ids, "attention_mask": seen, "use_cache": False, **options})
        return out.logits if self.whole else out[0]


def find_readout(model: CausalModel, ids: Tensor, temperature: float = 1.0) -> Readout:
    """The readout of a model, checked on the first tokens of `ids` [L]: wherever its head does not reproduce its
    logits, the whole model.

    The head must read what the body returns, to the bit, and its outputs must be the logits, to the bit, or after the
    scale and soft-cap of the config up to the rounding of these two (head_transform). PEFT models are read through
    their base model, adapters included. ValueError where the logits are not finite, or depend on later tokens.
    """
    inner = unwrap(model)
    ids = ids[None, :PROBE]
    with torch.no_grad(), evaluating(model):
        seen = _watched_pass(inner, ids)
        check_finite(seen.logits, "logits")
        found = _readout(inner, seen, temperature)
        _check_causal(found, ids, wide(seen.logits) / temperature)
    return found


@dataclass(frozen=True, eq=False)
class _Pass:
    """One forward pass of a whole model: its logits [1, L, V], what its body returned, and what went into and came out
    of its head (None where that was not called exactly once).
    """

    logits: Tensor
    body: Tensor | None
    head_in: Tensor | None
    head_out: Tensor | None


def _watched_pass(model: CausalModel, ids: Tensor) -> _Pass:
    layer, body = _output_layer(model), getattr(model, "base_model", None)
    tape: dict[Any, list] = {layer: [], body: []}
    hooks = [
        m.register_forward_hook(lambda m, args, kwargs, out: tape[m].append((args, kwargs, out)), with_kwargs=True)
        for m in tape
        if isinstance(m, nn.Module) and m is not model
    ]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    inputs = outputs = states = None
    if len(tape[layer]) == 1:
        args, kwargs, outputs = tape[layer][0]
        inputs = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x)), None)
    if isinstance(body, nn.Module) and body is not model:
        # Some models call a part of their body instead (OPT's decoder).
        calls = [out for _, _, out in tape[body]] or [body(input_ids=ids, use_cache=False)]
        states = calls[0][0] if len(calls) == 1 else None
    return _Pass(logits, states, inputs, outputs)


def _readout(model: CausalModel, seen: _Pass, temperature: float) -> Readout:
    layer = _output_layer(model)
    why = ""
    if type(layer) is not nn.Linear or not layer.weight.is_floating_point():
        why = f"its LM head is a {type(layer).__name__}, not a linear layer"
    elif seen.body is None or seen.head_in is None:
        why = "its LM head or its body is not called exactly once in a forward pass"
    elif seen.body.shape != seen.head_in.shape or not torch.equal(seen.body, seen.head_in):
        why = "its LM head does not read what its body returns"
    elif (transform := head_transform(model.config, seen.head_out, seen.logits)) is None:
        why = "its logits are not the LM head's outputs, nor these after a scale and soft-cap that its config names"
    elif not _is_linear(layer, seen):
        why = "its LM head computes something else than a linear layer"
    if why:
        return Readout(model, model, Head(None, temperature=temperature), True, why)
    return Readout(model, model.base_model, Head(layer.weight, layer.bias, temperature, *transform), False)


def _output_layer(model: CausalModel) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def head_transform(config: Any, raw: Tensor, logits: Tensor) -> tuple[float | None, float] | None:
    """(soft-cap or None, scale) that turn the head's outputs into the logits; None where none does.

    Without either, the two are equal to the bit. With them, each of four operations may round: 4 units of roundoff,
    relative to the size of the logit.
    """
    if raw.shape != logits.shape:
        return None
    if torch.equal(wide(raw), wide(logits)):
        return None, 1.0
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
    scales = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    if scaling := getattr(config, "logits_scaling", None):
        scales += [1 / scaling, scaling]
    unit = torch.finfo(raw.dtype).eps / 2
    for cap in dict.fromkeys([None, *(c for c in caps if c)]):
        for scale in dict.fromkeys([1.0, *(float(s) for s in scales if s)]):
            found = Head(None, softcap=cap, scale=scale).logits(raw.double())
            if ((found - logits.double()).abs() <= 4 * unit * found.abs() + 1e-30).all():
                return cap, scale
    return None


def _is_linear(layer: nn.Linear, seen: _Pass) -> bool:
    """Whether the head's outputs for about 1,024 tokens of the vocabulary are h Wᵀ + b, up to roundings: √D of one unit
    relative to Σ |h| |W|, at most.
    """
    some = slice(None, None, max(len(layer.weight) // 1024, 1))
    h, w = wide(seen.head_in), wide(layer.weight[some])
    bias = w.new_zeros(len(w)) if layer.bias is None else wide(layer.bias[some])
    unit = torch.finfo(seen.head_out.dtype).eps
    room = unit * (h.abs() @ w.abs().t() + bias.abs()) * h.shape[-1] ** 0.5
    return bool(((h @ w.t() + bias - wide(seen.head_out[..., some])).abs() <= room).all())


def _check_causal(readout: Readout, ids: Tensor, logits: Tensor) -> None:
    """ValueError where a prefix has other distributions alone, with another ending and padding behind it."""
    length = ids.shape[1]
    if length < 3:
        return
    half = length // 2
    padded = torch.cat([ids, torch.cat([ids[:, :half], ids[:, :1].expand(1, length - half)], 1)])
    there = torch.arange(length, device=ids.device) < torch.tensor([[length], [half]], device=ids.device)
    hidden = wide(readout.hidden(padded, there.long()))
    found = readout.head.logits(hidden).log_softmax(-1)
    gap = (found - logits.log_softmax(-1)).abs().amax(-1)
    worst = max(float(gap[0].median()), float(gap[1, :half].median()))
    allowed = PADDED.get(next(readout.model.parameters()).dtype, 0.5)
    if not worst <= allowed:
        raise ValueError(
            f"{type(readout.model).__name__} gives other distributions in a batch with later tokens or padding behind"
            f" (half of the log-probs move by {worst:.2g} nats or more, {allowed:g} allowed): it is not causal, and"
            " per-token scores have no meaning"
        )


def unwrap(model: CausalModel) -> Any:
    """The Hugging Face model inside a PEFT model whose adapters are layers of it; the model itself otherwise."""
    if hasattr(model, "get_base_model") and not getattr(
        getattr(model, "active_peft_config", None), "is_prompt_learning", False
    ):
        return model.get_base_model()
    return model


def check_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(
            f"the model's {what} are not finite (NaN or infinite): check its weights, its dtype and its inputs"
        )


@contextmanager
def evaluating(model: CausalModel) -> Iterator[None]:
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
    that predicts them, the token itself ([N] each), and where they came from in the caller's batch.

    order   the rows that are cut into chunks, the shortest first; None for those with tokens to score
    """

    ids: Tensor
    attention: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    origin: tuple[Tensor, Tensor]
    shape: tuple[int, int]
    order: list[int] | None = None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def inputs(self) -> dict[str, Any]:
        """What a body takes beside these, in place of a mask that hides nothing."""
        return {}

    def scatter(self, values: Tensor) -> Tensor:
        """[N] -> [B, L] of the caller's batch, 0 elsewhere."""
        return values.new_zeros(self.shape).index_put_(self.origin, values)

    def part(self, rows: Sequence[int]) -> Sequences:
        """The tokens of some rows alone, cut into chunks of the width that they have with the others: finite
        differences see the rounding of a row's width.
        """
        keep = torch.isin(self.row, torch.tensor(list(rows), device=self.row.device)).nonzero()[:, 0]
        mine = {name: getattr(self, name)[keep] for name in ("row", "position", "target")}
        return replace(self, **mine, origin=tuple(x[keep] for x in self.origin), order=self._order())

    def _order(self) -> list[int]:
        if self.order is not None:
            return self.order
        scored = set(self.row.unique().tolist())
        return [i for i in torch.argsort(self.attention.sum(1)).tolist() if i in scored]

    def chunks(self, tokens: int) -> Iterator[tuple[Sequences, Tensor]]:
        """(rows of similar length with at most about `tokens` tokens, the indices of their scored tokens in the
        whole).
        """
        length = self.attention.sum(1)
        order, scored = self._order(), set(self.row.unique().tolist())
        while order:
            width = int(length[order[-1]])
            together, order = order[-max(tokens // width, 1) :], order[: -max(tokens // width, 1)]
            rows = [i for i in together if i in scored]
            if not rows:
                continue
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
