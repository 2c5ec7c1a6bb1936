"""What the variance study found, in sentences made from its figures: differences that hold after Holm's adjustment over
the methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencredit.figure import Figure
from tokencredit.studies.variance.sampling import CHECKED, SCHEMES

ALPHA = 0.05
"""Of a family of all methods at one checkpoint, after Holm's adjustment."""


def findings(study: Mapping[str, Any], figures: Mapping[str, Figure], baseline: str) -> list[str]:
    """A few sentences per checkpoint; what is not resolved is said to be."""
    return [sentence for block in study["checkpoints"] for sentence in _of_checkpoint(block, figures, baseline)]


def _of_checkpoint(block: Mapping[str, Any], figures: Mapping[str, Figure], baseline: str) -> list[str]:
    label = block["label"]
    known = {
        name: {figure: figures[entry] for figure, entry in each["figures"].items()}
        for name, each in block["methods"].items()
    }
    lost = [name for name, each in block["methods"].items() if not each["resolved"]]
    said = []
    for what, measure in (
        (f"Less noise than {baseline}, bias apart", "ess_variance"),
        (f"Less error than {baseline} at the best length", "ess"),
        (f"More signal per credited token than {baseline}", "efficiency_ratio"),
    ):
        clear = [name for name, each in known.items() if each and each[measure].more.get("holm", 1) <= ALPHA]
        better = [name for name in clear if known[name][measure].value > 1]
        worse = [name for name in clear if name not in better]
        said.append(
            f"{label}: {what}: {_named(better, known, measure)}. The opposite: {_named(worse, known, measure)}."
        )
    turned = [name for name, each in known.items() if each and each["truth_angle"].more.get("holm", 1) <= ALPHA]
    said.append(f"{label}: Turned away from the true policy gradient: {_named(turned, known, 'truth_angle', ' °')}.")
    if lost:
        said.append(
            f"{label}: Not resolved with {block['num']['prompts']} prompts, the mean gradient may be 0:"
            f" {', '.join(lost)}."
        )
    return [*said, _sampling(block, figures)]


def _sampling(block: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """What every scheme adds at one fraction, and whether what was drawn agrees with the formula, to twice its 95 %
    interval.
    """
    place = block["sampling"]["fractions"].index(CHECKED)
    parts = [
        f"{scheme} {figures[block['sampling']['curves'][scheme]['added'][place]].text('.3g')}" for scheme in SCHEMES
    ]
    drawn = {scheme: figures[name] for scheme, name in block["sampling"]["drawn"].items()}
    off = [scheme for scheme, each in drawn.items() if abs(each.value - 1) > each.high - each.low]
    check = f"drawn, {', '.join(off)} differ from the formula" if off else "what was drawn agrees with the formula"
    return (
        f"{block['label']}: Keeping {CHECKED:.0%} of the tokens adds this share of the gradient's variance:"
        f" {'; '.join(parts)}; {check}."
    )


def _named(names: list[str], known: Mapping[str, Mapping[str, Figure]], measure: str, unit: str = "") -> str:
    order = sorted(names, key=lambda name: -known[name][measure].value)
    return ", ".join(f"{name} {known[name][measure].text('.3g')}{unit}" for name in order) or "none"
