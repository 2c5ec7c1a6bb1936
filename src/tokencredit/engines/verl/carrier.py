"""The carrier: where verl's configuration says which method trains, and with what.

verl's own sections become frozen dataclasses that take no further key; `trainer.v1` stays a plain mapping and reaches
the trainer as it was written. So everything of ours stands in `trainer.v1.tokencredit`:

    +trainer.v1.tokencredit.method=gtpo
    +trainer.v1.tokencredit.method_options='{alpha: [1, 0.2]}'
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any

from tokencredit.method import Method
from tokencredit.methods import METHODS

WHERE = "trainer.v1.tokencredit"


@dataclass(frozen=True)
class Carrier:
    """What `trainer.v1.tokencredit` holds.

    method            a name of METHODS, or "module:attribute" of a Method of your own that every worker can import
    method_options    hyper-parameters to replace, as `Method.replace` takes them
    success_above     a rollout is a success when its reward exceeds this
    dynamic_sampling  draw again until every group holds both outcomes: null as the method asks for it, or true, false
    scores            {score: "module:function"} for scores that verl does not store: function(batch) -> [B, T] is
                      called in the trainer's process with the padded batch ("prompts", "responses", "response_mask")
    seed              of the score "uniform", with which a method draws its tokens
    """

    method: str
    method_options: dict[str, Any] = field(default_factory=dict)
    success_above: float = 0.0
    dynamic_sampling: bool | None = None
    scores: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    def build(self, max_length: int) -> Method:
        """The method for completions of at most `max_length` tokens. KeyError and ValueError name what there is."""
        method = named(self.method, "method") if ":" in self.method else METHODS[self.method]
        if not isinstance(method, Method):
            raise ValueError(f"{WHERE}.method={self.method} is a {type(method).__name__}, not a Method")
        return method.configured(self.method_options).within(max_length)


def read_carrier(section: Mapping[str, Any] | None) -> Carrier:
    """The carrier from the mapping that stands at `trainer.v1.tokencredit`. ValueError names the key and what to
    write.
    """
    if not section or not section.get("method"):
        there = "nothing" if not section else ", ".join(map(str, section))
        raise ValueError(
            f"a tokencredit trainer needs a method, and {WHERE} holds {there}: add +{WHERE}.method=gtpo (`tokencredit"
            " methods` lists them)"
        )
    kinds = {f.name: f.type for f in fields(Carrier)}
    values: dict[str, Any] = {}
    for key, value in plain(section).items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"{WHERE}: unknown key {key}{hint} Keys: {', '.join(kinds)}")
        values[key] = _typed(key, kinds[key], value)
    return Carrier(**values)


def _typed(key: str, kind: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits, words = {
        "str": (isinstance(value, str), "text"),
        "dict[str, Any]": (isinstance(value, Mapping), "key: value pairs"),
        "dict[str, str]": (isinstance(value, Mapping), "score: module:function pairs"),
        "float": (number, "a number"),
        "int": (number and isinstance(value, int), "a whole number"),
        "bool | None": (value is None or isinstance(value, bool), "true, false or null"),
    }[kind]
    if not fits:
        raise ValueError(f"{WHERE}.{key} must be {words}, got {value!r}")
    return float(value) if kind == "float" else value


def plain(value: Any) -> Any:
    """The value in dicts and lists, where a configuration has mappings and sequences of its own."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def named(place: str, key: str) -> Any:
    """What "module:attribute" names. ImportError says which key asked for it."""
    module, _, attribute = place.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{WHERE}.{key}={place}: {error}. It is imported in verl's Ray workers: install its package there, or put"
            " its directory on their PYTHONPATH"
        ) from error
