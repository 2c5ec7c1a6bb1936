"""Sections of the correlation study: what agrees with what, how far that is noise, and when entropy can be trusted.

Everything shown is a figure of the study's `result.json`; names of figures are resolved here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.report.effects import effects_section
from tokencredit.report.section import Section, compact, duration, number, scrolling, text
from tokencredit.runs import read_json

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


def sections(directory: str | Path) -> list[Section]:
    """All sections of the study in `directory`."""
    result = read_json(Path(directory) / "result.json")
    return [
        _about(result),
        *_tables(result),
        _forest(result),
        _splits(result),
        _scatter(result),
        _budget(result),
        _conditions(result),
        effects_section(result["view"], result["config"]["threshold"]),
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
    listed = "".join(f'<div class="fact"><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in facts)
    law = ""
    if result["law"]:
        shown = {name: _figure(result, figure) for name, figure in result["law"].items()}
        law = (
            "<p>Check of the whole pipeline: on-policy the squared increments of V add up to V₀(1 − V₀) on average."
            f" Measured here: {shown['sum_of_squares']} and {shown['success_variance']}, difference"
            f" {shown['difference']}.</p>"
        )
    said = "".join(f"<li>{text(finding)}</li>" for finding in result.get("findings", []))
    intervals = '<p class="note">Intervals: 95 %, by resampling prompts.</p>'
    return Section(
        "Which proxy knows what matters",
        f'<dl class="facts">{listed}</dl><ul>{said}</ul>{law}{intervals}<p><code>{text(result["command"])}</code></p>',
    )


def _figure(result: Mapping[str, Any], name: str | None) -> str:
    if name is None:
        return "–"
    figure = result["figures"][name]
    ends = (
        ""
        if figure["low"] is None
        else f' <span class="ends">[{number(figure["low"], 2)}, {number(figure["high"], 2)}]</span>'
    )
    return f"{number(figure['value'], 2)}{ends}"


def _tested(result: Mapping[str, Any], name: str) -> str:
    return f"{_figure(result, name)} (permutation p {number(result['figures'][name]['p'], 2)})"


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
        head = "".join(f'<th title="{text(why)}">{text(name)}</th>' for name, why in heads)
        best = source["measures"]["captured"]
        order = sorted(best, key=lambda p: (p.startswith("("), -(result["figures"][best[p]]["value"] or 0)))
        rows = []
        for proxy in order:
            names = [source["measures"][name].get(proxy) for name in columns]
            names += [sampled["measures"]["spearman"].get(proxy), sampled["noise_only"].get(proxy)]
            cells = "".join(f"<td>{_figure(result, name)}</td>" for name in names)
            rows.append(f'<tr><th scope="row">{text(proxy)}</th>{cells}</tr>')
        verdict = (
            ""
            if sampled["resolved"]
            else f'<p class="notice">From rollouts: {text(sampled["verdict"])}; nothing was corrected.</p>'
        )
        kind = "exact, from prefix trees" if exact else "from rollouts"
        table = f"<table><thead><tr><th>proxy</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        note = f'<p class="note">{text(meaning)}. Figures {kind}; the last two columns from rollouts.</p>{verdict}'
        scrolled = scrolling(f"Proxies against {estimand}", table)
        body.append(f"<h3>{text(estimand)}</h3>{note}{scrolled}{_beside(result, sampled)}")
    return [Section("Proxies against effects", "".join(body))]


def _beside(result: Mapping[str, Any], sampled: Mapping[str, Any]) -> str:
    parts = [f"{kind} reliability {_figure(result, name)}" for kind, name in sampled["reliability"].items()]
    if sampled["ceiling"]:
        parts.append(f"a perfect proxy’s naive Spearman at this budget {_figure(result, sampled['ceiling'])}")
    return f'<p class="note">{"; ".join(parts)}.</p>'


def _points(result: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {
        proxy: {key: result["figures"][name][key] for key in ("value", "low", "high")} for proxy, name in names.items()
    }


def _forest(result: Mapping[str, Any]) -> Section:
    """Value and interval of every proxy, by estimand and measure; from rollouts and exact one above the other."""
    labels, meanings = ({name: pair[place] for name, pair in MEASURES.items()} for place in (0, 1))
    data: dict[str, Any] = {"measures": labels, "meanings": meanings, "estimands": ESTIMANDS, "figures": {}}
    for estimand in ESTIMANDS:
        for source in ("exact", "sampled"):
            for measure, names in result[source].get(estimand, {}).get("measures", {}).items():
                if measure in MEASURES:
                    data["figures"].setdefault(estimand, {}).setdefault(measure, {})[source] = _points(result, names)
        null = result["sampled"][estimand]["noise_only"]
        data["figures"][estimand]["spearman"]["noise alone"] = _points(result, null)
    note = (
        '<p class="note">Dot and bar: value and 95 % interval. Grey: what noise alone gives, where the measure can be'
        " fooled by it.</p>"
    )
    return Section("Correlations", note, compact(data), "forest.js", ("plot.js", "axes.js"))


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
            shown = "".join(f"<td>{_figure(result, cell)}</td>" for cell in cells)
            rows.append(
                "<tr><th"
                f' scope="row">{text(group)}</th><td>{found["tokens"]}</td><td>{found["prompts"]}</td>{shown}</tr>'
            )
        head = "".join(f"<th>{text(name)}</th>" for name in ("tokens of", *heads))
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        body.append(
            f"<details><summary>{text(estimand)}</summary>{scrolling(f'Groups of tokens, {estimand}', table)}</details>"
        )
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
    return Section(
        "Tokens one by one", note, compact(result["scatter"]), "scatter.js", ("plot.js", "shade.js", "axes.js")
    )


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
                "limit": result["figures"][sampled["limit"][proxy]]["value"],
                "exact": result["figures"][exact[proxy]]["value"] if proxy in exact else None,
            }
            for proxy, points in curve["points"].items()
        }
    note = (
        '<p class="note">Naive Spearman when the rollouts are thinned, with the fit ρ(n) = ρ∞ / √(1 + c / n) and,'
        " dashed, the exact value where it is known. A limit that misses the dashed line shows noise that no such"
        " budget removes.</p>"
    )
    return Section("What more rollouts would do", note, compact(data), "budget.js", ("plot.js", "axes.js"))


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
    head = "".join(
        f"<th>{text(name)}</th>" for name in ("condition", "prompts", *columns.values(), "error if calibrated")
    )
    rows = []
    for row in block["rows"]:
        cells = "".join(f"<td>{_figure(result, row['figures'][name])}</td>" for name in columns)
        cells = f"<td>{row['prompts']}</td>{cells}<td>{number(row['expected_ece'], 2)}</td>"
        rows.append(f'<tr><th scope="row">{text(row["label"])}</th>{cells}</tr>')
    table = scrolling("Conditions", f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")
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
        {"label": row["label"], "kind": row["kind"], "figures": _points(result, row["figures"])}
        for row in block["rows"]
    ]
    data = compact({"rows": points, "names": columns})
    return Section("When is entropy a good proxy?", body, data, "conditions.js", ("plot.js", "axes.js"))


def write(directory: Path, out: Path, title: str = "Which tokens matter") -> Path:
    """The study's own page."""
    from tokencredit import report

    return report.write([], out, {}, title=title, extra=sections(directory))
