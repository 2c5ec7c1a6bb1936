"""What it means to sample: traces, requests for continuations of them, and rollouts; whoever can do that is a
`Sampler`.

A request continues one prefix of one trace. It names token ids, never text; carries the length that is left; and owns
its randomness, so that its rollout is the same whatever else is in the batch. `lm.prefix_sampler` does it with
transformers, `lm.vllm_sampler` with vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tokencredit.lm.distribution import Settings
from tokencredit.lm.models import CausalModel, Tokenizer


@dataclass(frozen=True)
class Trace:
    """A prompt and one completion of it, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a prompt needs at least one token, such as <bos>, for the model to predict from")


@dataclass(frozen=True, slots=True)
class Request:
    """Continue the first `prefix` completion tokens of trace `trace`, after `token` if one is given, by at most
    `budget` tokens.

    seed   owns the randomness of this request: two requests with equal seeds and prefixes give equal rollouts
    """

    trace: int
    prefix: int
    budget: int
    seed: int
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """What was sampled after the prefix (and the request's own token): ids, and log-prob and entropy of each, in nats,
    as sampled.
    """

    ids: tuple[int, ...]
    truncated: bool
    logprob: tuple[float, ...]
    entropy: tuple[float, ...]


class Progress(Protocol):
    """Hears what is done. An unfinished row counts as the share of its longest length that is written."""

    def __call__(self, rows: float, tokens: int = 0, total: float | None = None) -> Any:
        """So many more rows and sampled tokens; `total` rows in all, where that is known only now."""
        ...


class Sampler(Protocol):
    """Continues prefixes of traces. `settings` and `ends` (token ids that end a completion) are part of what it is."""

    settings: Settings
    ends: tuple[int, ...]

    def distributions(self, traces: Sequence[Trace]) -> Iterator[Tensor]:
        """For each trace, in order, log π(· | y<i) [T,V] at every completion token: what samples there, −inf for
        excluded tokens.
        """
        ...

    def continue_(
        self, traces: Sequence[Trace], requests: Sequence[Request], progress: Progress | None = None
    ) -> Iterator[tuple[int, Rollout]]:
        """(index of the request, its rollout) as they end, in any order."""
        ...


def end_tokens(model: CausalModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids that end a completion: the model's and the tokenizer's. ValueError where there is none."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    many = configured if isinstance(configured, list) else [configured]
    ends = {token for token in [*many, getattr(tokenizer, "eos_token_id", None)] if token is not None}
    if not ends:
        raise ValueError(
            "neither the tokenizer nor the generation config names an end-of-sequence token: completions could not end"
        )
    return tuple(sorted(ends))
