"""What the library asks of a language model and of a tokenizer: the parts of transformers' that it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class CausalModel(Protocol):
    """A causal language model, as `AutoModelForCausalLM` loads it; a PEFT model is one too."""

    config: Any
    training: bool

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]: ...

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def __getattr__(self, name: str) -> Any:
        """Whatever else an architecture has: embeddings, adapters, a generation config."""
        ...


class Tokenizer(Protocol):
    """A tokenizer, as `AutoTokenizer` loads it."""

    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...

    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...
