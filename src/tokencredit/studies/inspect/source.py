"""The log, read as often as it is asked for; and the checkpoint that is asked about it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokencredit.lm.policy import Policy, PolicyConfig
from tokencredit.logs import LoggedRollout, read
from tokencredit.logs.files import files_of
from tokencredit.studies.inspect.question import InspectConfig

EDGE = 1 << 20
"""Bytes at either end of a file that tell it from another."""


class Missing(ValueError):
    """What a part of the answer needs and does not have; the message says what to do."""


@dataclass
class Source:
    """A log: its files and how they are read. Warnings of the reader are said once."""

    paths: tuple[str, ...]
    format: str | None
    columns: dict[str, str]
    told: bool = False

    @classmethod
    def of(cls, config: InspectConfig, paths: Sequence[str]) -> Source:
        return cls(tuple(paths), config.format, config.columns)

    def rollouts(self) -> Iterator[LoggedRollout]:
        """All of it, one after the other. ValueError where the files are no log, or a row is wrong."""
        with warnings.catch_warnings():
            if self.told:
                warnings.simplefilter("ignore")
            found = read(self.paths, format=self.format, columns=self.columns)
            self.told = True
            yield from found

    def identity(self) -> list[dict[str, Any]]:
        """Name, size and a digest of both ends of every file: a log that went on is another."""
        return [
            {"file": str(path), "bytes": path.stat().st_size, "digest": _digest(path)}
            for path, _ in files_of([Path(path) for path in self.paths])
        ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(EDGE)
        file.seek(max(path.stat().st_size - EDGE, 0))
        return hashlib.blake2b(first + file.read(EDGE), digest_size=16).hexdigest()


def settled(config: PolicyConfig) -> PolicyConfig:
    """The policy with everything that is None filled in; where nothing tells its task, that of given completions."""
    return replace(config, task=config.named_task() or "given").settled()


def length_limit(policy: Policy, asked: int | None, logged: Sequence[LoggedRollout]) -> int:
    """Tokens that a logged completion could have: what was asked for; else that of the completions that were cut; else
    the policy's own limit. Where one is longer than that: the longest, if several end there as if cut; or one more.
    """
    if asked:
        return asked
    length = [len(_ids(policy, each)) for each in logged]
    cut = [size for size, each in zip(length, logged) if each.truncated]
    if cut or not length:
        return max(cut, default=policy.max_new_tokens)
    longest = max(length)
    return policy.max_new_tokens if longest < policy.max_new_tokens else longest + (length.count(longest) == 1)


def _ids(policy: Policy, each: LoggedRollout) -> Sequence[int]:
    if each.completion_ids is not None:
        return each.completion_ids
    text = (
        each.completion if isinstance(each.completion, str) else "".join(str(m.get("content")) for m in each.completion)
    )
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]
