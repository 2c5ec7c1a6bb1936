"""What the study of predicted and true entropy change found, in sentences: nothing is claimed that its interval does
not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencredit.figure import Figure

Figures = Mapping[str, Figure]


def findings(result: Mapping[str, Any], figures: Figures) -> list[str]:
    return [
        *_prediction(figures),
        *_slope(figures),
        *_range(figures),
        *_baselines(result, figures),
        *_theory(result, figures),
        *_flags(result),
    ]


def _prediction(figures: Figures) -> list[str]:
    error, spread = (
        figures["relative_error_mean"],
        next(f for name, f in figures.items() if name.startswith("relative_error_spread_")),
    )
    size = next(name for name in figures if name.startswith("relative_error_spread_")).split("/")[0].rsplit("_", 1)[1]
    verdict = "no error is resolved" if not error.sign else "the prediction is off"
    return [
        (
            "The linear prediction against fresh samples of the moved policy: mean relative error"
            f" {error.text('+.3f')}; {verdict}. From {size} rollouts alone its spread is {spread.text('.2f')}."
        ),
        (
            "Of the step itself, not its odd half: linear"
            f" {figures['relative_error_mean/whole/linear'].text('+.3f')}, with the quadratic term"
            f" {figures['relative_error_mean/whole/quadratic'].text('+.3f')}."
        ),
        (
            f"Of what the batch adds to momentum and decay: {figures['relative_error_mean/batch'].text('+.3f')},"
            f" spread {figures[f'relative_error_spread_{size}/batch'].text('.2f')}."
        ),
    ]


def _slope(figures: Figures) -> list[str]:
    return [
        f"|ΔH| of the step grows with the learning rate to the power {figures['slope/independent/whole'].text('.4f')}"
        " on independent rollouts. Its odd half-difference, which no quadratic term can enter, has"
        f" {figures['slope'].text('.4f')} (R² at least {figures['r2'].value:.5f}), by fresh samples"
        f" {figures['slope/fresh'].text('.3f')} (R² at least {figures['r2/fresh'].value:.3f})."
    ]


def _range(figures: Figures) -> list[str]:
    double = figures.get("precision_floor/float64")
    return [
        f"Changes are resolved from a learning rate of {figures['precision_floor'].value:.1e} on in float32"
        + (f", {double.value:.1e} in float64" if double else "")
        + "; the quadratic term reaches half the linear one"
        f" at {figures['linear_range'].text('.1e')}."
    ]


def _baselines(result: Mapping[str, Any], figures: Figures) -> list[str]:
    rows = {row["name"]: row for row in result["baselines"]}
    plain = rows["none"]["error"]
    told = ", ".join(f"{name} {row['error'] / plain:.2f}" for name, row in rows.items() if name != "none")
    return [f"Standard error of the prediction, that without a baseline being 1: {told}."]


def _theory(result: Mapping[str, Any], figures: Figures) -> list[str]:
    said = []
    for row in result["theory"]:
        if row["part"] == "batch":
            said.append(
                f"−η Cov of the tabular theory ({row['theory']}), pooled over tokens: {row['predicted']:.2g} on"
                f" average where the batch’s own part makes {row['true']:.2g}; the units differ, the step is AdamW's."
                f" The sign is right for {row['same_sign']} of {row['of']} updates, which are of one checkpoint and"
                f" share it; over updates the two correlate by {figures[row['correlation']].text('.2f')}."
            )
    return said


def _flags(result: Mapping[str, Any]) -> list[str]:
    flagged = [(k, each["flags"]) for k, each in enumerate(result["updates"]) if each["flags"]]
    if not flagged:
        return []
    return [
        f"Flagged: {len(flagged)} of {len(result['updates'])} updates.",
        *(f"Update {k + 1}: {flag}." for k, flags in flagged for flag in flags),
    ]
