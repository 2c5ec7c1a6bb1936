"""What a comparison concludes of every method: better than the baseline, worse, or not resolved at this budget. Never a
ranking.

Units are the seeds that were run under both, on the same prompts; p-values are Holm's over all methods, measure by
measure: over the measures together there is no adjustment. Intervals are not adjusted at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokencredit.figure import number
from tokencredit.stats import OverSeedsAndPrompts, holm

LEVEL = 0.05
UNRESOLVED = "not resolved at this budget"
# measure -> (what it is, sign of better); the first two are learning speed
MEASURES = {
    "area": ("mean pass@1 over the budget", 1),
    "budget_to": ("budget to {reach} of the baseline's final pass@1", -1),
    "pass@1": ("pass@1 when the budget is spent", 1),
}


def verdicts(
    measures: Any, measured: Mapping[str, Mapping[str, Any]], seeds: Mapping[str, Sequence[int]], baseline: str
) -> list[dict[str, Any]]:
    """One entry per measure and method: {"measure", "method", "difference" (a figure), "p", "holm", "verdict",
    "seeds", "seen"}.

    measured   {method: {measure: Draws}}; a measure that is not defined here is left out
    seen       the size from which Holm's first step, α over the number of methods, finds a difference with this error
    """
    found = []
    for measure, (_, sign) in MEASURES.items():
        rows: list[dict[str, Any]] = []
        others = max(len(measured) - 1, 1)
        for method in measured:
            shared = [seed for seed in seeds[method] if seed in seeds[baseline]]
            if method == baseline or not shared or measure not in measured[baseline]:
                continue
            pair = [
                measured[name][measure].of([list(seeds[name]).index(seed) for seed in shared])
                for name in (method, baseline)
            ]
            difference = OverSeedsAndPrompts(pair[0].draws - pair[1].draws, pair[0].num_prompts)
            first = difference.estimate(1 - LEVEL / others)
            seen = (first.high - first.low) / 2
            row = {"measure": measure, "method": method, "seeds": shared, "seen": seen, "difference": difference}
            rows.append(row)
        apart: list[OverSeedsAndPrompts] = [row["difference"] for row in rows]
        p_values = [each.p_value() for each in apart]
        for row, each, p, adjusted in zip(rows, apart, p_values, holm(p_values)):
            estimate = each.estimate()
            name = f"difference/{measure}/{row['method']}"
            row |= {"p": p, "holm": float(adjusted)}
            row["difference"] = measures.enter(name, measure, estimate, row["seeds"], p=p, holm=float(adjusted))
            resolved = adjusted < LEVEL and len(row["seeds"]) > 1
            row["verdict"] = ("better" if estimate.value * sign > 0 else "worse") if resolved else UNRESOLVED
        found += rows
    return found


def findings(result: Mapping[str, Any], config: Any, baseline: str) -> list[str]:
    """In plain words: who is better and worse, what could not have been seen, and what to keep in mind."""
    said = []
    for measure, (what, _) in MEASURES.items():
        rows = [row for row in result["verdicts"] if row["measure"] == measure]
        if rows:
            said.append(
                _verdict_line(what.format(reach=percent(result["settings"]["reach"])), rows, baseline, result, config)
            )
    return said + _cautions(result, config, baseline)


def _verdict_line(what: str, rows: Sequence[Mapping], baseline: str, result: Mapping[str, Any], config: Any) -> str:
    named = {
        verdict: [row["method"] for row in rows if row["verdict"] == verdict]
        for verdict in ("better", "worse", UNRESOLVED)
    }
    parts = [
        f"{verdict} than {baseline}: {', '.join(named[verdict])}" for verdict in ("better", "worse") if named[verdict]
    ]
    if named[UNRESOLVED]:
        parts.append(f"{UNRESOLVED}: {', '.join(named[UNRESOLVED])}")
    sizes = [row["seen"] for row in rows if np.isfinite(row["seen"])]
    seen = (
        f" Of a median method, differences under about {number(float(np.median(sizes)))} cannot be seen: half of its"
        f" interval at the level that Holm's first step asks of {len(rows)} methods."
        if sizes
        else ""
    )
    return f"{what[0].upper()}{what[1:]}: {'; '.join(parts)}.{seen}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _cautions(result: Mapping[str, Any], config: Any, baseline: str) -> list[str]:
    methods = {each["name"]: each for each in result["methods"]}
    fewest = min(len(each["seeds"]) for each in methods.values())
    said = []
    if fewest < 2:
        said.append(
            "One seed: intervals are over prompts alone and say nothing of other runs of the same method, so no verdict"
            " is given. Two seeds are the least, three give usable intervals."
        )
    if len(config.rates) == 1:
        said.append(
            "The learning rate was not checked: a weighting of tokens changes the size of a step too, and a difference"
            " may come from that alone."
        )
    for end, advice in (("highest", "higher"), ("lowest", "lower")):
        if at := [name for name, each in methods.items() if each["edge"] == end]:
            said.append(
                f"The {end} learning rate that was checked served {', '.join(at)} best: a {advice} one may serve better"
                " (--rates)."
            )
    if collapsed := [
        f"{name} ({each['collapsed']} of {len(each['seeds'])})" for name, each in methods.items() if each["collapsed"]
    ]:
        said.append(
            f"Entropy fell under {percent(result['settings']['collapse'])} of the initial policy's in:"
            f" {', '.join(collapsed)}."
        )
    if result["target"]["reached_at_start"]:
        reach = percent(result["settings"]["reach"])
        said.append(
            f"{baseline} ends so near its start that the initial policy already has {reach} of its final pass@1: the"
            " budget to it says nothing and is left out."
        )
    if never := [
        f"{name} ({each['never']} of {len(each['seeds'])})" for name, each in methods.items() if each["never"]
    ]:
        said.append(f"Never at the target within the budget, counted as the whole budget: {', '.join(never)}.")
    return said
