"""Settings that people write as text, "key=value" or whole files: YAML, with the numbers that people write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import yaml


def read_settings(settings: Iterable[str], flag: str = "--option") -> dict[str, Any]:
    """{"key": value} from "key=value", the values read as YAML."""
    pairs = [setting.partition("=") for setting in settings]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise ValueError(f"{flag} takes key=value, got {bad[0]!r}")
    return {key.strip(): parse(text, f"{flag} {key}") for key, _, text in pairs}


class _Yaml(yaml.SafeLoader):
    """YAML whose numbers are those that people write: 5e-4 is one, which YAML 1.1 takes for text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse(text: str, where: str) -> Any:
    """The value that a text writes in YAML, or in JSON where `where`, its name in messages, ends in .json."""
    try:
        return json.loads(text) if where.endswith(".json") and not where.startswith("--") else yaml.load(text, _Yaml)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: cannot be read ({' '.join(str(error).split())})") from error
