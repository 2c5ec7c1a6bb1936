"""The report: run directories -> one HTML file that needs neither a network nor a server. It computes no statistic.

A section is one module with a `build(material) -> Section | None`; None, where the material holds nothing for it,
leaves it out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.durable import replace_file
from tokencredit.report import curves as learning
from tokencredit.report import findings, methods, overview, roles, tokens, training
from tokencredit.report.notebook import TokenView
from tokencredit.report.page import page
from tokencredit.report.section import Material, Section
from tokencredit.runs import Run

__all__ = ["BUILDERS", "Material", "Section", "TokenView", "sections", "write", "write_sections"]

BUILDERS: tuple[Callable[[Material], Section | None], ...] = (
    tokens.build,
    overview.build,
    findings.build,
    methods.build,
    learning.build,
    training.build,
    roles.build,
)
"""In the order of the page, which opens with the tokens."""


def sections(run_dirs: Iterable[str | os.PathLike], curves: Mapping[str, Any] | None = None) -> list[Section]:
    """What there is to show of these runs and of the figures computed from them."""
    material = Material.of([Run.open(path) for path in run_dirs], curves or {})
    return [section for build in BUILDERS if (section := build(material))]


def write(
    run_dirs: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    curves: Mapping[str, Any] | None = None,
    *,
    title: str = "tokencredit report",
    first: Sequence[Section] = (),
    extra: Sequence[Section] = (),
) -> Path:
    """Write the report of these runs and of the figures computed from them, between the sections `first` and `extra`.

    write(sorted(Path("runs").iterdir()), "report.html", study.curves(), title="Five methods on reckon")
    """
    return write_sections([*first, *sections(run_dirs, curves), *extra], out, title=title)


def write_sections(built: Sequence[Section], out: str | os.PathLike, *, title: str = "tokencredit report") -> Path:
    """Write a page of these sections."""
    document = page(title, built)
    replace_file(Path(out), lambda file: file.write(document.encode("utf-8", "backslashreplace")))
    return Path(out)
