"""Sections of the preference study: the arms, their differences, and how the learning rates served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.report import figures as parts
from tokencredit.report.figures import shown
from tokencredit.report.section import Section, text


def sections(result: Mapping[str, Any], directory: Path) -> list[Section]:
    """What was bought and what it taught; which rate each arm took."""
    return [_arms(result), *([_rates(result)] if result["rates"] else [])]


def _arms(result: Mapping[str, Any]) -> Section:
    config, figures, base = result["config"], result["figures"], result["base"]
    facts = [
        ("Task", config["policy"]["task"]),
        ("Rollouts", f"{config['rollouts']:,} for every arm, those that measure and verify counted"),
        ("Training", f"{config['steps']} steps of {config['pairs']} pairs, {config['seeds']} seeds"),
        ("Held out", f"{result['prompts']} prompts × {config['samples']}"),
        ("Seed", result["seed"]),
    ]
    rows = [
        [
            "(untrained)",
            "",
            "",
            "",
            shown(figures[base["pass@1"]]),
            "",
            f"{base['entropy']:.3f}",
            f"{base['length']:.1f}",
        ]
    ]
    for arm in result["arms"]:
        own = {name: figures[key] for name, key in arm["figures"].items()}
        spent = sum(arm["spent"]) / len(arm["spent"])
        rows.append(
            [
                f"{text(arm['name'])}<br><small>{text(arm['what'])}</small>",
                f"{spent:,.0f}",
                f"{own['pairs'].value:,.0f}",
                f"{arm['rate']:g}",
                shown(own["pass@1"]),
                shown(own["gain"], ".3f", sign=True),
                shown(own["entropy"], ".3f"),
                shown(own["length"], ".1f"),
            ]
        )
    table = parts.table(
        "Arms", ("arm", "rollouts", "pairs", "rate", "pass@1", "over the untrained", "entropy", "length"), rows
    )
    apart = parts.table(
        "Differences",
        ("difference of pass@1", "", "verdict"),
        (
            [
                f"{text(each['arm'])} − {text(each['other'])}",
                shown(figures[each["difference"]], ".3f", sign=True),
                text(each["verdict"]),
            ]
            for each in result["contrasts"]
        ),
    )
    note = parts.note(
        "Intervals: 95 %, over seeds and prompts for pass@1 and its differences, over seeds for the rest. Verdicts hold"
        " after Holm’s adjustment over the differences shown."
    )
    body = parts.facts(facts) + parts.said(result) + table + apart + note + parts.command(result)
    return Section("Preference pairs at equal rollouts", body)


def _rates(result: Mapping[str, Any]) -> Section:
    figures, rates = result["figures"], result["config"]["rates"]
    rows = ([text(arm), *(shown(figures[name]) for name in names)] for arm, names in result["rates"].items())
    table = parts.table("Rates", ("arm", *(f"{rate:g}" for rate in rates)), rows)
    note = parts.note("pass@1 on validation prompts, one seed; 95 % intervals over prompts. Each arm took its best.")
    return Section("Learning rates", note + table)
