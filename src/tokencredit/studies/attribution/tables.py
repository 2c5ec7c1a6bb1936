"""What the terminal shows of an attribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokencredit.progress import plain_table

MILLI = 1e3
GOALS = ("entropy", "reward")


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Who makes the change, and what other methods would have done."""
    return [_parts(result), _methods(result)]


def _parts(result: Mapping[str, Any]) -> Table:
    """Momentum, decay, the step's own tokens, and of these successes and failures."""
    about, figures, parts = result["about"], result["figures"], result["parts"]
    shown = plain_table(
        f"The next step of {about['method']} at step {about['step']}, in thousandths; 95 % over evaluation prompts, of"
        " successes and failures over the step’s prompts",
        *("made by", ">entropy (nats)", ">reward"),
    )
    rows = {part: {goal: parts[goal][part] for goal in GOALS} for part in ("momentum", "decay", "tokens")}
    for name, found in result["outcomes"].items():
        rows[f"  of {name}"] = {goal: found[goal]["sum"] for goal in GOALS}
    rows["all"] = {goal: parts[goal]["total"] for goal in GOALS}
    for name, row in rows.items():
        shown.add_row(name, *(figures[row[goal]].text(".3g", MILLI) for goal in GOALS))
    return shown


def _methods(result: Mapping[str, Any]) -> Table:
    """Every method's fresh part at the baseline's length: entropy, reward, and entropy kept per reward given up."""
    figures = result["figures"]
    shown = plain_table(
        f"Other methods on the same rollouts, without momentum, at the length of {result['about']['baseline']}’s step;"
        " in thousandths",
        *("=method", ">entropy", ">reward", "exchange rate", "against the baseline"),
    )
    for each in result["methods"]:
        step = each["steps"]["equal"]["this batch"]
        rate = "not resolved" if step["rate"] is None else figures[step["rate"]].text(".3g")
        shown.add_row(
            each["name"],
            *(figures[step[goal]].text(".3g", MILLI) for goal in GOALS),
            "" if step["difference"] is None else rate,
            step["verdict"],
        )
    return shown
