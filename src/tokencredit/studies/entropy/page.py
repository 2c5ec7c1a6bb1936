"""Sections of the study of entropy change: what was predicted of several steps, what they did, and over which learning
rates that holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokencredit.figure import number
from tokencredit.report import figures as parts
from tokencredit.report import tokens
from tokencredit.report.figures import shown
from tokencredit.report.section import Material, Section, compact, duration, text
from tokencredit.runs import Run

TERMS = {
    "direct": "the entropy of every token where its prefix stays as it is",
    "path": "other prefixes are met",
    "length": "more or fewer tokens share the entropy",
    "linear": "all three",
    "quadratic": "the next order of the same expansion, at the optimizer’s own rate",
}
MILLI = 1e3


def sections(result: Mapping[str, Any], directory: Path) -> list[Section]:
    """All sections of the study."""
    parts_of = (_about, _sweep, _predicted, _terms, _precision, _theory)
    built = tokens.build(Material([Run.open(directory)]))
    view = [replace(built, data={**built.data, "score": "share"})] if built else []
    return view + [part(result) for part in parts_of]


def _about(result: Mapping[str, Any]) -> Section:
    about, config = result["about"], result["config"]
    facts = [
        ("Checkpoint", f"{about['checkpoint']} (step {about['step']})"),
        ("Method", about["method"]),
        ("Task", f"{about['task']}, temperature {about['temperature']:g}"),
        ("Learning rate", f"{about['lr']:g}"),
        ("Updates", f"{config['updates']} of {config['prompts']} × {config['group']} rollouts"),
        ("Evaluation", f"{config['eval_prompts']} prompts, {config['fresh']} fresh rollouts of each on either side"),
        ("Time", duration(sum(result["seconds"].values())) + " of one core"),
        ("Seed", config["seed"]),
    ]
    note = parts.note("Intervals: 95 %, jackknife, clustered by prompt.")
    body = parts.facts(facts) + parts.said(result) + note + parts.command(result)
    return Section("Does the predicted change of entropy come true?", body)


def _sweep(result: Mapping[str, Any]) -> Section:
    """|ΔH| over learning rates, by kind of truth, with what is predicted, what rounding hides and where curvature
    begins.
    """
    updates, rows, figures = [], [], result["figures"]
    for k, update in enumerate(result["updates"], start=1):
        linear, quadratic = (figures[update[name]].value for name in ("linear", "quadratic"))
        updates.append(
            {
                "linear": linear,
                "quadratic": quadratic,
                "lr": result["about"]["lr"],
                "rates": update["rates"],
                "floor": update["floor"],
                "reach": parts.point(figures[update["reach"]]),
                "sweep": update["sweep"],
            }
        )
        share = update["vector"]["batch_norm"] / update["vector"]["norm"]
        rows.append(
            (
                str(k),
                shown(figures[update["slope"]], ".4f"),
                number(update["r2"], ".6f"),
                shown(figures[update["reach"]], ".1e"),
                f"{share:.2f}",
                text("; ".join(update["flags"]) or "none"),
            )
        )
    note = (
        '<p class="note">Shaded: rounding in float32 makes more than 5 % of the change. Dashed: |quadratic| is half of'
        " |linear|. Bars: 95 %; one that reaches 0 has no lower end. Points of one kind share their rollouts and err"
        " together.</p>"
    )
    table = parts.table("Updates", ("update", "slope", "R²", "linear range", "batch’s part of |Δθ|", "flags"), rows)
    return Section("Over learning rates", note + table, compact(updates), "sweep.js")


def _predicted(result: Mapping[str, Any]) -> Section:
    """Predicted against true, one point per update, and how the errors of small predictions are spread."""
    figures = result["figures"]
    kinds = {"the step, odd half": ("linear", "true"), "the batch’s own part": ("batch_linear", "batch_true")}
    points = {
        kind: [
            {axis: parts.point(figures[update[name]]) for axis, name in zip(("predicted", "true"), names)}
            for update in result["updates"]
        ]
        for kind, names in kinds.items()
    }
    data = {
        "points": points,
        "errors": [error for update in result["sub_errors"] for error in update],
        "size": result["sub_batch"],
    }
    note = (
        '<p class="note">In thousandths of a nat per token. True: fresh samples of the policy on either side. Odd half:'
        " (H(θ + ηv) − H(θ − ηv)) / 2, which the curvature is not in. Bars: 95 %.</p>"
    )
    heads = ("update", "linear", "true, odd half", "quadratic", "true, whole step", "batch’s part: linear", "true")
    names = ("linear", "true", "quadratic", "true_whole", "batch_linear", "batch_true")
    rows = [
        (str(k), *(shown(figures[update[name]], ".3f", MILLI) for name in names))
        for k, update in enumerate(result["updates"], start=1)
    ]
    body = note + parts.table("Predicted and true", heads, rows)
    return Section("Predicted and true change", body, compact(data), "predicted.js")


def _terms(result: Mapping[str, Any]) -> Section:
    """What the prediction is made of, and what the baselines do for it."""
    figures = result["figures"]
    terms = [(name, shown(figures[result["terms"][name]], ".3f", MILLI), what) for name, what in TERMS.items()]
    baselines = [
        (
            text(row["name"]),
            shown(figures[row["linear"]], ".3f", MILLI),
            number(row["error"] * MILLI, ".3f"),
            shown(figures.get(row["spread"]), ".2f"),
        )
        for row in result["baselines"]
    ]
    note = (
        f'<p class="note">In thousandths of a nat per token; the typical prediction is '
        f"{number(figures['predicted'].value * MILLI, '.3f')}. Control variates: sums of ∇log π along the"
        " step.</p>"
    )
    heads = (
        "baseline of what is to come",
        "prediction, mean over updates",
        "its standard error, one update",
        f"spread of relative errors from {result['sub_batch']} rollouts",
    )
    tables = parts.table("Terms", ("term", "mean over updates", "what changes"), terms) + parts.table(
        "Baselines", heads, baselines
    )
    return Section("Terms and baselines", note + tables)


def _precision(result: Mapping[str, Any]) -> Section:
    floors = {"float32": "precision_floor", "float64": "precision_floor/float64"}
    rows = [
        (name, f"{result['precision'][f'{name}_noise']:.1e} nats", shown(result["figures"][key], ".1e"))
        for name, key in floors.items()
        if key in result["figures"]
    ]
    note = (
        '<p class="note">ΔH along the first update on the same rollouts, against its expansion in the finest precision'
        " here: of a large model float32, of a smaller one float64. Norms and"
        " the attention’s softmax stay float32 inside the model in both.</p>"
    )
    data = {key: x for key, x in result["precision"].items() if not key.endswith("_noise")}
    return Section(
        "How small a change shows",
        note + parts.table("Rounding", ("arithmetic", "noise of ΔH", "smallest rate"), rows),
        compact({**data, "lr": result["about"]["lr"]}, 6),
        "rounding.js",
    )


def _theory(result: Mapping[str, Any]) -> Section:
    compared = {"whole": "the whole step", "batch": "the batch’s own part"}
    rows = [
        (
            text(row["theory"]),
            compared[row["part"]],
            f"{row['predicted'] * MILLI:.3g}",
            f"{row['true'] * MILLI:.3g}",
            f"{row['same_sign']} of {row['of']}",
            shown(result["figures"][row["correlation"]], ".2f"),
        )
        for row in result["theory"]
    ]
    note = (
        '<p class="note">−η Cov(log π, πA) and −η Cov(log π, A) over the batch’s tokens (Cui et al., arXiv:2505.22617,'
        " theorems 1 and 2), in thousandths of a nat. The theory is of one logit per state and action, within a state;"
        " here tokens are pooled, states share parameters, and the step is the optimizer’s, in its units.</p>"
    )
    heads = ("theory", "compared with", "predicted", "true", "same sign", "correlation over updates")
    return Section("What tabular theory says", note + parts.table("Theory", heads, rows))
