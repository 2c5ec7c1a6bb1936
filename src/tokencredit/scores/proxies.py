"""Importance proxies of ragged rows: `lm.proxies.importance`, for prompts and completions given as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tokencredit.lm.models import CausalModel
from tokencredit.lm.packing import Ids, pack, unpack
from tokencredit.lm.proxies import importance


def proxies(
    model: CausalModel,
    prompts: Ids,
    completions: Ids,
    kinds: Sequence[str],
    *,
    batch: int | None = None,
    heard: Callable[[str, str], Any] | None = None,
    **options: Any,
) -> dict[str, list[Tensor]]:
    """{kind: [T] of every completion}, on the CPU.

    batch    rows of one call; None for all at once
    heard    told the kind and the way in which it was computed, for every call
    options  of `importance`: temperature, seed, num_directions, method, parameters, max_tokens ...
    """
    found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    size = batch or max(len(prompts), 1)
    for start in range(0, len(prompts), size):
        some = slice(start, start + size)
        ids, attention, wanted = pack(prompts[some], completions[some], model.device)
        result = importance(model, ids, attention, wanted, tuple(kinds), **options)
        for kind in kinds:
            if heard:
                heard(kind, result[kind].method)
            found[kind] += [values.cpu() for values in unpack(result[kind].value, wanted)]
    return found
