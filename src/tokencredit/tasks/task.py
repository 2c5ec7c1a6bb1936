"""What a task is, and what it may know besides: the protocols that the rest of the library asks.

A task gives prompts and verifies answers. Some tasks know more, and whoever needs more asks for it by its protocol,
`isinstance(task, Roles)`: nothing else of a task is looked up by name.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tokencredit.tasks.verdict import Validation, Verdict

Row = dict[str, Any]
"""What a task knows of one prompt: "prompt" (text, or messages with role and content), "answer", and columns of its
own.
"""

MAX_NEW_TOKENS = 256
"""Length limit of a completion where neither a task nor a user says another."""


@runtime_checkable
class Task(Protocol):
    """Prompts whose answers can be verified. `tasks.load` makes one.

    name             as messages and records call it
    max_new_tokens   length limit of a completion that does not cut good answers
    """

    @property
    def name(self) -> str: ...

    @property
    def max_new_tokens(self) -> int: ...

    def rows(self, split: str = "train", limit: int | None = None, seed: int = 0) -> list[Row]:
        """At most `limit` rows of the split "train" or "test", drawn by `seed`; all of them with None."""
        ...

    def verify(self, completion: str, row: Row, truncated: bool = False) -> Verdict:
        """The verdict on a completion of the row's prompt; `truncated` where the length limit cut it."""
        ...

    def validate(self) -> Validation:
        """Put the task's gold answers through its own verifier."""
        ...


@runtime_checkable
class Endless(Protocol):
    """A task that makes prompts without end: `rows` needs a limit, and no epoch is ever over."""

    def prompts(self, split: str = "train", seed: int = 0) -> Iterator[Row]:
        """Rows without end, the same for the same seed."""
        ...


@runtime_checkable
class Roles(Protocol):
    """A task that knows what each token of a completion is: an operand, a fork, the answer ..."""

    def roles(self, row: Row, tokens: Sequence[str]) -> list[str]:
        """The role of every token [T]; `tokens` are the tokenizer's own names of them."""
        ...


@runtime_checkable
class Steps(Protocol):
    """A task that knows where the reasoning steps of a completion begin."""

    def steps(self, row: Row, tokens: Sequence[str]) -> list[int]:
        """Positions of the first tokens of the steps."""
        ...


@runtime_checkable
class Deciding(Protocol):
    """A task that knows which positions can change the outcome."""

    def deciding(self, row: Row, tokens: Sequence[str]) -> list[bool]:
        """For every position [T], from the tokens before it alone, whether what is written there decides."""
        ...


@runtime_checkable
class Walkable(Protocol):
    """A task so small that prefix trees can walk all that a policy may write, and exact values can be had.

    tree_eps   prefixes that are reached more rarely than this need not be followed, for values that are good enough to
               train and to compare with
    """

    @property
    def tree_eps(self) -> float: ...


@runtime_checkable
class OnDisk(Protocol):
    """A task that reads its rows from files, where it was given any."""

    def files(self) -> list[Path]:
        """The files, in an order of their own."""
        ...


@runtime_checkable
class Recognising(Protocol):
    """A task that knows its own prompts again."""

    def row_of(self, prompt: str) -> Row | None:
        """The row of a prompt; None where it is not one of the task's."""
        ...
