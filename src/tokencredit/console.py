"""The one console of every command: what it prints is text, whoever wrote it.

Column names, paths, tasks, completions and messages of errors come from files and models. Nothing in them is read as
rich's markup or as an emoji code, and no control character reaches the terminal: it is shown as `\\x1b`, so that what
is printed can neither move the cursor, nor recolour, nor hide text.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from rich.console import Console
from rich.status import Status
from rich.text import Text

# Controls (C0 without newline, DEL, C1), line separators, marks that reorder text, and surrogates, which no terminal
# can be sent.
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with every unsafe character as its escape.

    >>> visible("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return UNSAFE.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def _visible_text(text: Text) -> Text:
    """The same for styled text; an escape has the style of the character."""
    found = [match.start() for match in UNSAFE.finditer(text.plain)]
    if not found:
        return text
    shown = text.blank_copy()
    for piece in text.divide(sorted({*found, *(place + 1 for place in found)})):
        if UNSAFE.fullmatch(piece.plain):
            piece = Text(_escape(piece.plain), style=piece.spans[-1].style if piece.spans else "")
        shown.append_text(piece)
    return shown


class PlainStatus(Status):
    """A status whose words are text; rich's own reads markup in them."""

    def update(self, status: Any = None, **options: Any) -> None:
        super().update(Text(visible(status)) if isinstance(status, str) else status, **options)


class PlainConsole(Console):
    """A console on which strings are text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Any]:
        shown = _visible_text(renderable) if isinstance(renderable, Text) else renderable
        return super().render(shown, options)

    def status(self, status: Any, **options: Any) -> PlainStatus:
        words = Text(visible(status)) if isinstance(status, str) else status
        return PlainStatus(words, console=self, **options)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints about arguments are text as well."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int] | None, summary: str, epilog: str
) -> argparse.ArgumentParser:
    """Adds a command to the subparsers of another, and returns its parser. `epilog` is printed as it stands, after the
    flags; without `run` the command prints its help.
    """
    parser = commands.add_parser(
        name,
        help=summary.replace("%", "%%"),  # argparse formats `help` with %, but not `description`
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run or (lambda args: parser.print_help()))
    return parser


console = PlainConsole()
errors = PlainConsole(stderr=True)


def warn(message: Any, *_: Any, **__: Any) -> None:
    """A warning on the terminal, in one line; what `warnings.showwarning` may be set to."""
    errors.print(Text("warning: ", style="bold yellow") + Text(visible(str(message))), soft_wrap=True)
