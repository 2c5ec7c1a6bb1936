"""The claims made for entropy-shaped credit, each put to the runs: does it show here?

Units are seeds that were run under both methods; a claim "shows here" when its paired difference is positive at 5 %
after Holm's correction for all the claims put, "does not show here" when it is negative, and is "not resolved"
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from tokencredit.stats import holm, paired_difference

CLAIMS = (
    ("entropy", "{a} keeps more entropy than {b} (the papers' entropy rebound)"),
    ("length", "{a} writes longer completions than {b}"),
    ("pass@k", "{a} has the higher ceiling: more prompts solved within {k} samples than {b}"),
    ("pass@1", "{a} ends with the higher pass@1 than {b}"),
)

CHANGES = (("pass@1", ("{} learns: pass@1 rises", 1)), ("entropy", ("entropy falls under {}", -1)))
"""measure, (what is said of a method, the sign of the change that bears it out)"""

Curves = Mapping[str, Mapping[str, Mapping[str, Any]]]


def findings(
    curves: Curves, treatment: str, baselines: Sequence[str], differing: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Each claim against each baseline, at the last step that both have reached, as {"claim", "verdict", "detail",
    "difference" {value, low, high}, "p"}, p adjusted.

    curves     {measure: {method: {"seeds": {seed: {"step", "value"}}}}}
    differing  {method: {setting: value}} where the methods' settings differ besides the method: said in the detail
    """
    largest = max((int(m[5:]) for m in curves if m.startswith("pass@")), default=1)
    put = []
    for baseline in baselines:
        for name, claim in CLAIMS:
            measure = name.replace("pass@k", f"pass@{largest}")
            if measure == "pass@1" and name == "pass@k":
                continue
            step, pairs = _pairs(curves.get(measure, {}), treatment, baseline)
            if pairs:
                note = _note(differing or {}, treatment, baseline)
                put.append((claim.format(a=treatment, b=baseline, k=largest), measure, step, pairs, note))
    p_values = [_p_value(pairs) for _, _, _, pairs, _ in put]
    return [
        {"claim": claim, **_verdict(measure, step, pairs, p, len(put), note)}
        for (claim, measure, step, pairs, note), p in zip(put, holm(p_values))
    ]


def learned(curves: Curves) -> list[dict[str, Any]]:
    """What training did under each method, from its first evaluation to its last, as `findings` are: pass@1 rises, and
    entropy falls. With several seeds by their paired differences, p after Holm's correction for all of these; with one,
    where the two intervals over prompts do not meet.
    """
    put = [
        (measure, method, line, claim) for measure, claim in CHANGES for method, line in curves.get(measure, {}).items()
    ]
    put = [each for each in put if len(each[2]["step"]) > 1]
    pairs = [_ends(line) for _, _, line, _ in put]
    p_values = holm([_p_value(some) for some in pairs])
    return [_change(*each, some, p, len(put)) for each, some, p in zip(put, pairs, p_values)]


def _ends(line: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(last, first) of every seed, at the steps that all seeds have reached."""
    first, last = line["step"][0], line["step"][-1]
    values = [dict(zip(seed["step"], seed["value"])) for seed in line["seeds"].values()]
    return [(value[last], value[first]) for value in values]


def _change(
    measure: str,
    method: str,
    line: Mapping[str, Any],
    claim: tuple[str, int],
    pairs: Sequence[tuple[float, float]],
    p: float,
    num: int,
) -> dict[str, Any]:
    """The finding of one method and measure; `claim` is what is said, and which sign bears it out."""
    said, sign = claim
    ends = [{name: line[name][at] for name in ("value", "low", "high")} for at in (0, -1)]
    difference = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
    apart = p < 0.05 if len(pairs) > 1 else ends[0]["high"] < ends[1]["low"] or ends[1]["high"] < ends[0]["low"]
    verdict = "not resolved" if not apart else "shows here" if difference.value * sign > 0 else "does not show here"
    over = (
        f"{len(pairs)} seeds; p = {p:.2g}, Holm's over {num} claims"
        if len(pairs) > 1
        else "one seed, intervals over prompts"
    )
    told = " to ".join(f"{end['value']:.3f} [{end['low']:.3f}, {end['high']:.3f}]" for end in ends)
    return {
        "verdict": verdict,
        "claim": said.format(method),
        "detail": f"{measure} from step {line['step'][0]} to {line['step'][-1]}: {told}, {over}",
        "difference": {"value": difference.value, "low": difference.low, "high": difference.high},
        "p": p,
    }


def _pairs(
    lines: Mapping[str, Mapping[str, Any]], treatment: str, baseline: str
) -> tuple[int, list[tuple[float, float]]]:
    """The last step that all shared seeds of both have reached, and (treated, untreated) of each seed there."""
    if treatment not in lines or baseline not in lines:
        return 0, []
    both = [
        {seed: dict(zip(line["step"], line["value"])) for seed, line in lines[name]["seeds"].items()}
        for name in (treatment, baseline)
    ]
    seeds = sorted(both[0].keys() & both[1].keys())
    steps = set.intersection(*(set(line[seed]) for line in both for seed in seeds)) if seeds else set()
    if not steps:
        return 0, []
    step = max(steps)
    return step, [(both[0][seed][step], both[1][seed][step]) for seed in seeds]


def _p_value(pairs: Sequence[tuple[float, float]]) -> float:
    """Two-sided, Student's t over seeds; 1 where nothing can be said."""
    differences = np.array([a - b for a, b in pairs])
    if len(differences) < 2:
        return 1.0
    spread = differences.std(ddof=1) / np.sqrt(len(differences))
    if spread == 0:
        return float(differences.mean() == 0)
    return float(2 * stats.t.sf(abs(differences.mean()) / spread, len(differences) - 1))


def _note(differing: Mapping[str, Mapping[str, Any]], treatment: str, baseline: str) -> str:
    a, b = differing.get(treatment, {}), differing.get(baseline, {})
    told = [f"{key} {a[key]} against {b.get(key)}" for key in a if a[key] != b.get(key)]
    return f"; the runs also differ in {', '.join(told)}" if told else ""


def _verdict(
    measure: str, step: int, pairs: Sequence[tuple[float, float]], p: float, num: int, note: str
) -> dict[str, Any]:
    difference = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
    verdict = "not resolved" if p >= 0.05 else "shows here" if difference.value > 0 else "does not show here"
    if len(pairs) > 1:
        found = (
            f"95 % interval [{difference.low:+.3f}, {difference.high:+.3f}], {len(pairs)} seeds; p = {p:.2g}, Holm's"
            f" over {num} claims"
        )
    else:
        found = "one seed, so no interval"
    return {
        "verdict": verdict,
        "detail": f"{measure} at step {step}, paired by seed: {difference.value:+.3f}, {found}{note}",
        "difference": {"value": difference.value, "low": difference.low, "high": difference.high},
        "p": p,
    }
