"""What the variance study found, in sentences made from its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokencredit.studies.variance_sampling import CHECKED, SCHEMES


def findings(study: Mapping[str, Any], figures: Mapping[str, dict]) -> list[str]:
    """A few sentences per checkpoint; what is not resolved is said to be."""
    return [sentence for block in study["checkpoints"] for sentence in _of_checkpoint(block, figures, study["config"]["baseline"])]


def _of_checkpoint(block: Mapping[str, Any], figures: Mapping[str, dict], baseline: str) -> list[str]:
    label = block["label"]
    known = {name: {figure: figures[entry] for figure, entry in each["figures"].items()} for name, each in block["methods"].items()}
    lost = [name for name, each in block["methods"].items() if not each["resolved"]]
    said = []
    others = {name: each for name, each in known.items() if name not in lost and name != baseline}
    for what, measure in (("less noisy (bias apart)", "ess_variance"), ("worth more with its bias", "ess"),
                          ("more efficient per credited token", "efficiency_ratio")):  # fmt: skip
        better = [name for name, each in others.items() if each[measure]["low"] is not None and each[measure]["low"] > 1]
        worse = [name for name, each in others.items() if each[measure]["high"] is not None and each[measure]["high"] < 1]
        said.append(f"{label}: {what} than {baseline}: {_named(better, known, measure)}; less so: {_named(worse, known, measure)}.")
    angled = [name for name, each in known.items() if name not in lost and each["truth_cosine"]["high"] < 1]
    said.append(f"{label}: turned away from the true policy gradient: {_named(angled, known, 'truth_angle', '°')}.")
    if lost:
        said.append(f"{label}: not resolved at this size, the mean gradient may be 0: {', '.join(lost)}.")
    return [*said, _sampling(block, figures)]


def _sampling(block: Mapping[str, Any], figures: Mapping[str, dict]) -> str:
    """The cheapest fraction of the optimum and of uniform sampling, and whether what was drawn agrees with the formula."""
    place = block["sampling"]["fractions"].index(CHECKED)
    parts = [f"{scheme} {_shown(figures[block['sampling']['curves'][scheme]['added'][place]])}" for scheme in SCHEMES]
    off = [scheme for scheme, name in block["sampling"]["drawn"].items() if not figures[name]["low"] <= 1 <= figures[name]["high"]]
    check = f"drawn, {', '.join(off)} differ from the formula" if off else "what was drawn agrees with the formula for all of them"
    return f"{block['label']}: keeping {CHECKED:.0%} of the tokens adds this share of the gradient's variance: {'; '.join(parts)}; {check}."


def _named(names: list[str], known: Mapping[str, Mapping[str, dict]], measure: str, unit: str = "") -> str:
    order = sorted(names, key=lambda name: -known[name][measure]["value"])
    return ", ".join(f"{name} {_shown(known[name][measure], unit)}" for name in order) or "none"


def _shown(figure: Mapping[str, Any], unit: str = "") -> str:
    value, low, high = ("∞" if math.isinf(x) else f"{x:.3g}{unit}" for x in (figure["value"], figure["low"], figure["high"]))
    return f"{value} [{low}, {high}]"
