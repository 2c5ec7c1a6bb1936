"""Sections of the kernel study: predicted changes against real ones, the diagonal against the rest, which gradients are
alike, spectrum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.report.section import Section, compact, duration, number, scrolling, text
from tokencredit.runs import read_json

PARTS = {
    "own": "the token itself",
    "same completion": "other tokens of its completion",
    "same prompt": "other completions of its prompt",
    "other prompts": "other prompts",
}
WAYS = {
    "mass/own": "of all that pushes, before it cancels",
    "token/own": "of what pushes one of them, on average",
    "sign/own": "how many move as their own term says",
    "correlation/own": "correlation of own term and whole change",
    "rank_correlation/own": "the same, of ranks",
    "correlation/credit": "correlation of credit and whole change",
}


def sections(directory: str | Path) -> list[Section]:
    """All sections of the study in `directory`."""
    result = read_json(Path(directory) / "result.json")
    found = [_about(result), _influence(result), _diagonal(result), _pairs(result), _heat(result), _spectrum(result)]
    return [section for section in found if section]


def write(directory: Path, out: Path, title: str = "Who moves whom") -> Path:
    """The page of one study."""
    from tokencredit import report

    return report.write([], out, {}, title=title, extra=sections(directory))


def _about(result: Mapping[str, Any]) -> Section:
    num, config = result["num"], result["config"]
    exact = f"sketched along {config['directions']} directions" if config["directions"] else "exact"
    what = "tokens" if config["level"] == "tokens" else "completions"
    metric = (
        "AdamW’s D, bias-corrected, with the batch’s gradient"
        if config["preconditioner"] == "adamw"
        else "the identity"
    )
    facts = [
        ("Checkpoint", f"{result['checkpoint']} (step {result['step']})"),
        ("Method", f"{result['method']} on {result['task']}"),
        ("Senders", f"{num['senders']} {what} with credit, of {num['rollouts']} rollouts of {num['prompts']} prompts"),
        ("Held out", f"{num['held_out']} {what} of {num['held_prompts']} prompts"),
        ("Kernel", f"{exact}, {num['parameters']:,} parameters; P is {metric}"),
        ("Learning rate", f"{result['lr']:.3g}; gradient scaled by {result['clip']:.3g} to clip it"),
        ("Time", duration(sum(result["seconds"].values()))),
        ("Seed", config["seed"]),
    ]
    listed = "".join(f'<div class="fact"><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in facts)
    said = "".join(f"<li>{text(finding)}</li>" for finding in result["findings"])
    note = (
        '<p class="note">K(t, t′) = ∇log π(t) · P⁻¹ ∇log π(t′): how much a step on t moves the log-probability of t′.'
        " Intervals: 95 %, jackknife over prompts, a prompt left out as sender and as receiver.</p>"
    )
    body = f'<dl class="facts">{listed}</dl><ul>{said}</ul>{note}<p><code>{text(result["command"])}</code></p>'
    return Section("Who moves whom", body)


def figure(result: Mapping[str, Any], name: str | None, decimals: int = 3) -> str:
    """A figure of the study with its interval; a dash for none."""
    if name is None:
        return "–"
    value, low, high = (result["figures"][name][key] for key in ("value", "low", "high"))
    ends = "" if low is None else f' <span class="ends">[{number(low, decimals)}, {number(high, decimals)}]</span>'
    return number(value, decimals) + ends


def _table(label: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Heads and row names are text; cells are HTML."""
    head = "".join(f"<th>{text(name)}</th>" for name in heads)
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return scrolling(label, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _influence(result: Mapping[str, Any]) -> Section:
    rates = result["influence"]["rates"]
    words = {
        "r2": "R²",
        "r2_fresh": "R² of the batch’s part",
        "slope": "real / predicted",
        "r2_completions": "R² of completions",
    }
    columns = {name: word for name, word in words.items() if name in rates[0]}
    rows = [
        (f"{row['factor']:g}", [f"{row['lr']:.2g}", *(figure(result, row[name], 5) for name in columns)])
        for row in rates
    ]
    table = _table("Influence by learning rate", ("of the rate", "learning rate", *columns.values()), rows)
    gap = result["figures"]["influence/kernel_gap"]["value"]
    note = (
        '<p class="note">Each point a held-out token (or completion): the predicted change of its log-probability,'
        " along the whole step with momentum and decay, and the change that the real step makes. R² is of the"
        f" prediction as it stands. The sum over the kernel differs from the forward pass by {gap:.1e} of the largest"
        " change.</p>"
    )
    points = compact(result["influence"]["points"])
    return Section("Predicted and real changes", table + note, points, "influence.js", ("plot.js", "axes.js"))


def _diagonal(result: Mapping[str, Any]) -> Section | None:
    shares = result["shares"]
    if not shares:
        return None
    rows = [
        (said, [figure(result, shares[f"share/{part}"])]) for part, said in PARTS.items() if f"share/{part}" in shares
    ]
    parts = _table("Parts of a predicted change", ("made by", "share of the squared change"), rows)
    ways = ((said, [figure(result, shares[name])]) for name, said in WAYS.items())
    others = _table("Own terms", ("own terms, otherwise", "figure"), ways)
    edges = [f"{low:g}-{high:g}" for low, high in zip(result["edges"], result["edges"][1:])]
    columns = {
        "tokens": "share of tokens",
        "of_squared_change": "share of the squared change",
        "share/own": "own share of it",
        "sign/own": "move as their own term says",
    }
    split = ((edge, [figure(result, shares[f"{name}/{edge}"]) for name in columns]) for edge in edges)
    bins = _table("By probability", ("probability of the token", *columns.values()), split) if edges else ""
    note = (
        '<p class="note">What the senders do to themselves and to one another. A covariance of log-probability and'
        " advantage stands for the change of entropy where a token’s change follows from its own advantage alone."
        " Shares of the squared change add up to 1; one may exceed it where others cancel it.</p>"
    )
    return Section("What a token’s own term makes", note + f'<div class="panels small">{parts}{others}</div>' + bins)


def _pairs(result: Mapping[str, Any]) -> Section:
    columns = ("cosine", "size", "deviation")
    rows = (
        (f"{row['scope']}: {row['likeness']}", [f"{row['num']:,}", *(figure(result, row[name]) for name in columns)])
        for row in result["pairs"]
    )
    noise = f" A sketch adds noise of standard error {result['noise']:.3f} to every cosine." if result["noise"] else ""
    note = f'<p class="note">Cosines of gradients under P⁻¹, by what the two have in common.{noise}</p>'
    return Section(
        "Which gradients are alike", note + _table("Pairs", ("pairs", "number", "mean", "mean size", "deviation"), rows)
    )


def _heat(result: Mapping[str, Any]) -> Section:
    note = (
        '<p class="note">Completions in the order of their prompts; tokens of a right and then a wrong rollout of one'
        " prompt. Blue: a step helps both; orange: it helps one at the other’s cost. Point at a cell to read it.</p>"
    )
    return Section("Cosines one by one", note, compact(result["heat"], 3), "matrix.js")


def _spectrum(result: Mapping[str, Any]) -> Section:
    spectra = result["spectra"]
    rows = (
        (name, [figure(result, each["effective_rank"], 1), figure(result, each["top_share"])])
        for name, each in spectra.items()
    )
    table = _table("Spectrum", ("of the", "effective rank", "share of the first"), rows)
    data = {name: each["shares"] for name, each in spectra.items()}
    note = (
        '<p class="note">Eigenvalues as shares of their sum, largest first. Effective rank: (Σ λ)² / Σ λ². The kernel'
        " is dominated by tokens with long gradients; its cosines count every token alike.</p>"
    )
    return Section("Spectrum", table + note, compact(data), "spectrum.js", ("plot.js", "axes.js"))
