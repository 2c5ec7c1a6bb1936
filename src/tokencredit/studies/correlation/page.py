"""Sections of the correlation study: what agrees with what, how far that is noise, and when entropy can be trusted.

Everything shown is a figure of the study's `result.json`; names of figures are resolved here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.figure import number
from tokencredit.report import figures as parts
from tokencredit.report.effects import effects_section
from tokencredit.report.section import Section, compact, duration, text

ESTIMANDS = {
    "before_after": "V after the token minus V before it: what credit should be",
    "spread": "standard deviation of V over the next token: how much the position decides",
    "replace": "V after the token minus V with another token in its place",
}
MEASURES = {
    "spearman": ("Spearman with the size", "naive: the rollouts’ noise is in it"),
    "corrected_ranks": ("corrected", "squared effect with the proxy’s ranks, without the rollouts’ noise"),
    "corrected": ("corrected, values", "squared effect with the proxy’s values, without the rollouts’ noise"),
    "captured": ("captured by the top 20 %", "share of the squared effects in the tokens that the proxy puts on top"),
    "spearman_within": ("within prompts", "Spearman, ranks taken inside each prompt"),
    "kendall": ("Kendall’s τ-b", "pairs that agree, less pairs that do not"),
    "partial": ("partial", "Spearman given position, log-probability and V(1 − V)"),
    "auroc": ("AUROC", "a pivotal token is above another one; labels are soft from rollouts, confirmed from trees"),
    "average_precision": ("average precision", "for the same labels"),
    "precision_few": ("precision, top 5 %", "share of pivotal tokens among them"),
    "precision_top": ("precision, top 20 %", "share of pivotal tokens among them"),
}
SPLIT_PROXIES = ("entropy", "surprisal", "gradient_norm", "perturbation_variance")
TABLE = (
    "captured",
    "corrected_ranks",
    "spearman",
    "spearman_within",
    "partial",
    "auroc",
    "average_precision",
    "precision_few",
)


def sections(result: Mapping[str, Any], directory: Path) -> list[Section]:
    """All sections of the study."""
    return [
        effects_section(result["view"], result["config"]["threshold"]),
        _about(result),
        *_tables(result),
        _forest(result),
        _splits(result),
        _scatter(result),
        _budget(result),
        _conditions(result),
    ]


def _about(result: Mapping[str, Any]) -> Section:
    num, config, cost = result["num"], result["config"], result["cost"]
    policy = config["policy"]
    facts = [
        ("Model and task", f"{policy['model']} on {policy['task']}, temperature {policy['temperature']:g}"),
        ("Tokens", f"{num['tokens']}, of {num['completions']} completions ({num['correct']} correct)"),
        ("Prompts", f"{num['prompts']}, held out"),
        ("Rollouts", f"{config['rollouts']} per token; {cost['rollouts']:,} rollouts, {cost['tokens']:,} tokens"),
        ("Time", duration(sum(cost["seconds"].values())) + " for sampling, proxies and trees"),
        ("Seed", config["seed"]),
    ]
    law = ""
    if result["law"]:
        shown = {name: _figure(result, figure) for name, figure in result["law"].items()}
        law = (
            "<p>Check of the whole pipeline: on-policy the squared increments of V add up to V₀(1 − V₀) on average."
            f" Measured here: {shown['sum_of_squares']} and {shown['success_variance']}, difference"
            f" {shown['difference']}.</p>"
        )
    note = parts.note("Intervals: 95 %, by resampling prompts.")
    body = parts.facts(facts) + parts.said(result) + law + note + parts.command(result)
    return Section("Which proxy knows what matters", body)


def _figure(result: Mapping[str, Any], name: str | None) -> str:
    return parts.shown(result["figures"].get(name), ".2f")


def _tested(result: Mapping[str, Any], name: str) -> str:
    return f"{_figure(result, name)} (permutation p {number(result['figures'][name].more['p'], '.2f')})"


def _tables(result: Mapping[str, Any]) -> list[Section]:
    """One section with a table per estimand: exact figures where there are any, else those from rollouts, and the
    controls beside them.
    """
    body = []
    for estimand, meaning in ESTIMANDS.items():
        sampled, exact = result["sampled"][estimand], result["exact"].get(estimand)
        source = exact or sampled
        columns = [name for name in TABLE if name in source["measures"]]
        heads = [(MEASURES[name][0], MEASURES[name][1]) for name in columns]
        heads += [
            ("naive, from rollouts", "Spearman with the estimated size"),
            ("noise alone", "the same where no token has an effect"),
        ]
        best = source["measures"]["captured"]
        order = sorted(best, key=lambda p: (p.startswith("("), -_number(result, best[p])))
        rows = []
        for proxy in order:
            names = [source["measures"][name].get(proxy) for name in columns]
            names += [sampled["measures"]["spearman"].get(proxy), sampled["noise_only"].get(proxy)]
            rows.append([text(proxy), *(_figure(result, name) for name in names)])
        verdict = (
            ""
            if sampled["resolved"]
            else f'<p class="notice">From rollouts: {text(sampled["verdict"])}; nothing was corrected.</p>'
        )
        kind = "exact, from prefix trees" if exact else "from rollouts"
        note = f'<p class="note">{text(meaning)}. Figures {kind}; the last two columns from rollouts.</p>{verdict}'
        table = parts.table(f"Proxies against {estimand}", ("proxy", *heads), rows)
        body.append(f"<h3>{text(estimand)}</h3>{note}{table}{_beside(result, sampled)}")
    return [Section("Proxies against effects", "".join(body))]


def _beside(result: Mapping[str, Any], sampled: Mapping[str, Any]) -> str:
    said = [f"{kind} reliability {_figure(result, name)}" for kind, name in sampled["reliability"].items()]
    if sampled["ceiling"]:
        said.append(f"a perfect proxy’s naive Spearman at this budget {_figure(result, sampled['ceiling'])}")
    return parts.note(f"{'; '.join(said)}.")


def _number(result: Mapping[str, Any], name: str) -> float:
    """A figure's value to sort by; 0 where it is not defined."""
    value = result["figures"][name].value
    return 0.0 if math.isnan(value) else value


def _forest(result: Mapping[str, Any]) -> Section:
    """Value and interval of every proxy, by estimand and measure; from rollouts and exact one above the other."""
    labels, meanings = ({name: pair[place] for name, pair in MEASURES.items()} for place in (0, 1))
    data: dict[str, Any] = {"measures": labels, "meanings": meanings, "estimands": ESTIMANDS, "figures": {}}
    for estimand in ESTIMANDS:
        for source in ("exact", "sampled"):
            for measure, names in result[source].get(estimand, {}).get("measures", {}).items():
                if measure in MEASURES:
                    data["figures"].setdefault(estimand, {}).setdefault(measure, {})[source] = parts.points(
                        result["figures"], names
                    )
        null = result["sampled"][estimand]["noise_only"]
        data["figures"][estimand]["spearman"]["noise alone"] = parts.points(result["figures"], null)
    note = (
        '<p class="note">Dot and bar: value and 95 % interval. Grey: what noise alone gives, where the measure can be'
        " fooled by it.</p>"
    )
    return Section("Correlations", note, compact(data), "forest.js")


def _splits(result: Mapping[str, Any]) -> Section:
    """Spearman and captured share of a few proxies, group by group of tokens."""
    body = []
    for estimand in ESTIMANDS:
        groups = result["splits"].get(estimand, {})
        names = [name for name in SPLIT_PROXIES if any(name in group.get("spearman", {}) for group in groups.values())]
        heads = ("tokens", "prompts", *(f"{name}: {what}" for name in names for what in ("Spearman", "captured")))
        rows = []
        for group, found in groups.items():
            cells = [found.get(what, {}).get(name) for name in names for what in ("spearman", "captured")]
            shown = (_figure(result, cell) for cell in cells)
            rows.append([text(group), str(found["tokens"]), str(found["prompts"]), *shown])
        table = parts.table(f"Groups of tokens, {estimand}", ("tokens of", *heads), rows)
        body.append(f"<details><summary>{text(estimand)}</summary>{table}</details>")
    note = (
        '<p class="note">Within groups of tokens: by outcome, position and role. A dash: too few tokens or prompts for'
        " an interval.</p>"
    )
    return Section("Where it holds", note + "".join(body))


def _scatter(result: Mapping[str, Any]) -> Section:
    note = (
        '<p class="note">One point per token, a few hundred drawn at random; the proxy by its rank. Point at one to'
        " read it.</p>"
    )
    return Section("Tokens one by one", note, compact(result["scatter"]), "scatter.js")


def _budget(result: Mapping[str, Any]) -> Section:
    data: dict[str, Any] = {}
    for estimand in ESTIMANDS:
        sampled, exact = (
            result["sampled"][estimand],
            result["exact"].get(estimand, {}).get("measures", {}).get("spearman", {}),
        )
        curve = sampled["curve"]
        data[estimand] = {
            proxy: {
                "rollouts": curve["rollouts"],
                "points": points,
                "constant": curve["constant"][proxy],
                "limit": result["figures"][sampled["limit"][proxy]].value,
                "exact": result["figures"][exact[proxy]].value if proxy in exact else None,
            }
            for proxy, points in curve["points"].items()
        }
    note = (
        '<p class="note">Naive Spearman when the rollouts are thinned, with the fit ρ(n) = ρ∞ / √(1 + c / n) and,'
        " dashed, the exact value where it is known. A limit that misses the dashed line shows noise that no such"
        " budget removes.</p>"
    )
    return Section("What more rollouts would do", note, compact(data), "budget.js")


def _conditions(result: Mapping[str, Any]) -> Section:
    block = result["conditions"]
    columns = {
        "success": "success",
        "ece": "calibration error",
        "overconfidence": "overconfidence",
        "entropy": "mean entropy",
        "spearman": "entropy, Spearman",
        "spearman_within": "within prompts",
        "captured": "captured by top entropy",
        "captured_spread": "captured, spread",
    }
    rows = [
        [
            text(row["label"]),
            str(row["prompts"]),
            *(_figure(result, row["figures"][name]) for name in columns),
            number(row["expected_ece"], ".2f"),
        ]
        for row in block["rows"]
    ]
    heads = ("condition", "prompts", *columns.values(), "error if calibrated")
    table = parts.table("Conditions", heads, rows)
    tests = "".join(
        f"<li>{text(name)} ({test['conditions']}): {_tested(result, test['captured'])} with the captured share, "
        f"{_tested(result, test['spearman'])} with Spearman</li>"
        for name, test in block["hypothesis"].items()
    )
    body = (
        "<p>Hypothesis: entropy is a good proxy when the model is calibrated. It predicts a negative correlation, over"
        " conditions, of the calibration error with the agreement of entropy and before_after."
        f' Found:</p><ul>{tests}</ul><p class="note">The conditions share prompts and policies; the intervals say what'
        " other prompts would have given.</p>" + table
    )
    points = [
        {"label": row["label"], "kind": row["kind"], "figures": parts.points(result["figures"], row["figures"])}
        for row in block["rows"]
    ]
    data = compact({"rows": points, "names": columns})
    return Section("When is entropy a good proxy?", body, data, "conditions.js")
