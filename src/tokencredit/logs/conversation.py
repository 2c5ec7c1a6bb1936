"""Text and messages -> token ids of prompt and completion, with what the policy wrote told from tool outputs and other
turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokencredit.lm.models import Tokenizer
from tokencredit.lm.prompts import Prompt, encode_prompt, message_text
from tokencredit.logs.rollout import LoggedRollout


@dataclass(frozen=True)
class Turns:
    """Token ids of a prompt and of its completion, and which of the latter [T] the policy wrote."""

    prompt: list[int]
    completion: list[int]
    mask: list[bool]
    faithful: bool = True
    why: str = ""
    end_unknown: bool = False


def encode_turns(each: LoggedRollout, tokenizer: Tokenizer, chat: bool | None, limit: int | None) -> Turns:
    """Ids of a rollout that was logged as text or as messages."""
    completion = each.completion
    if isinstance(completion, str):
        prompt = encode_prompt(tokenizer, each.prompt, chat) if each.prompt and each.prompt_ids is None else []
        ids, why = survive(tokenizer, completion)
        ids, known = _with_end(ids, tokenizer, each.truncated, limit)
        return Turns(prompt, ids, [True] * len(ids), not why, why, not known)
    if not getattr(tokenizer, "chat_template", None):
        if len(completion) == 1:
            alone = message_text(completion[0])
            ids, why = survive(tokenizer, alone)
            return Turns([], ids, [True] * len(ids), not why, why, True)
        raise ValueError(f"{each.place}: the completion is messages, but the tokenizer has no chat template")
    return _conversation(tokenizer, each.prompt, completion, each.truncated, limit)


def survive(tokenizer: Tokenizer, text: str) -> tuple[list[int], str]:
    """Token ids of a text, and how it comes back where that is not as it went."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    back = tokenizer.decode(ids, skip_special_tokens=False)
    return ids, "" if back.strip() == text.strip() else f"{text[:40]!r} comes back as {back[:40]!r}"


def _with_end(
    ids: list[int], tokenizer: Tokenizer, truncated: bool | None, limit: int | None
) -> tuple[list[int], bool]:
    """The ids with the token that ends them where they ended, and whether that is known."""
    end = tokenizer.eos_token_id
    if end is None or (ids and ids[-1] == end):
        return ids, True
    if truncated is None and limit is not None:
        truncated = len(ids) >= limit
    return (ids, truncated is not None) if truncated in (None, True) else ([*ids, end], True)


def _conversation(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completion: Sequence[Mapping[str, Any]],
    truncated: bool | None,
    limit: int | None,
) -> Turns:
    """Turn by turn, each rendered by the template behind those before it."""
    before = list(prompt) if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
    messages = [dict(each) for each in (*before, *completion)]
    start = encode_prompt(tokenizer, before)
    shown = _render(tokenizer, before, True)
    ids: list[int] = []
    mask: list[bool] = []
    for k in range(len(before), len(messages)):
        own = messages[k]["role"] == "assistant"
        if own and k > len(before):
            cue = _render(tokenizer, messages[:k], True)
            if not cue.startswith(shown):
                return Turns(start, ids, mask, False, "the chat template rewrites earlier turns")
            _add(tokenizer, cue[len(shown) :], False, ids, mask)
            shown = cue
        after = _render(tokenizer, messages[: k + 1], False)
        if not after.startswith(shown):
            return Turns(start, ids, mask, False, "the chat template rewrites earlier turns")
        text, shown = after[len(shown) :], after
        if not own:
            _add(tokenizer, text, False, ids, mask)
            continue
        written, rest = _to_end(tokenizer, text, messages[k])
        _add(tokenizer, written, True, ids, mask)
        _add(tokenizer, rest, False, ids, mask)
    while mask and not mask[-1]:
        ids.pop()
        mask.pop()
    end = tokenizer.eos_token_id
    known = truncated is not None or limit is not None
    cut = truncated if truncated is not None else limit is not None and len(ids) > limit
    if ids and ids[-1] == end and (cut or not known):
        ids, mask = ids[:-1], mask[:-1]
    return Turns(start, ids, mask, True, "", not known)


def _render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], cue: bool) -> str:
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=cue, tokenize=False)


def _to_end(tokenizer: Tokenizer, text: str, message: Mapping[str, Any]) -> tuple[str, str]:
    """An assistant's turn up to its end token, and what the template writes behind it."""
    end = tokenizer.eos_token_id
    mark = tokenizer.decode([end], skip_special_tokens=False) if end is not None else ""
    at = text.rfind(mark) if mark else -1
    if at >= 0:
        return text[: at + len(mark)], text[at + len(mark) :]
    content = message_text(message)
    at = text.find(content)
    return (text[: at + len(content)], text[at + len(content) :]) if at >= 0 else (text, "")


def _add(tokenizer: Tokenizer, text: str, own: bool, ids: list[int], mask: list[bool]) -> None:
    if text:
        more = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids += more
        mask += [own] * len(more)
