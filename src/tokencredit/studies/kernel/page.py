"""Sections of the kernel study: predicted changes against real ones, the diagonal against the rest, which gradients are
alike, spectrum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.report import figures as parts
from tokencredit.report.figures import shown
from tokencredit.report.section import Section, compact, duration, text

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


def sections(result: Mapping[str, Any], directory: Path) -> list[Section]:
    """All sections of the study."""
    parts_of = (_about, _influence, _diagonal, _pairs, _ties, _heat, _spectrum)
    return [section for part in parts_of if (section := part(result))]


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
    note = (
        '<p class="note">K(t, t′) = ∇log π(t) · P⁻¹ ∇log π(t′): how much a step on t moves the log-probability of t′.'
        " Intervals: 95 %, jackknife over prompts, a prompt left out as sender and as receiver.</p>"
    )
    return Section("Who moves whom", parts.facts(facts) + parts.said(result) + note + parts.command(result))


def _influence(result: Mapping[str, Any]) -> Section:
    rates = result["influence"]["rates"]
    words = {
        "r2": "R²",
        "r2_fresh": "R² of the batch’s part",
        "slope": "real / predicted",
        "r2_completions": "R² of completions",
    }
    columns, figures = {name: word for name, word in words.items() if name in rates[0]}, result["figures"]
    rows = [
        (f"{row['factor']:g}", f"{row['lr']:.2g}", *(shown(figures[row[name]], ".5f") for name in columns))
        for row in rates
    ]
    table = parts.table("Influence by learning rate", ("of the rate", "learning rate", *columns.values()), rows)
    gap = figures["influence/kernel_gap"].value
    note = (
        '<p class="note">Each point a held-out token (or completion): the predicted change of its log-probability,'
        " along the whole step with momentum and decay, and the change that the real step makes. R² is of the"
        f" prediction as it stands. The sum over the kernel differs from the forward pass by {gap:.1e} of the largest"
        " change.</p>"
    )
    points = compact(result["influence"]["points"])
    return Section("Predicted and real changes", table + note, points, "influence.js")


def _diagonal(result: Mapping[str, Any]) -> Section | None:
    if not result["shares"]:
        return None
    shares = {name: shown(result["figures"][figure], ".3f") for name, figure in result["shares"].items()}
    rows = [(said, shares[f"share/{part}"]) for part, said in PARTS.items() if f"share/{part}" in shares]
    made = parts.table("Parts of a predicted change", ("made by", "share of the squared change"), rows)
    ways = ((said, shares[name]) for name, said in WAYS.items())
    others = parts.table("Own terms", ("own terms, otherwise", "figure"), ways)
    edges = [f"{low:g}-{high:g}" for low, high in zip(result["edges"], result["edges"][1:])]
    columns = {
        "tokens": "share of tokens",
        "of_squared_change": "share of the squared change",
        "share/own": "own share of it",
        "sign/own": "move as their own term says",
    }
    split = ((edge, *(shares[f"{name}/{edge}"] for name in columns)) for edge in edges)
    bins = parts.table("By probability", ("probability of the token", *columns.values()), split) if edges else ""
    note = (
        '<p class="note">What the senders do to themselves and to one another. A covariance of log-probability and'
        " advantage stands for the change of entropy where a token’s change follows from its own advantage alone."
        " Shares of the squared change add up to 1; one may exceed it where others cancel it.</p>"
    )
    return Section("What a token’s own term makes", note + f'<div class="panels small">{made}{others}</div>' + bins)


def _pairs(result: Mapping[str, Any]) -> Section:
    columns = ("cosine", "size", "deviation")
    figures = result["figures"]
    rows = (
        (
            text(f"{row['scope']}: {row['likeness']}"),
            f"{row['num']:,}",
            *(shown(figures[row[name]], ".3f") for name in columns),
        )
        for row in result["pairs"]
    )
    noise = f" A sketch adds noise of standard error {result['noise']:.3f} to every cosine." if result["noise"] else ""
    note = f'<p class="note">Cosines of gradients under P⁻¹, by what the two have in common.{noise}</p>'
    return Section(
        "Which gradients are alike",
        note + parts.table("Pairs", ("pairs", "number", "mean", "mean size", "deviation"), rows),
    )


def _ties(result: Mapping[str, Any]) -> Section | None:
    """The completions that are tied together, by their text; a result of an earlier version has none."""
    if not result.get("ties"):
        return None
    rows = [
        (
            f"{tie['cosine']:+.3f}",
            tie["scope"],
            *(
                text(f"{tie[f'prompt_text_{side}']} → {tie[f'completion_text_{side}']}")
                + (" (right)" if tie[f"success_{side}"] else " (wrong)")
                for side in ("a", "b")
            ),
        )
        for tie in result["ties"]
    ]
    note = (
        '<p class="note">Pairs of completions whose gradients are most alike and most opposed; ids of prompts and'
        " completions stand in ties.parquet.</p>"
    )
    table = parts.table("Ties", ("cosine", "pair of", "completion", "completion"), rows)
    return Section("Which completions are tied together", note + table)


def _heat(result: Mapping[str, Any]) -> Section:
    note = (
        '<p class="note">Completions in the order of their prompts; tokens of a right and then a wrong rollout of one'
        " prompt. Blue: a step helps both; orange: it helps one at the other’s cost. Point at a cell to read it.</p>"
    )
    return Section("Cosines one by one", note, compact(result["heat"], 3), "matrix.js")


def _spectrum(result: Mapping[str, Any]) -> Section:
    spectra, figures = result["spectra"], result["figures"]
    rows = (
        (name, shown(figures[each["effective_rank"]], ".1f"), shown(figures[each["top_share"]], ".3f"))
        for name, each in spectra.items()
    )
    table = parts.table("Spectrum", ("of the", "effective rank", "share of the first"), rows)
    data = {name: each["shares"] for name, each in spectra.items()}
    note = (
        '<p class="note">Eigenvalues as shares of their sum, largest first. Effective rank: (Σ λ)² / Σ λ². The kernel'
        " is dominated by tokens with long gradients; its cosines count every token alike.</p>"
    )
    return Section("Spectrum", table + note, compact(data), "spectrum.js")
