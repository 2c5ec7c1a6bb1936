"""Sections -> one HTML file that loads nothing.

Style and scripts are inlined and allowed by their hash alone; the policy forbids every request and every other script,
so that a page with hostile model output in it stays inert even if a builder forgot to escape.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from tokencredit.report.section import Section, text

# Inside <script>, JSON must hold neither the end of the element nor what opens a comment; the last two end a line in
# old JavaScript.
ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


USES = "// uses:"


def embedded_json(value: Any) -> str:
    """JSON that is safe between script tags."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(ESCAPES)


def _asset(name: str) -> str:
    return resources.files("tokencredit.report").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def uses(name: str) -> tuple[str, ...]:
    """The scripts that a script names in its first line."""
    first = _asset(name).partition("\n")[0]
    return tuple(first.removeprefix(USES).split()) if first.startswith(USES) else ()


def scripts(names: Iterable[str]) -> list[str]:
    """These scripts and all that they use, each after what it uses; what every page has first and last."""
    found: dict[str, None] = {"dom.js": None}

    def add(name: str) -> None:
        for part in uses(name):
            add(part)
        found.setdefault(name)

    for name in names:
        add(name)
    return [*found, "start.js"]


def _section(section: Section) -> str:
    data = ""
    if section.script:
        data = (
            f'<script type="application/json" data-draw="{text(section.script)}">{embedded_json(section.data)}</script>'
        )
    anchor = text(section.anchor)
    heading = f'<h2 id="{anchor}-title">{text(section.heading)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">{heading}\n{section.body}\n{data}</section>\n'


def _links(sections: Sequence[Section]) -> str:
    """The contents: what several sections are about is said once, before them."""
    found, group = "", ""
    for section in sections:
        if section.group != group:
            group = section.group
            found += f'<span class="group">{text(group)}</span>'
        found += f'<a href="#{text(section.anchor)}">{text(section.title)}</a>'
    return found


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    style = _asset("page.css")
    script = "\n".join(map(_asset, scripts(section.script for section in sections if section.script)))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{text(title)}</h1><nav aria-label="Sections">{_links(sections)}</nav></header>
<main>
{"".join(_section(section) for section in sections)}
</main>
<footer>Written by tokencredit. This file loads nothing and sends nothing.</footer>
<noscript>The plots and the token view need JavaScript; the tables above do not.</noscript>
<script>{script}</script>
</body>
</html>
"""
