"""What the terminal shows of an inspection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokencredit.progress import plain_table


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What is in the log, where credit goes, whether rightly, what the update does; and what was left out."""
    known = {"log": _log, "credit": _credit, "audit": _audit, "autopsy": _autopsy, "pair": _pair}
    shown = [known[name](block, result["figures"]) for name, block in result["parts"].items() if name in known]
    left_out = dict(result["skipped"])
    for name, block in result["parts"].items():
        left_out |= {f"{name}: {what}": why for what, why in block.get("left_out", {}).items()}
    if left_out:
        table = plain_table("Left out", "=part", "since")
        for name, why in left_out.items():
            table.add_row(name, why)
        shown.append(table)
    return shown


def _log(block: Mapping[str, Any], figures: Mapping[str, Any]) -> Table:
    title = f"{block['rollouts']:,} rollouts in {block['groups']:,} groups, {block['steps']} steps; 95 % over groups"
    table = plain_table(title, "=measure", ">all of it", ">last quarter less first", "unit")
    for name, total in block["totals"].items():
        trend = block["trends"].get(name)
        table.add_row(
            name, figures[total].text(".3g"), figures[trend].text(".2g") if trend else "–", figures[total].unit
        )
    return table


def _credit(block: Mapping[str, Any], figures: Mapping[str, Any]) -> Table:
    heads = ("tokens with credit", "against the outcome", "cosine with the logged")
    table = plain_table(
        f"Credit on {block['tokens']:,} tokens of {block['groups']} groups", "=method", *(f">{head}" for head in heads)
    )
    for name, row in block["methods"].items():
        table.add_row(name, *(figures[row[head]].text(".2f") if head in row else "–" for head in heads))
    return table


def _audit(block: Mapping[str, Any], figures: Mapping[str, Any]) -> Table:
    title = (
        f"Credit against Q − V of {block['tokens']:,} tokens, {block['completions']} completions of step"
        f" {block['step']}; 95 % over prompts"
    )
    table = plain_table(title, "=credit or proxy", ">(Q − V)² reached", ">explained", ">wrong sign")
    for name, reached in block["reached"].items():
        rest = (block[what].get(name) for what in ("explained", "signs"))
        table.add_row(name, figures[reached].text(".2f"), *(figures[x].text(".2f") if x else "–" for x in rest))
    if not block["resolved"]:
        table.add_row("not told from noise: raise --tokens or --rollouts", "–", "–", "–")
    return table


def _autopsy(block: Mapping[str, Any], figures: Mapping[str, Any]) -> Table:
    goals = block["goals"]
    title = f"The update of step {block['step']}, in thousandths; 95 % over evaluation prompts"
    table = plain_table(title, "=made by", *(f">{name}" for name in goals))
    for part in ("total", "momentum", "tokens"):
        table.add_row(part, *(figures[goal["parts"][part]].text(".3g", 1000) for goal in goals.values()))
    for each in block["methods"][1:]:
        cells = (figures[each["goals"][goal]].text(".3g", 1000) for goal in goals)
        table.add_row(f"tokens, by {each['name']}", *cells)
    return table


def _pair(block: Mapping[str, Any], figures: Mapping[str, Any]) -> Table:
    table = plain_table(f"{block['prompts']:,} prompts of both logs", "=measure", ">second less first", "unit")
    for name, change in block["changes"].items():
        table.add_row(name, figures[change].text(".3g"), figures[change].unit)
    return table
