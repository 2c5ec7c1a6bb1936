"""Prompts as token ids, refused by row where they are empty or leave no room in the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode_prompt(tokenizer: Any, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt: text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the prompts are chat messages, but the tokenizer has no chat template: use a chat model, or text prompts"
        )
    return list(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    )


def encode_prompts(tokenizer: Any, rows: Sequence[dict], config: Any, max_new_tokens: int) -> list[list[int]]:
    """Token ids of the rows' prompts; ValueError names the first row that is empty, or that leaves too little of the
    model's context.

    config   the model's configuration, of which `max_position_embeddings` is read
    """
    context = getattr(config, "max_position_embeddings", None)
    found = []
    for number, row in enumerate(rows):
        ids = encode_prompt(tokenizer, row["prompt"])
        if not ids:
            raise ValueError(f"row {_name(row, number)}: the prompt has no tokens, so there is nothing to continue")
        if context and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"row {_name(row, number)}: the prompt has {len(ids)} tokens and {max_new_tokens} may be written, more"
                f" than the model's context of {context}. Lower max_new_tokens, or leave such rows out"
            )
        found.append(ids)
    return found


def _name(row: dict, number: int) -> str:
    return f"{number} ({row['row_id']})" if "row_id" in row else str(number)
