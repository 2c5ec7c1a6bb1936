"""Sections of an attribution: who makes the next step's change of entropy and reward, other methods on the same
rollouts, single tokens.

Everything shown is a figure of the study's `result.json`; changes are written in thousandths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokencredit.report import tokens
from tokencredit.report.section import Material, Section, compact, number, scrolling, text
from tokencredit.runs import Run, read_json

MILLI = 1000
GOALS = {"entropy": "entropy (10⁻³ nats)", "reward": "reward (10⁻³)"}
STEPS = {"equal": "rollouts, equal length", "fresh": "rollouts", "whole": "whole step"}
MEANINGS = {
    "equal": "What these rollouts add, at the baseline’s length of step",
    "fresh": "What these rollouts add to the step",
    "whole": "The whole step, momentum included",
}
ENDS = ("value", "low", "high")
OVER = {"this batch": "this batch", "any batch": "any batch"}


def sections(directory: str | Path) -> list[Section]:
    """All sections of the attribution in `directory`."""
    result = read_json(Path(directory) / "result.json")
    built = [
        _about(result),
        _sequences(result),
        _roles(result),
        _diagnostics(result),
        _plane(result),
        _methods(result),
        _without(result),
        _pivotal(result),
        _tokens(directory),
    ]
    return [section for section in built if section]


def write(directory: Path, out: Path, title: str = "Who caused the change of entropy and reward") -> Path:
    """The attribution's own page."""
    from tokencredit import report

    return report.write([], out, {}, title=title, extra=sections(directory))


def _tokens(directory: str | Path) -> Section | None:
    """The token view, coloured by what each token adds to the change of entropy."""
    built = tokens.build(Material.of([Run.open(directory)], {}))
    return built and replace(built, data={**built.data, "score": "change of entropy"})


def _figure(result: Mapping[str, Any], name: str | None, scale: float = 1, decimals: int = 2) -> str:
    """Value and interval as HTML; a dash for what is not defined."""
    if name is None:
        return "–"
    figure = result["figures"][name]
    low, high = figure["low"], figure["high"]
    ends = (
        ""
        if low is None
        else f' <span class="ends">[{number(scale * low, decimals)}, {number(scale * high, decimals)}]</span>'
    )
    return f"{number(figure['value'] if figure['value'] is None else scale * figure['value'], decimals)}{ends}"


def _table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of HTML cells, the first of each its name; headings are text."""
    heads = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return scrolling(label, f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>")


def _point(result: Mapping[str, Any], name: str, scale: float = MILLI) -> dict[str, float | None]:
    figure = result["figures"][name]
    return {key: None if figure[key] is None else scale * figure[key] for key in ENDS}


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
    listed = "".join(f'<div class="fact"><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in facts)
    said = "".join(f"<li>{text(finding)}</li>" for finding in result["findings"])
    names = {part: {goal: result["parts"][goal][part] for goal in GOALS} for part in ("momentum", "decay", "tokens")}
    names |= {
        f"… of {name}": {goal: found[goal]["sum"] for goal in GOALS} for name, found in result["outcomes"].items()
    }
    names["the whole step"] = {goal: result["parts"][goal]["total"] for goal in GOALS}
    rows = [[text(part), *(_figure(result, some[goal], MILLI) for goal in GOALS)] for part, some in names.items()]
    table = _table("Parts of the change", ("made by", *GOALS.values()), rows)
    note = (
        '<p class="note">First-order changes, split exactly: the parts add up. Intervals: 95 %, over the prompts that'
        " the gradients of entropy and reward are estimated on; of successes and failures, over the step’s prompts, as"
        " if it were made of other rollouts.</p>"
    )
    command = f"<p><code>{text(result['command'])}</code></p>"
    return Section(
        "Who makes the next step’s change", f'<dl class="facts">{listed}</dl><ul>{said}</ul>{table}{note}{command}'
    )


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
    return Section("Rollouts", note, compact(data), "contributions.js", ("plot.js", "axes.js"))


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
    return Section("By role", note, compact({"bars": bars}), "bars.js", ("plot.js", "axes.js"))


def _diagnostics(result: Mapping[str, Any]) -> Section:
    """Rank correlations between tokens and between rollouts; then covariance, group by group."""
    body = []
    for level, targets in result["diagnostics"].items():
        names = list(next(iter(targets.values())))
        rows = []
        for name in names:
            cells = []
            for found in targets.values():
                holm = result["figures"][found[name]]["holm"]
                mark = "" if holm is None else f' <span class="ends">p {number(holm, 3)}</span>'
                cells.append(_figure(result, found[name]) + mark)
            rows.append([text(name), *cells])
        title = (
            "Between tokens" if level == "tokens" else "Between rollouts: sums of contributions, means of diagnostics"
        )
        body.append(f"<h3>{title}</h3>{_table(title, ('diagnostic', *targets), rows)}")
    groups, signs = result["covariance"]["groups"], result["covariance"]["signs"]
    rows = [
        [text(name), str(each["tokens"]), _figure(result, each["sum"], MILLI), _figure(result, each["negative"])]
        for name, each in groups.items()
    ]
    heads = ("tokens by covariance", "tokens", "add to entropy (10⁻³ nats)", "share of them that lowers it")
    body.append(f"<h3>Do tokens of high covariance lower entropy?</h3>{_table('Covariance', heads, rows)}")
    rows = [
        [text(name), _figure(result, each["tokens"]), _figure(result, each["weighted"])] for name, each in signs.items()
    ]
    body.append(_table("Signs", ("sign predicted by", "right, of tokens", "right, weighted by size"), rows))
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
                "gaps": _point(result, gap[goal]) if gap else dict.fromkeys(ENDS, 0.0),
            }
            for goal in GOALS
        }

    methods = [
        {
            "name": each["name"],
            "steps": {step: {over: points(found) for over, found in each["steps"][step].items()} for step in STEPS},
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
    data = {"methods": methods, "shown": shown, "steps": STEPS, "over": OVER}
    return Section(
        "Other methods on the same rollouts", note, compact(data), "methods_plane.js", ("plot.js", "axes.js")
    )


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
        body.append(f"<details{is_open}><summary>{text(meaning)}</summary>{_table(meaning, heads, rows)}</details>")
    rows = [
        [
            text(each["name"]),
            text(each["rollouts"]),
            number(each["length"]),
            number(each["clip"]),
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
    return Section("What entropy costs in reward", note + "".join(body) + _table("The methods’ steps", heads, rows))


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
                for cell in (number(MILLI * each["linear"][goal]), _figure(result, each["exact"][goal], MILLI, 3))
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
    return Section("Without some tokens", note + _table("Ablations", heads, rows))


def _pivotal(result: Mapping[str, Any]) -> Section | None:
    block = result["pivotal"]
    if block is None:
        return None
    body = []
    for goal, found in block["goals"].items():
        rows = []
        for column, name in found["captured"].items():
            gap = found["compared"].get(column)
            against = (
                "–"
                if gap is None
                else f'{_figure(result, gap["figure"])} <span class="ends">p {number(gap["holm"], 3)}</span>'
            )
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
            f"<h3>Change of {goal}</h3>{_table(f'Pivotal tokens and {goal}', heads, rows)}<p>{sums}, in"
            " thousandths.</p>"
        )
    width = "" if block["width"] is None else f", brackets {number(block['width'], 3)} wide on average"
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
