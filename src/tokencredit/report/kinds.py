"""Which module of the report shows which kind of study: what a `result.json` calls itself, and who has its
`sections(directory)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from tokencredit.durable import read_mapping
from tokencredit.report.section import Section

KINDS = {
    "attribution": "attribution",
    "compare": "compare",
    "correlation": "correlation",
    "entropy dynamics": "entropy",
    "kernel": "kernel",
    "noise-scale": "noise_scale",
    "variance": "variance",
}


def kind_of(directory: str | Path) -> str | None:
    """The kind of a finished study; None for what is no study that the report can show."""
    file = Path(directory) / "result.json"
    result = read_mapping(file) if file.exists() else {}
    kind = result.get("study") or result.get("question")
    return kind if kind in KINDS else None


def sections_of(directories: Sequence[Path]) -> list[Section]:
    """The sections of several studies; where there is more than one, titles begin with the study's directory."""
    found = [
        (directory, import_module(f"tokencredit.report.{KINDS[kind_of(directory)]}").sections(directory))
        for directory in directories
    ]
    if len(found) == 1:
        return found[0][1]
    return [replace(section, title=f"{directory}: {section.title}") for directory, some in found for section in some]
