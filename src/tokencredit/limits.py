"""What this machine can hold: sizes beyond it are refused by name, before they hang or crash a process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROW = 4096
"""Bytes of a prompt or a completion with its tokens, at the least."""
THREADS_PER_CORE = 4


def memory() -> int:
    """Bytes of memory that this machine has; a terabyte where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**40


def check_rows(number: int, name: str) -> int:
    """The number of prompts or completions. ValueError where they cannot be held, with what they would need."""
    most = memory() // ROW
    if number > most:
        raise ValueError(
            f"{name} {number:,} would need {number * ROW / 2**30:,.0f} GiB at the least, and this machine has"
            f" {memory() / 2**30:,.0f} GiB: {most:,} at the most"
        )
    return number


def free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which may not be there yet."""
    return shutil.disk_usage(next(each for each in (folder, *folder.resolve().parents) if each.exists())).free


def check_threads(number: int, name: str = "threads") -> int:
    """The number of threads. ValueError where it is many times the cores: that is slower, and then fails to start."""
    cores = os.cpu_count() or 1
    if number > THREADS_PER_CORE * cores:
        raise ValueError(
            f"{name} {number:,} is too many for {cores} cores: {THREADS_PER_CORE * cores} at the most, {cores} are"
            " useful"
        )
    return number
