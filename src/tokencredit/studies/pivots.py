"""What a report shows of a directory of `tokencredit pivotality run`: its pivotal tokens, and its completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.durable import read_mapping
from tokencredit.figure import Figure
from tokencredit.pivotality.view import ESTIMANDS, LEAST, RATE, views
from tokencredit.report import figures as parts
from tokencredit.report.effects import effects_section
from tokencredit.report.section import Section, text

SHOWN, LISTED, CONTEXT = 16, 24, 5
FACTS = {
    "tokens": "Tokens",
    "undefined": "Tokens without an alternative",
    "skipped": "Tokens left out as near certain",
    "start": "Success probability at the start",
    "rollouts": "Rollouts",
    "generated": "Tokens sampled for them",
    "standard_error_median": "Median standard error of replace",
}


def holds_pivots(directory: Path) -> bool:
    """Whether a directory is one of `tokencredit pivotality run` that has finished."""
    return all((directory / name).exists() for name in ("result.json", "tokens.parquet", "alternatives.parquet"))


def sections(directory: Path) -> list[Section]:
    """The completions with their effects, then the pivotal tokens in a table and what the run was."""
    result, found = read_mapping(directory / "result.json", "figures", "policy", "command"), views(directory)
    note = (
        "Blue: the token raises the success probability; orange: it lowers it. The fainter, the less certain that there"
        f" is an effect. Underlined: pivotal, an effect of {LEAST:g} or more that was found at a rate of {RATE:g} false"
        " discoveries over all tokens of the run. Completions"
        f" with the largest pivotal effects come first: {min(SHOWN, len(found))} of {len(found)} are on this page."
    )
    return [effects_section(found[:SHOWN], note=note), _about(result, found)]


def _about(result: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> Section:
    figures = {name: Figure.from_json(figure) for name, figure in result["figures"].items()}
    policy = result["policy"]
    facts = [
        ("Model and task", f"{policy['model']} on {policy['task'] or 'reckon'}, temperature {policy['temperature']:g}")
    ]
    facts += [(name, _told(figures[key])) for key, name in FACTS.items() if key in figures]
    pivotal = [
        (number, view, at)
        for number, view in enumerate(found, start=1)
        for at in range(len(view["tokens"]))
        if any(view["pivotal"][name][at] for name in ESTIMANDS)
    ]
    pivotal.sort(key=lambda each: -abs(each[1]["before_after"]["value"][each[2]]))
    counts = ", ".join(f"{sum(sum(view['pivotal'][name]) for view in found)} by {name}" for name in ESTIMANDS)
    said = f"Pivotal, with an effect of {LEAST:g} or more at a false discovery rate of {RATE:g}: {counts}."
    if not pivotal:  # a null result is said, with what would narrow it
        said += " More rollouts per token (--rollouts) make the intervals narrower."
    elif len(pivotal) > LISTED:
        said += f" The {LISTED} with the largest effect are listed; tokens.parquet holds all."
    table = ""
    if pivotal:
        heads = ("token, in its text", "before_after", "replace", "V before → after", "completion")
        table = parts.table("Pivotal tokens", heads, [_row(*each) for each in pivotal[:LISTED]])
    body = f"<p>{text(said)}</p>{table}{parts.facts(facts)}{parts.command(result)}"
    return Section("Pivotal tokens", body)


def _told(figure: Figure) -> str:
    return f"{figure.value:,.0f}" if figure.unit in ("tokens", "rollouts") else figure.text(".2f")


def _row(number: int, view: Mapping[str, Any], at: int) -> list[str]:
    tokens = view["tokens"]
    before, after = "".join(tokens[max(0, at - CONTEXT) : at]), "".join(tokens[at + 1 : at + 1 + CONTEXT])
    here = f'<strong class="here">{text(tokens[at]) or "…"}</strong>'
    token = f'<code class="context">{text(before)}{here}{text(after)}</code>'
    effects = []
    for name in ESTIMANDS:
        value, low, high = (view[name][end][at] for end in ("value", "low", "high"))
        shown = parts.shown(Figure(value, low, high), ".2f", sign=True) if math.isfinite(value) else "–"
        effects.append(f"<strong>{shown}</strong>" if view["pivotal"][name][at] else shown)
    change = f"{view['value'][at]:.2f} → {view['value'][at + 1]:.2f}"
    return [token, *effects, change, f"{number}, {'correct' if view['correct'] else 'incorrect'}"]
