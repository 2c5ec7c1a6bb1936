"""result.json: what a study found, written and read here and nowhere else.

format    of the file; absent before there was one
study     its name, as in the table of studies
command, seed, config, seconds    what was asked, and what every stage took
figures   {name: figure}; every other number refers to figures by name
findings  sentences, made from the figures
...       the study's own blocks, which its page draws
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.durable import read_mapping, write_json
from tokencredit.figure import Figure
from tokencredit.report.notebook import findings_and_figures
from tokencredit.runs import FORMER_STUDIES

FORMAT = 2


class Result(dict[str, Any]):
    """The blocks of a result.json by name; a notebook shows the findings, and the figures folded under them."""

    def _repr_html_(self) -> str:
        return findings_and_figures(self)


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """The result with its Figures as JSON."""
    figures = {name: figure.as_json() for name, figure in result["figures"].items()}
    write_json(directory / "result.json", {"format": FORMAT, **result, "figures": figures})


def read_result(directory: str | Path) -> Result:
    """The result with its figures as Figures. ValueError where there is none, or one of a later version."""
    path = Path(directory) / "result.json"
    if not path.exists():
        raise ValueError(f"{directory} holds no finished study (no result.json): give its command again")
    stored = read_mapping(path)
    if stored.get("format", 1) > FORMAT:
        raise ValueError(
            f"{path} has format {stored['format']}; this version of tokencredit reads results up to format {FORMAT}"
        )
    figures = {name: Figure.from_json(figure) for name, figure in stored.get("figures", {}).items()}
    found = Result({**stored, "study": _name(stored), "figures": figures})
    config = stored.get("config", {})
    if "policy" not in config and "model" in config:  # once its fields stood among the others
        found["config"] = {**config, "policy": {name: config.get(name) for name in ("model", "task", "temperature")}}
    return found


def study_name(directory: str | Path) -> str | None:
    """What a finished study is called; None where there is no result of one."""
    path = Path(directory) / "result.json"
    return _name(read_mapping(path)) if path.exists() else None


def _name(stored: Mapping[str, Any]) -> str | None:
    name = stored.get("study") or stored.get("question")
    return FORMER_STUDIES.get(name, name)
