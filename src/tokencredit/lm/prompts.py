"""Prompts as token ids and as text, refused by row where they are empty or leave no room in the model's context.

A prompt is text or chat messages. Messages go through the tokenizer's chat template; text stays as it is, unless a
chat is asked for: then it is what a user says.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokencredit.lm.models import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, chat: bool | None) -> list[int]:
    """Token ids of a prompt.

    chat   True: text becomes a user's message; False: text stays text, and messages are refused; None: text stays
           text, with a warning where the tokenizer has a chat template

    ValueError where messages meet a tokenizer without a chat template, or with one that does not take them.
    """
    asked = as_asked(prompt, chat)
    if isinstance(asked, str):
        if chat is None and getattr(tokenizer, "chat_template", None):
            warnings.warn(
                "the model has a chat template and the prompts are plain text, which it continues as text. Say which is"
                " meant: --chat (chat=True) to ask as a user, --no-chat (chat=False) for plain text",
                stacklevel=2,
            )
        return list(tokenizer(asked)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the prompts are chat messages, but the tokenizer has no chat template: use a chat model, or text prompts"
            " without --chat"
        )
    try:
        found = tokenizer.apply_chat_template(list(asked), add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as error:  # the template is a program of the checkpoint's, and may raise what it likes
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return list(found["input_ids"])


def set_template_options(tokenizer: Tokenizer, options: Mapping[str, Any] | None) -> None:
    """Makes these values the chat template's own where nobody gives others: the tokenizer asks by them from then on,
    and so does whoever loads it once it is saved.
    """
    first = "".join(f"{{% set {name} = {name} | default({value!r}) %}}\n" for name, value in (options or {}).items())
    own = getattr(tokenizer, "chat_template", None)
    if first and isinstance(own, dict):
        tokenizer.chat_template = {name: first + each.removeprefix(first) for name, each in own.items()}
    elif first and own:
        tokenizer.chat_template = first + own.removeprefix(first)


def as_asked(prompt: Prompt, chat: bool | None) -> Prompt:
    """The prompt as text or as messages, as `chat` asks; ValueError where messages are to be plain text."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if chat else prompt
    if chat is False:
        raise ValueError("the task's prompts are chat messages: they cannot be plain text, leave --no-chat out")
    return prompt


def prompt_text(prompt: Prompt) -> str:
    """A prompt to read: text as it is, messages with the role before each, a blank line between them.

    >>> prompt_text([{"role": "user", "content": "2 + 3?"}])
    'user: 2 + 3?'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)


def readable(prompt: Prompt) -> str | list[dict[str, str]]:
    """A prompt to show: text as it is, messages each with its role and its text.

    >>> readable([{"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]}])
    [{'role': 'user', 'content': '2 + 3?'}]
    """
    if isinstance(prompt, str):
        return prompt
    return [{"role": str(message["role"]), "content": message_text(message)} for message in prompt]


def message_text(message: Mapping[str, Any]) -> str:
    """The text of one message; of one in parts, the parts that are text."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    return "" if content is None else str(content)


def completion_text(completion: Prompt) -> str:
    """The text of a completion that is verified: text as it is, of messages the last one."""
    return completion if isinstance(completion, str) else message_text(completion[-1])


def encode_completion(tokenizer: Tokenizer, completion: Any) -> list[int]:
    """Token ids of a completion: ids as they are, text tokenised, a single assistant's message by its text.

    ValueError for anything else: several messages cannot be told apart from their text alone.
    """
    if is_ids(completion):
        return list(completion)
    if isinstance(completion, str):
        return list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if is_messages(completion) and len(completion) == 1 and completion[0].get("role", "assistant") == "assistant":
        return list(tokenizer(message_text(completion[0]), add_special_tokens=False)["input_ids"])
    what = f"{len(completion)} messages" if is_messages(completion) else type(completion).__name__
    raise ValueError(
        f"a completion is text, token ids or one assistant's message, not {what}: {str(completion)[:60]!r}"
    )


def is_ids(value: Any) -> bool:
    """Whether it is a list of token ids."""
    return isinstance(value, list | tuple) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)


def is_messages(value: Any) -> bool:
    """Whether it is a list of chat messages."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(x, Mapping) for x in value)


def encode_prompts(
    tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], config: Any, max_new_tokens: int, chat: bool | None
) -> list[list[int]]:
    """Token ids of the rows' prompts; ValueError names the first row that is empty, that leaves too little of the
    model's context, or that has a token which the model does not.

    config   the model's configuration, of which `max_position_embeddings` and `vocab_size` are read
    """
    context, size = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    found = []
    for number, row in enumerate(rows):
        try:
            ids = encode_prompt(tokenizer, row["prompt"], chat)
        except ValueError as error:
            raise ValueError(f"row {_name(row, number)}: {error}") from error
        if not ids:
            raise ValueError(f"row {_name(row, number)}: the prompt has no tokens, so there is nothing to continue")
        if size and (last := max(ids)) >= size:
            raise ValueError(
                f"row {_name(row, number)}: the prompt has the token {tokenizer.decode([last])!r} ({last}), which is"
                f" none of the model's {size} tokens: resize the embedding, or use the model's own tokenizer"
            )
        if context and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"row {_name(row, number)}: the prompt has {len(ids)} tokens and {max_new_tokens} may be written, more"
                f" than the model's context of {context}. Lower --max-new-tokens, or leave such rows out"
            )
        found.append(ids)
    return found


def _name(row: Mapping[str, Any], number: int) -> str:
    return f"{number} ({row['row_id']})" if "row_id" in row else str(number)
