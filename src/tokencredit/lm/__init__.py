"""What is measured on a language model: scores of tokens, their importance, samples."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokencredit.lm.proxies import Importance, importance
    from tokencredit.lm.scoring import score

__all__ = ["Importance", "importance", "score"]

_WHERE = {"importance": "proxies", "Importance": "proxies", "score": "scoring"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
