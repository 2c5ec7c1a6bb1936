"""Tokens of phrases that plan: 1 on every token that a phrase touches in the completion's text, else 0.

Source: HICRA (arXiv:2509.03646) amplifies the credit of "strategic grams"; its list was not released. `PHRASES` is one
of our own: a list for your model and task is better.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tokencredit.lm.models import Tokenizer
from tokencredit.lm.packing import Ids
from tokencredit.lm.text import pieces

PHRASES = (
    *("wait", "let me", "let's", "alternatively", "on the other hand", "another way", "but first", "first,"),
    *("to solve", "we need to", "i need to", "the idea is", "notice that", "suppose", "in other words"),
    *("let me check", "double-check", "to verify", "going back", "therefore", "this means"),
)


def planning(tokenizer: Tokenizer, completions: Ids, phrases: Sequence[str] = PHRASES) -> list[Tensor]:
    """[T] of every completion, float32. Phrases are words beside others, in any case. ValueError without a phrase."""
    if not phrases or not all(phrase.strip() for phrase in phrases):
        raise ValueError(f"planning looks for phrases, and these are none: {list(phrases)!r}")
    wanted = "|".join(re.escape(phrase.strip()) for phrase in sorted(phrases, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{wanted})(?!\w)", re.IGNORECASE)
    return [_marked(pieces(tokenizer, ids), pattern) for ids in completions]


def _marked(texts: Sequence[str], pattern: re.Pattern[str]) -> Tensor:
    """[T]: 1 where a token's text overlaps a match in the whole text."""
    spans, found, start = [each.span() for each in pattern.finditer("".join(texts))], torch.zeros(len(texts)), 0
    for i, text in enumerate(texts):
        end = start + len(text)
        found[i] = float(any(start < last and first < end for first, last in spans))
        start = end
    return found
