"""The text of each token, as it stands in the decoded completion."""

from __future__ import annotations

from collections.abc import Sequence

from tokencredit.lm.models import Tokenizer

WINDOW = 6
BROKEN = "�"


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What every token adds to the text, spaces included: ["@2", " 7", " +"], whatever the tokenizer calls its tokens.

    A token that ends in the middle of a character adds nothing, and the one that completes it adds the character.
    Decodes a few tokens back for every token, since what a token adds may depend on those before it.
    """
    found: list[str] = []
    start = done = 0  # text before `start` is settled; up to `done` it is shown
    for end in range(1, len(ids) + 1):
        shown = tokenizer.decode(ids[start:done], skip_special_tokens=False)
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        if text.endswith(BROKEN) and end < len(ids):
            found.append("")
            continue
        found.append(text[len(shown) :])
        start, done = max(start, end - WINDOW), end
    return found


def piece_after(tokenizer: Tokenizer, before: Sequence[int], token: int) -> str:
    """What one token adds to the text when it stands behind others."""
    return pieces(tokenizer, [*before[-WINDOW:], token])[-1]
