"""Entropy by role: what training does to the entropy of each kind of token (an operand, an operator, the answer
...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencredit.report.curves import series
from tokencredit.report.section import Material, Section


def _from_runs(material: Material) -> dict[str, dict[str, Any]]:
    """role -> method -> one line per seed, as recorded; of several splits, the first one evaluated."""
    roles: dict[str, dict[str, Any]] = {}
    for run in material.runs:
        records = [record for record in run.evaluations() if record.get("entropy_by_role")]
        for record in (each for each in records if each.get("split") == records[0].get("split")):
            for role, value in record["entropy_by_role"].items():
                curve = roles.setdefault(role, {}).setdefault(run.info["method_name"], {"seeds": {}})
                line = curve["seeds"].setdefault(str(run.info["seed"]), {"step": [], "value": []})
                line["step"].append(record["step"])
                line["value"].append(value["value"] if isinstance(value, Mapping) else value)
    return roles


def build(material: Material) -> Section | None:
    """One small plot per role: the study's curves with intervals, else the recorded line of every run."""
    computed = material.curves.get("entropy_by_role")
    roles = computed or _from_runs(material)
    if not roles:
        return None
    panels = [
        {"title": role, "meaning": "", "unit": "nats", "series": series(material, curves)}
        for role, curves in roles.items()
    ]
    line = (
        "Line and band: the study’s estimate and interval."
        if computed
        else "One line per run, as recorded; no interval was computed."
    )
    body = (
        f'<p class="note">Mean entropy of the tokens of each role, in nats. {line} The plots share one vertical'
        " scale.</p>"
    )
    return Section("Entropy by role", body, {"panels": panels, "shared": True}, "curves.js")
