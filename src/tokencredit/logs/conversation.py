"""Text and messages -> token ids of prompt and completion, with what the policy wrote told from tool outputs and other
turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokencredit.lm.models import Tokenizer
from tokencredit.lm.prompts import Prompt, as_asked, encode_prompt, message_text
from tokencredit.logs.rollout import LoggedRollout

REWRITTEN = "the chat template rewrites earlier turns"


@dataclass(frozen=True)
class Turns:
    """Token ids of a completion, and which of them [T] the policy wrote.

    why          how the text differs that comes back from the ids; "" where it is the same
    end_unknown  whether the token that ends it may be missing
    """

    completion: list[int]
    mask: list[bool]
    why: str = ""
    end_unknown: bool = False


def turn_ends(mask: Sequence[bool]) -> list[int]:
    """The last token of each of the policy's turns: of each run of tokens that it wrote.

    >>> turn_ends([True, True, False, True])
    [1, 3]
    """
    return [t for t, own in enumerate(mask) if own and not (t + 1 < len(mask) and mask[t + 1])]


def turn_end(tokenizer: Tokenizer, ends: Sequence[int] | None = None) -> int | None:
    """The token that ends an assistant's turn in a chat: the first special one that the template writes behind what is
    said, and the tokenizer's own where it writes none. None where that one is not of `ends`, which end a completion.
    """
    known = {tokenizer.eos_token_id, *(ends or ())}
    special = known | {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    try:
        text = _render(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "SAID"}], False)
    except Exception:  # the template is a program of the checkpoint's, and may raise what it likes
        return None
    behind = tokenizer(text.rpartition("SAID")[2], add_special_tokens=False)["input_ids"]
    found = next((i for i in behind if i in special), tokenizer.eos_token_id)
    return found if ends is None or found in known else None


def encode_turns(each: LoggedRollout, tokenizer: Tokenizer, limit: int | None, end: int | None) -> Turns:
    """Ids of a completion that was logged as text or as messages, whose turns `end` ends; None where nobody knows."""
    completion = [each.completion] if isinstance(each.completion, Mapping) else each.completion
    if isinstance(completion, str) or _is_text(completion):
        text = completion if isinstance(completion, str) else message_text(completion[0])
        ids, why = survive(tokenizer, text)
        ids, known = _with_end(ids, (end, tokenizer.eos_token_id), each.truncated, limit)
        return Turns(ids, [True] * len(ids), why, not known)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{each.place}: the completion is {len(completion)} messages, but the tokenizer has no chat template: name"
            " the chat model that wrote the log"
        )
    try:
        return _conversation(tokenizer, each.prompt, completion, each.truncated, limit, end)
    except Exception as error:  # the template is a program of the checkpoint's, and may raise what it likes
        raise ValueError(f"{each.place}: the chat template does not take these messages ({error})") from error


def _is_text(completion: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it is a single turn of the policy's that calls no tool: then its text is what was sampled."""
    return len(completion) == 1 and completion[0]["role"] == "assistant" and not completion[0].get("tool_calls")


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, chat: bool | None) -> tuple[list[int], bool]:
    """Token ids of a prompt, and whether it is one of a chat. Text that is a chat without its special tokens, as
    trainers decode it, is put through the chat template again, where that gives the same text.
    """
    if isinstance(prompt, str) and chat is not False and getattr(tokenizer, "chat_template", None):
        for messages in _chats(prompt):
            try:
                ids = encode_prompt(tokenizer, messages, chat=None)
            except ValueError:  # the template takes no such messages: the text is another chat, or none
                continue
            if tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt.strip():
                return ids, True
        bare = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if tokenizer.decode(bare, skip_special_tokens=True) != tokenizer.decode(bare, skip_special_tokens=False):
            return bare, True  # it has the template's special tokens itself
    return encode_prompt(tokenizer, prompt, chat), not isinstance(as_asked(prompt, chat), str)


ROLES = "system|developer|user|assistant|tool"


def _chats(text: str) -> Iterator[list[dict[str, str]]]:
    """Messages that a text may be, with the names of the roles before what each says; with and without the first."""
    for pattern in (rf"^({ROLES})\n+", rf"({ROLES})\n\n"):
        parts = re.split(pattern, text, flags=re.MULTILINE)
        if parts[0].strip() or len(parts) < 3 or parts[-2] != "assistant":
            continue
        messages = [{"role": role, "content": said.strip()} for role, said in zip(parts[1:-2:2], parts[2:-2:2])]
        yield messages
        if messages and messages[0]["role"] == "system":
            yield messages[1:]


def survive(tokenizer: Tokenizer, text: str) -> tuple[list[int], str]:
    """Token ids of a text, and how it comes back where that is not as it went."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    back = tokenizer.decode(ids, skip_special_tokens=False)
    return ids, lost(text, back)


def lost(text: str, back: str) -> str:
    """How a text differs from what comes back from its ids, spaces at the ends apart; "" where it does not."""
    return "" if back.strip() == text.strip() else f"{text[:40]!r} comes back as {back[:40]!r}"


def _with_end(
    ids: list[int], ends: tuple[int | None, int | None], truncated: bool | None, limit: int | None
) -> tuple[list[int], bool]:
    """The ids with the first of `ends` where they ended and have none, and whether that is known."""
    if ids and ids[-1] in ends:
        return ids, True
    if truncated is None and limit is not None:
        truncated = len(ids) >= limit
    if truncated is not False or ends[0] is None:
        return ids, truncated is True
    return [*ids, ends[0]], True


def _conversation(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completion: Sequence[Mapping[str, Any]],
    truncated: bool | None,
    limit: int | None,
    end: int | None,
) -> Turns:
    """The policy's turns, each rendered by the template behind all messages before it."""
    before = list(prompt) if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
    messages = [dict(each) for each in (*before, *completion)]
    shown = _render(tokenizer, before, True)
    ids: list[int] = []
    mask: list[bool] = []
    for k in range(len(before), len(messages)):
        if messages[k]["role"] != "assistant":
            continue
        cue, after = _render(tokenizer, messages[:k], True), _render(tokenizer, messages[: k + 1], False)
        if not cue.startswith(shown) or not after.startswith(cue):
            return Turns(ids, mask, REWRITTEN)
        _add(tokenizer, cue[len(shown) :], False, ids, mask)
        text = _to_end(tokenizer, after[len(cue) :], messages[k], end)
        _add(tokenizer, text, True, ids, mask)
        shown = cue + text
    while mask and not mask[-1]:
        ids.pop()
        mask.pop()
    known = truncated is not None or limit is not None
    cut = truncated if truncated is not None else limit is not None and len(ids) > limit
    ended = bool(ids) and ids[-1] == end
    if ended and (cut or not known):
        ids, mask = ids[:-1], mask[:-1]
    return Turns(ids, mask, end_unknown=not known or not (ended or cut))


def _render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], cue: bool) -> str:
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=cue, tokenize=False)


def _to_end(tokenizer: Tokenizer, text: str, message: Mapping[str, Any], end: int | None) -> str:
    """An assistant's turn up to its end token, or without one up to the end of what is said."""
    mark = tokenizer.decode([end], skip_special_tokens=False) if end is not None else ""
    at = text.rfind(mark) if mark else -1
    if at >= 0:
        return text[: at + len(mark)]
    content = message_text(message)
    at = text.find(content)
    return text[: at + len(content)] if at >= 0 else text


def _add(tokenizer: Tokenizer, text: str, own: bool, ids: list[int], mask: list[bool]) -> None:
    if text:
        more = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids += more
        mask += [own] * len(more)
