"""Modules of the current directory, where a command looks for a verifier of your own: found last, and never in place of
a library.

Libraries ask whether others are installed by looking for their names. A folder that is called like one (data in
`vllm/`, a checkout of `deepspeed`) is a package to Python where the directory is on `sys.path`, and an installed
library without a version to whoever asks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

LIBRARIES = frozenset({"bitsandbytes", "deepspeed", "flash_attn", "kernels", "liger_kernel", "mergekit", "peft", "ray"})
LIBRARIES |= frozenset({"sglang", "trackio", "trl", "unsloth", "verl", "vllm", "wandb"})
"""Names that others look for, and that are nobody's verifier."""


class FoundLast(MetaPathFinder):
    """Finds modules and packages with a file in one directory; folders without one are no packages to it."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or fullname in LIBRARIES:
            return None
        spec = PathFinder.find_spec(fullname, [self.directory], target)
        return spec if spec is not None and spec.origin is not None else None


def look_here_last() -> None:
    """Take the current directory off `sys.path`, where `python -m` and launchers put it, and look there last."""
    here = os.path.realpath(os.getcwd())
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != here]
    sys.meta_path.append(FoundLast(here))
