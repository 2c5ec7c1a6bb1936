"""The page of an inspection: the tokens, the verdict, then the parts. Everything shown is a figure of `result.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.figure import number
from tokencredit.report import figures as parts
from tokencredit.report import tokens
from tokencredit.report.section import Material, Section, compact, text
from tokencredit.runs import Run

Block = Mapping[str, Any]
MILLI = 1000


def sections(result: Block, directory: Path) -> list[Section]:
    """All sections of what could be answered; what could not be is listed with its reason."""
    built = [tokens.build(Material([Run.open(directory)])), _verdict(result)]
    for name, block in result["parts"].items():
        built += OF_PARTS[name](result, block)
    return [section for section in [*built, _about(result)] if section]


def _figure(result: Block, name: str | None, form: str = ".3g", scale: float = 1) -> str:
    return parts.shown(result["figures"].get(name), form, scale)


def _verdict(result: Block) -> Section:
    items = [f"<li>{text(each['said'])}{_lines(each['lines'])}</li>" for each in result["verdict"]]
    body = f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing is resolved.</p>"
    left_out = "".join(f"<li>{text(name)}: {text(why)}</li>" for name, why in result["skipped"].items())
    return Section("Verdict", body + (f"<p>Left out:</p><ul>{left_out}</ul>" if left_out else ""))


def _lines(lines: Sequence[str]) -> str:
    """The places in the log, to unfold."""
    if not lines:
        return ""
    listed = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<details><summary>{len(lines)} places in the log</summary><ul>{listed}</ul></details>"


def _context(before: str, token: str, after: str = "") -> str:
    """A token among those around it, which ends in a way that whitespace shows."""
    return f"<code>{text(before)}</code><mark>{text(token)}</mark><code>{text(after)}</code>"


def _log(result: Block, block: Block) -> list[Section]:
    rows = []
    for name, total in block["totals"].items():
        shown = (_figure(result, total), _figure(result, block["trends"].get(name)))
        rows.append([text(name), *shown, text(result["figures"][total].unit)])
    body = parts.note(
        f"{block['rollouts']:,} rollouts in {block['groups']:,} groups of {block['prompts']:,} prompts,"
        f" {block['steps']} steps. 95 % over groups: the rollouts of one prompt in one step."
    )
    body += parts.table("Measures of the log", ("measure", "all of it", "last quarter less first", "unit"), rows)
    if len(block["columns"]) > 1:
        columns = [[text(name), _figure(result, figure)] for name, figure in block["columns"].items()]
        agree = [[text(" and ".join(each["columns"])), _figure(result, each["figure"])] for each in block["agreement"]]
        body += parts.table("Reward columns", ("reward column", "mean"), columns)
        body += parts.table("How they agree", ("reward columns", "correlation over rollouts"), agree)
    if block["words"]:
        words = [
            [
                f"<code>{text(each['token'])}</code>",
                f"{each['early']:.0%}",
                f"{each['late']:.0%}",
                _figure(result, each["figure"]),
            ]
            for each in block["words"]
        ]
        heads = ("token", "of early rollouts", "of late ones", "change")
        body += "<h3>Tokens that appear and vanish</h3>" + parts.table("Tokens", heads, words)
    panels = [_panel(name, curve["unit"], curve) for name, curve in block["curves"].items() if len(curve["step"]) > 1]
    data = compact({"panels": panels}) if panels else None
    return [Section("What is in the log", body, data, "curves.js" if panels else None)]


def _panel(title: str, unit: str, curve: Block) -> dict[str, Any]:
    line = {key: curve[key] for key in ("step", "value", "low", "high")}
    return {"title": title, "meaning": "", "unit": unit, "series": [{"label": "log", "colour": 0, "lines": [], **line}]}


def _credit(result: Block, block: Block) -> list[Section]:
    heads = list(dict.fromkeys(head for row in block["methods"].values() for head in row))
    rows = [
        [text(name), *(_figure(result, row.get(head), ".2f") for head in heads)]
        for name, row in block["methods"].items()
    ]
    note = f"{block['tokens']:,} tokens of {block['groups']} groups. Shares are of Σ |credit|; 95 % over groups."
    if not block["logged"]:
        note += " The log has no advantages: what methods would have given is shown alone."
    left_out = "".join(f"<li>{text(name)}: {text(why)}</li>" for name, why in block["left_out"].items())
    more = f"<p>Left out:</p><ul>{left_out}</ul>" if left_out else ""
    return [Section("Where credit goes", parts.note(note) + parts.table("Credit", ("method", *heads), rows) + more)]


def _audit(result: Block, block: Block) -> list[Section]:
    note = (
        f"Q − V of {block['tokens']:,} tokens, {block['completions']} completions of {block['prompts']} prompts at step"
        f" {block['step']}; {block['generated']:,} tokens generated. The verifier’s verdict is the logged outcome of"
        f" {block['agrees']:.0%} of the completions. 95 % over prompts."
    )
    if not block["resolved"]:
        missing = "<p>The effects are not told from the noise of the rollouts: raise --tokens or --rollouts.</p>"
        return [Section("Is the credit right?", parts.note(note) + missing)]
    rows = []
    for name, reached in block["reached"].items():
        cells = (
            _figure(result, each, ".2f") for each in (reached, block["explained"].get(name), block["signs"].get(name))
        )
        rows.append([text(name), *cells])
    heads = (
        "credit or proxy",
        ("reached", "Σ (Q − V)² of the 20 % of tokens with the largest credit, over all of it"),
        ("explained", "share of Σ (Q − V)² in the direction of the credit"),
        ("wrong sign", f"of the {block['sure']} tokens with a sure effect"),
    )
    body = parts.note(note) + parts.table("Audit", heads, rows) + _mistakes(block)
    bars = {
        "share of Σ (Q − V)² in the top 20 % of tokens": [
            {"name": name, **parts.point(result["figures"][each])} for name, each in block["reached"].items()
        ]
    }
    return [Section("Is the credit right?", body, compact({"bars": bars}), "bars.js")]


def _mistakes(block: Block) -> str:
    if not block["mistakes"]:
        return "<p>No token with a sure effect has credit of the other sign.</p>"
    rows = []
    for each in block["mistakes"]:
        effect, low, high = (number(x, ".2f") for x in each["effect"])
        outcome = "correct" if each["success"] else "incorrect"
        rows.append(
            [
                text(each["place"]),
                _context(each["before"], each["token"], each["after"]),
                outcome,
                number(each["credit"], "+.2f"),
                f'{effect} <span class="ends">[{low}, {high}]</span>',
            ]
        )
    heads = ("where", "token", "completion", f"{block['of']} credit", "Q − V")
    return f"<h3>The clearest mistakes</h3>{parts.table('Mistakes', heads, rows)}"


def _autopsy(result: Block, block: Block) -> list[Section]:
    own = "the update’s own prompts, so that estimates are optimistic" if block["optimistic"] else "other prompts"
    note = (
        f"The update that {block['of']} credit makes at step {block['step']} with the loss of {block['loss']}"
        f" ({block['optimizer']}): {block['rollouts']} rollouts of {block['prompts']} prompts. To first order, in"
        f" thousandths; evaluated on {block['evaluation']['rollouts']} logged rollouts of"
        f" {block['evaluation']['prompts']} prompts: {own}."
    )
    goals = block["goals"]
    names = ("total", "momentum", "decay", "tokens", "successes", "failures")
    rows = [
        [text(part), *(_figure(result, goal["parts"][part], ".3g", MILLI) for goal in goals.values())] for part in names
    ]
    heads = [f"{name} (10⁻³ {result['figures'][goal['parts']['total']].unit})" for name, goal in goals.items()]
    body = parts.note(note) + parts.table("Parts of the change", ("made by", *heads), rows)
    left_out = "".join(f"<li>{text(name)}: {text(why)}</li>" for name, why in block["left_out"].items())
    body += f"<p>Left out:</p><ul>{left_out}</ul>" if left_out else ""
    bars = {
        f"change of {name} by kind of token (10⁻³)": [
            {"name": f"{each['token']} ({each['count']})", **parts.point(result["figures"][each["figure"]], MILLI)}
            for each in goal["types"]
        ]
        for name, goal in goals.items()
    }
    return [
        Section("What the update does", body, compact({"bars": bars}), "bars.js"),
        Section("The tokens that do most", "".join(_largest(name, goal["tokens"]) for name, goal in goals.items())),
        Section("Other methods on the same step", _methods(result, block, heads)),
    ]


def _largest(goal: str, some: Iterable[Block]) -> str:
    rows = [
        [text(each["place"]), _context(each["before"], each["token"]), number(MILLI * each["share"], "+.3g")]
        for each in some
    ]
    return f"<h3>Change of {text(goal)}</h3>" + parts.table(
        f"Tokens and {goal}", ("where", "token", "adds (10⁻³)"), rows
    )


def _methods(result: Block, block: Block, heads: Sequence[str]) -> str:
    rows = []
    for each in block["methods"]:
        cells = []
        for goal, figure in each["goals"].items():
            gap = each["differences"].get(goal)
            cells += [_figure(result, figure, ".3g", MILLI), _figure(result, gap, ".2g", MILLI) if gap else "–"]
        rows.append([text(each["name"]), number(each["length"], ".2f"), *cells])
    columns = [each for head in heads for each in (head, f"less {block['of']}")]
    note = parts.note(
        "What these rollouts add under each method, at the length of the first one’s step; <em>length</em> is that"
        " of its own step over it. 95 % over evaluation prompts, paired."
    )
    return note + parts.table("Methods", ("method", "length", *columns), rows)


def _mismatch(result: Block, block: Block) -> list[Section]:
    whose = "the log’s" if block["trainer"] == "log" else "the checkpoint’s: staleness is among it"
    note = (
        f"Log-probs of the trainer ({whose}) less the sampler’s, {block['tokens']:,} tokens of step {block['step']}. KL"
        " is the mean of eᵈ − 1 − d. 95 % over prompts."
    )
    rows = [["KL, nats per token", _figure(result, block["kl"])], ["mean log-ratio", _figure(result, block["shift"])]]
    rows += [
        [f"tokens whose probabilities are {k} times apart", _figure(result, x)] for k, x in block["beyond"].items()
    ]
    rows += [["share of the KL in the 2 % of tokens with most", _figure(result, block["concentration"], ".2f")]]
    rows += [["rollouts that weighting whole sequences would leave", f"{block['sequences']:.0%}"]]
    if block["pivotal"]:
        name = "Σ (Q − V)² in the 20 % of tokens that are furthest apart"
        rows += [[name, _figure(result, block["pivotal"], ".2f")]]
    rows += [[f"KL in fifth {k} of a completion", _figure(result, x)] for k, x in enumerate(block["position"], start=1)]
    body = parts.note(note) + parts.table("Mismatch", ("of the step", "figure"), rows)
    quantiles = [[f"{float(q):.1%}", number(x, ".3g")] for q, x in block["quantiles"].items()]
    body += parts.table("Quantiles of the ratio", ("quantile", "trainer / sampler"), quantiles)
    found = [(each["step"], result["figures"][each["figure"]]) for each in block["steps"]]
    curve = {"step": [step for step, _ in found]} | {
        end: [getattr(x, end) for _, x in found] for end in ("value", "low", "high")
    }
    panels = [_panel("KL by step", "nats per token", curve)] if len(found) > 1 else []
    data = compact({"panels": panels}) if panels else None
    return [Section("Sampler against trainer", body, data, "curves.js" if panels else None)]


def _pair(result: Block, block: Block) -> list[Section]:
    rows = [[text(name), _figure(result, x), text(result["figures"][x].unit)] for name, x in block["changes"].items()]
    rows += [[f"prompts {name}", _figure(result, x), "share of prompts"] for name, x in block["flips"].items()]
    body = parts.note(f"{block['prompts']:,} prompts of both logs, the second less the first; 95 % over prompts.")
    body += parts.table("Changes", ("measure", "second less first", "unit"), rows)
    if block["tokens"]:
        moved = [[f"<code>{text(each['token'])}</code>", _figure(result, each["figure"])] for each in block["tokens"]]
        body += "<h3>Tokens whose log-prob moved</h3>" + parts.table("Tokens", ("token", "nats"), moved)
    elif block["tokens"] is None:
        body += "<p>How far log-probs of tokens moved is not known: it takes log-probs in both logs.</p>"
    apart = [
        [
            f"<code>{text(each['common'])}</code>",
            *(
                f"<code>{text(each[side])}</code> ({'correct' if right else 'incorrect'}; {text(place)})"
                for side, right, place in zip(("before", "after"), each["success"], each["places"])
            ),
        ]
        for each in block["partings"]
    ]
    body += "<h3>Where completions part</h3>" + parts.table("Partings", ("common beginning", "first", "second"), apart)
    return [Section("The two logs", body)]


def _about(result: Block) -> Section:
    about, config = result["about"], result["config"]
    facts = [
        ("Log", ", ".join(result["log"])),
        ("Checkpoint", config["policy"]["model"] if config["policy"] else "none"),
        ("Step that is audited", about["focus"]),
        ("Steps that are looked at", ", ".join(f"{each['step']} ({each['rollouts']})" for each in about["steps"])),
        ("Seed", result["seed"]),
    ]
    if about["excess"]:
        figure = result["figures"][about["excess"]].text(".2g")
        facts.append(("Surprisal of that step less its entropy under the checkpoint", f"{figure} nats per token"))
    notes = "".join(f"<li>{text(each)}</li>" for each in result["notes"])
    return Section("What was looked at", parts.facts(facts) + f"<ul>{notes}</ul>" + parts.command(result))


OF_PARTS = {
    "log": _log,
    "credit": _credit,
    "audit": _audit,
    "autopsy": _autopsy,
    "mismatch": _mismatch,
    "pair": _pair,
}
