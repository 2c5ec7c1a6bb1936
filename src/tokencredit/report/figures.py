"""Figures and lists on a page: the one HTML form of a figure, of a table, and of what a study says of itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokencredit.figure import ENDS, Figure
from tokencredit.report.section import scrolling, text


def shown(figure: Figure | None, form: str = "", scale: float = 1.0, sign: bool = False) -> str:
    """A figure as HTML, the options as of `Figure.text`; a dash, or its note, for what is not defined."""
    if figure is None:
        return "–"
    if math.isnan(figure.value) and "note" in figure.more:
        return f'<span class="unit">{text(figure.more["note"])}</span>'
    value, interval = figure.numbers(form, scale, sign)
    return value + (f' <span class="ends">{interval}</span>' if interval else "")


def point(figure: Figure, scale: float = 1.0, **more: Any) -> dict[str, Any]:
    """{"value", "low", "high"}, each times `scale`, for a script that draws it."""
    return {name: scale * getattr(figure, name) for name in ENDS} | more


def points(figures: Mapping[str, Figure], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{label: point} of {label: name of a figure}."""
    return {label: point(figures[name]) for label, name in names.items()}


def table(label: str, heads: Sequence[str | tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways. Heads are text, or (text, what it says when pointed at); cells are HTML, the first
    of a row its name.
    """
    named = [(head, "") if isinstance(head, str) else head for head in heads]
    head = "".join(f"<th{_title(about)}>{text(name)}</th>" for name, about in named)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return scrolling(label, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _title(about: str) -> str:
    return f' title="{text(about)}"' if about else ""


def facts(known: Iterable[tuple[str, Any]]) -> str:
    """Names with their values, as text."""
    listed = "".join(f'<div class="fact"><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in known)
    return f'<dl class="facts">{listed}</dl>'


def said(result: Mapping[str, Any]) -> str:
    """The findings of a study."""
    return f"<ul>{''.join(f'<li>{text(finding)}</li>' for finding in result.get('findings', []))}</ul>"


def command(result: Mapping[str, Any]) -> str:
    """The command that a study was made with."""
    return f"<p><code>{text(result['command'])}</code></p>"


def note(content: str) -> str:
    """A remark; `content` is HTML."""
    return f'<p class="note">{content}</p>'
