"""Flags of a study's command, made from the fields of its configuration: one place says what a field is, and that text
is its help.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
PAIR = "LABEL=PATH"
LETTERS = {int: "N", float: "X"}


def option(default: Any, help: str, **how: Any) -> Any:
    """A field of a configuration that is also a flag, read as its type says; `default` may be what makes it, like
    `dict`. `how`:

    flag     its name, where that is not the field's
    metavar  as of `argparse`
    nargs    of a tuple: "+" unless given
    action   as of `argparse`, in place of the reading
    consts   {flag: value}: flags without an argument in its place, of which one may be given
    identity  False for what changes how a study is made and none of its numbers
    later     True for a field that came later and is off by default: a study that was begun before it is the same
    """
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, metadata={"help": help, **how})


def identity(config: Any) -> dict[str, Any]:
    """The fields that make a study this one and no other."""
    return {
        each.name: identity(value) if is_dataclass(value := getattr(config, each.name)) else deepcopy(value)
        for each in fields(config)
        if each.metadata.get("identity", True)
        and not (each.metadata.get("later") and getattr(config, each.name) == each.default)
    }


def _hints(config: type) -> dict[str, Any]:
    """Types of the fields; a policy's is never a flag, and importing it would import a model library."""
    return get_type_hints(config, localns={"PolicyConfig": object})


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """A flag for every `option` of a configuration. What is not given is not in the parsed arguments."""
    hints = _hints(config)
    for each in fields(config):
        if "help" in each.metadata:
            _add(parser, each, hints[each.name])


def read(
    args: argparse.Namespace, config: type[Config], small: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> Config:
    """The configuration that the arguments ask for; with --small what is not given is as in `small`. `more`: fields
    that other flags say.
    """
    hints = _hints(config)
    flags = {each.name for each in fields(config) if "help" in each.metadata}
    given = {name: value for name, value in vars(args).items() if name in flags}
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = _pairs(value) if get_origin(hints[name]) is dict else tuple(value)
    return config(**{**(small if getattr(args, "small", False) else {}), **given, **(more or {})})


def check_choices(config: Any) -> None:
    """ValueError where a field of a fixed set of values has another one."""
    for name, hint in _hints(type(config)).items():
        for one in (hint, *get_args(hint)):
            if get_origin(one) is Literal and getattr(config, name) not in (*get_args(one), *_none(hint)):
                raise ValueError(f"{name} is one of {', '.join(get_args(one))}, not {getattr(config, name)!r}")


def _none(hint: Any) -> tuple[None, ...]:
    return (None,) if NoneType in get_args(hint) else ()


def told(small: Mapping[str, Any], config: type) -> str:
    """What --small does, in words made from its numbers."""
    usual = {each.name: _default(each) for each in fields(config) if each.name in small}
    parts = [f"{name.replace('_', ' ')} {_text(value)}, not {_text(usual[name])}" for name, value in small.items()]
    return "; ".join(parts)


def _add(parser: argparse.ArgumentParser, each: Field, hint: Any) -> None:
    how, default = dict(each.metadata), _default(each)
    for name in ("identity", "later"):
        how.pop(name, None)
    help = how.pop("help").replace("%", "%%")
    said = default is None or default is False or default in ((), {}) or "(default" in help
    if not said:
        help += f" (default: {_text(default)})"
    common = {"dest": each.name, "default": argparse.SUPPRESS}
    if consts := how.pop("consts", None):
        group = parser.add_mutually_exclusive_group()
        for flag, value in consts.items():
            group.add_argument(flag, action="store_const", const=value, help=f"{help}: {value}", **common)
        return
    flag = how.pop("flag", f"--{each.name.replace('_', '-')}")
    reading = {} if "action" in how else _reading(hint)
    parser.add_argument(flag, help=help, **{**common, **reading, **how})


def _reading(hint: Any) -> dict[str, Any]:
    """How `argparse` reads a value of this type: int, float, str, bool, Literal, tuple, dict, each or None."""
    options = [one for one in get_args(hint) if one is not NoneType]
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        several = options[-1] is Ellipsis
        return {**_reading(options[0]), "nargs": "+" if several else len(options)}
    if get_origin(hint) is dict:
        return {"action": "append", "metavar": PAIR}
    if len(options) == 1:
        return _reading(options[0])
    if hint is bool:
        return {"action": "store_true"}
    return {"type": hint, **({"metavar": LETTERS[hint]} if hint in LETTERS else {})}


def _pairs(texts: list[str]) -> dict[str, str]:
    if wrong := [text for text in texts if "=" not in text]:
        raise ValueError(f"a label and its path are given as {PAIR}, not {wrong[0]!r}")
    return dict(text.split("=", 1) for text in texts)


def _default(each: Field) -> Any:
    return each.default_factory() if each.default_factory is not MISSING else each.default


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(_text(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
