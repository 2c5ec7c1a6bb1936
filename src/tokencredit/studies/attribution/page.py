"""Sections of an attribution: who makes the next step's change of entropy and reward, other methods on the same
rollouts, single tokens.

Everything shown is a figure of the study's `result.json`; changes are written in thousandths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokencredit.figure import number
from tokencredit.report import figures as parts
from tokencredit.report import tokens
from tokencredit.report.section import Material, Section, compact, text
from tokencredit.runs import Run

MILLI = 1000
GOALS = {"entropy": "entropy (10⁻³ nats)", "reward": "reward (10⁻³)"}
STEP_NAMES = {"equal": "rollouts, equal length", "fresh": "rollouts", "whole": "whole step"}
MEANINGS = {
    "equal": "What these rollouts add, at the baseline’s length of step",
    "fresh": "What these rollouts add to the step",
    "whole": "The whole step, momentum included",
}
OVER = {"this batch": "this batch", "any batch": "any batch"}


def sections(result: Mapping[str, Any], directory: Path) -> list[Section]:
    """All sections of the attribution."""
    built = [
        _tokens(directory),
        _about(result),
        _sequences(result),
        _roles(result),
        _diagnostics(result),
        _plane(result),
        _methods(result),
        _without(result),
        _pivotal(result),
    ]
    return [section for section in built if section]


def _tokens(directory: Path) -> Section | None:
    """The token view, coloured by what each token adds to the change of entropy."""
    built = tokens.build(Material([Run.open(directory)]))
    return built and replace(built, data={**built.data, "score": "change of entropy"})


def _figure(result: Mapping[str, Any], name: str | None, scale: float = 1, form: str = ".2f") -> str:
    """Value and interval as HTML; a dash for what is not defined."""
    return parts.shown(result["figures"].get(name), form, scale)


def _point(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    return parts.point(result["figures"][name], MILLI)


def _p(value: float | None) -> str:
    return f' <span class="ends">p {number(value, ".3f")}</span>'


def _about(result: Mapping[str, Any]) -> Section:
    about, config = result["about"], result["config"]
    facts = [
        ("Checkpoint", f"{about['checkpoint']}, step {about['step']}"),
        ("Method", about["method"]),
        (
            "Task",
            f"{about['task']}, temperature {about['temperature']:g}; {about['success']:.0%} of the rollouts succeed",
        ),
        (
            "The step’s rollouts",
            (
                f"{about['drawn']} drawn from {about['prompts']} prompts, {about['rollouts']} kept; "
                f"{about['credited']:,} of {about['tokens']:,} tokens have a gradient"
            ),
        ),
        ("Estimated on other rollouts", "; ".join(f"{goal}: {config[goal][0]} × {config[goal][1]}" for goal in GOALS)),
        ("Step", f"learning rate {about['lr']:g}, gradient clipped to {about['clip']:.2f} of itself"),
        ("Seed", result["seed"]),
    ]
    names = {part: {goal: result["parts"][goal][part] for goal in GOALS} for part in ("momentum", "decay", "tokens")}
    names |= {
        f"… of {name}": {goal: found[goal]["sum"] for goal in GOALS} for name, found in result["outcomes"].items()
    }
    names["the whole step"] = {goal: result["parts"][goal]["total"] for goal in GOALS}
    rows = [[text(part), *(_figure(result, some[goal], MILLI) for goal in GOALS)] for part, some in names.items()]
    table = parts.table("Parts of the change", ("made by", *GOALS.values()), rows)
    note = (
        '<p class="note">First-order changes, split exactly: the parts add up. Intervals: 95 %, over the prompts that'
        " the gradients of entropy and reward are estimated on; of successes and failures, over the step’s prompts, as"
        " if it were made of other rollouts.</p>"
    )
    body = parts.facts(facts) + parts.said(result) + table + note + parts.command(result)
    return Section("Who makes the next step’s change", body)


def _sequences(result: Mapping[str, Any]) -> Section:
    found = result["sequences"]
    data = {
        "x": [MILLI * x for x in found["entropy"]],
        "y": [MILLI * x for x in found["reward"]],
        **{name: found[name] for name in ("success", "prompt", "length")},
    }
    note = (
        '<p class="note">Every rollout that has a gradient: what it adds to the change of entropy and of reward. Their'
        " sums are the row <em>tokens</em> above.</p>"
    )
    return Section("Rollouts", note, compact(data), "contributions.js")


def _roles(result: Mapping[str, Any]) -> Section | None:
    if not result["roles"]:
        return None
    bars = {
        GOALS[goal]: [
            {"name": f"{role} ({found[goal]['tokens']})", **_point(result, found[goal]["sum"])}
            for role, found in result["roles"].items()
        ]
        for goal in GOALS
    }
    note = (
        '<p class="note">Sums over the tokens of each role (how many), with 95 % intervals over the step’s prompts.</p>'
    )
    return Section("By role", note, compact({"bars": bars}), "bars.js")


def _diagnostics(result: Mapping[str, Any]) -> Section:
    """Rank correlations between tokens and between rollouts; then covariance, group by group."""
    body = []
    for level, targets in result["diagnostics"].items():
        names = list(next(iter(targets.values())))
        rows = []
        for name in names:
            cells = []
            for found in targets.values():
                holm = result["figures"][found[name]].more["holm"]
                cells.append(_figure(result, found[name]) + ("" if holm is None else _p(holm)))
            rows.append([text(name), *cells])
        title = (
            "Between tokens" if level == "tokens" else "Between rollouts: sums of contributions, means of diagnostics"
        )
        body.append(f"<h3>{title}</h3>{parts.table(title, ('diagnostic', *targets), rows)}")
    groups, signs = result["covariance"]["groups"], result["covariance"]["signs"]
    rows = [
        [text(name), str(each["tokens"]), _figure(result, each["sum"], MILLI), _figure(result, each["negative"])]
        for name, each in groups.items()
    ]
    heads = ("tokens by covariance", "tokens", "add to entropy (10⁻³ nats)", "share of them that lowers it")
    body.append(f"<h3>Do tokens of high covariance lower entropy?</h3>{parts.table('Covariance', heads, rows)}")
    rows = [
        [text(name), _figure(result, each["tokens"]), _figure(result, each["weighted"])] for name, each in signs.items()
    ]
    body.append(parts.table("Signs", ("sign predicted by", "right, of tokens", "right, weighted by size"), rows))
    note = (
        '<p class="note">Spearman’s rank correlation of each diagnostic with what tokens add to the change, and with'
        " its size (there the diagnostic’s size too); 95 % over the step’s prompts; p after Holm over the diagnostics"
        " of a column. Tokens without a gradient are left out. <em>tabular</em>: what a token’s own gradient does to"
        " its own distribution’s entropy.</p>"
    )
    return Section("Which diagnostic predicts it", note + "".join(body))


def _plane(result: Mapping[str, Any]) -> Section:
    def points(found: Mapping[str, Any]) -> dict[str, Any]:
        """Changes, and changes less the baseline's, whose interval is that of the paired difference."""
        gap = found["difference"] or {}
        return {
            goal: {
                "changes": _point(result, found[goal]),
                "gaps": _point(result, gap[goal]) if gap else dict.fromkeys(("value", "low", "high"), 0.0),
            }
            for goal in GOALS
        }

    methods = [
        {
            "name": each["name"],
            "steps": {
                step: {over: points(found) for over, found in each["steps"][step].items()} for step in STEP_NAMES
            },
        }
        for each in result["methods"]
    ]
    note = (
        '<p class="note">What the step of each method would do from the same rollouts and optimizer state: what the'
        " rollouts add, at "
        "equal length or as it is, or the whole step with its momentum. Bars: 95 %, for this batch (the gradients of"
        " entropy and "
        "reward are uncertain) or any batch (the step’s rollouts are too); of differences, paired. Arrows from "
        f"{text(result['about']['baseline'])}.</p>"
    )
    shown = {"gaps": f"less {result['about']['baseline']}", "changes": "changes"}
    data = {"methods": methods, "shown": shown, "steps": STEP_NAMES, "over": OVER}
    return Section("Other methods on the same rollouts", note, compact(data), "methods_plane.js")


def _methods(result: Mapping[str, Any]) -> Section:
    body = []
    for step, meaning in MEANINGS.items():
        rows = []
        for each in result["methods"]:
            here, anywhere = (each["steps"][step][over] for over in OVER)
            rows.append(
                [
                    text(each["name"]),
                    *(_figure(result, here[goal], MILLI) for goal in GOALS),
                    _figure(result, here["slope"]) if here["slope"] else "not resolved",
                    (
                        "–"
                        if here["difference"] is None
                        else _figure(result, here["rate"])
                        if here["rate"]
                        else "not resolved"
                    ),
                    text(here["verdict"]),
                    text(anywhere["verdict"]),
                ]
            )
        heads = ("method", *GOALS.values(), "entropy per reward", "exchange rate", "this batch", "any batch")
        is_open = " open" if step == "equal" else ""
        body.append(
            f"<details{is_open}><summary>{text(meaning)}</summary>{parts.table(meaning, heads, rows)}</details>"
        )
    rows = [
        [
            text(each["name"]),
            text(each["rollouts"]),
            number(each["length"], ".3f"),
            number(each["clip"], ".3f"),
            *(
                text(", ".join(part for part, does in each["acting"].items() if does is acts) or "–")
                for acts in (True, False)
            ),
            text(f"{each['twin'][0]} × {each['twin'][1]:.3g}") if each["twin"] else "–",
            text(each["summary"]),
        ]
        for each in result["methods"]
    ]
    heads = (
        "method",
        "rollouts",
        "length of its part",
        "clipping",
        "acts here",
        "has no effect here",
        "same coefficients as",
        "what it changes",
    )
    note = (
        '<p class="note">Exchange rate: entropy kept per reward given up against the baseline, in nats per token and'
        " unit of reward (and entropy spent per reward gained, where that is what happens); below zero, one of the two"
        " has more of both. Fieller’s intervals; <em>not resolved</em> where the reward’s change or difference may be"
        " zero. A part has no effect where, with the baseline’s in its place, every token’s coefficient is the"
        " same.</p>"
    )
    return Section(
        "What entropy costs in reward", note + "".join(body) + parts.table("The methods’ steps", heads, rows)
    )


def _without(result: Mapping[str, Any]) -> Section | None:
    if not result["without"]:
        return None
    rows = [
        [
            text(each["name"]),
            f"{each['tokens']} ({each['share']:.1%})",
            *(
                cell
                for goal in GOALS
                for cell in (
                    number(MILLI * each["linear"][goal], ".3f"),
                    _figure(result, each["exact"][goal], MILLI, ".3f"),
                )
            ),
        ]
        for each in result["without"]
    ]
    heads = (
        "without the gradient of",
        "tokens",
        *(f"{name}, {how}" for name in GOALS.values() for how in ("linear", "exact")),
    )
    note = (
        '<p class="note">How the change differs when some tokens have no gradient, divided by what the loss was divided'
        " by before. Linear: gain and clipping as they are. Exact: with the denominators and the clipping that the"
        " smaller gradient has; 95 % over evaluation prompts.</p>"
    )
    return Section("Without some tokens", note + parts.table("Ablations", heads, rows))


def _pivotal(result: Mapping[str, Any]) -> Section | None:
    block = result["pivotal"]
    if block is None:
        return None
    body = []
    for goal, found in block["goals"].items():
        rows = []
        for column, name in found["captured"].items():
            gap = found["compared"].get(column)
            against = "–" if gap is None else _figure(result, gap["figure"]) + _p(gap["holm"])
            rows.append([text(column), _figure(result, name), against, _figure(result, found["spearman"].get(column))])
        heads = (
            "the 20 % of tokens with the largest",
            "make of Σ |contribution|",
            "less what entropy’s 20 % make",
            "rank correlation",
        )
        sums = "; ".join(
            f"{text(kind)} add {_figure(result, each['sum'], MILLI)}" for kind, each in found["sums"].items()
        )
        body.append(
            f"<h3>Change of {goal}</h3>{parts.table(f'Pivotal tokens and {goal}', heads, rows)}<p>{sums}, in"
            " thousandths.</p>"
        )
    width = "" if block["width"] is None else f", brackets {number(block['width'], '.3f')} wide on average"
    noise = (
        ""
        if block["source"] == "prefix trees"
        else " Effects from rollouts are noisy, which lowers their shares and correlations."
    )
    note = (
        f'<p class="note">{block["tokens"]:,} tokens of {block["prompts"]} prompts, pivotality from'
        f" {text(block['source'])}{width}; a choice that knows nothing would make 0.20, <em>(itself)</em> the most"
        f" there is.{noise}</p>"
    )
    return Section("Do the tokens that decide make the change?", note + "".join(body))
