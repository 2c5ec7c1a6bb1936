"""Sections of the study of entropy change: what was predicted of several steps, what they did, and over which learning
rates that holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencredit.report.section import Section, compact, duration, number, scrolling, text
from tokencredit.runs import read_json

TERMS = {
    "direct": "the entropy of every token where its prefix stays as it is",
    "path": "other prefixes are met",
    "length": "more or fewer tokens share the entropy",
    "linear": "all three",
    "quadratic": "the next order of the same expansion, at the optimizer’s own rate",
}
MILLI = 1e3


def sections(directory: str | Path) -> list[Section]:
    """All sections of the study in `directory`."""
    result = read_json(Path(directory) / "result.json")
    return [_about(result), _sweep(result), _predicted(result), _terms(result), _precision(result), _theory(result)]


def write(directory: Path, out: Path, title: str = "Predicted and true change of entropy") -> Path:
    """The study's own page."""
    from tokencredit import report

    return report.write([], out, {}, title=title, extra=sections(directory))


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
    listed = "".join(f'<div class="fact"><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in facts)
    said = "".join(f"<li>{text(finding)}</li>" for finding in result["findings"])
    note = '<p class="note">Intervals: 95 %, jackknife, clustered by prompt.</p>'
    return Section(
        "Does the predicted change of entropy come true?",
        f'<dl class="facts">{listed}</dl><ul>{said}</ul>{note}<p><code>{text(result["command"])}</code></p>',
    )


def _sweep(result: Mapping[str, Any]) -> Section:
    """|ΔH| over learning rates, by kind of truth, with what is predicted, what rounding hides and where curvature
    begins.
    """
    updates, rows = [], []
    for k, update in enumerate(result["updates"], start=1):
        linear, quadratic = (result["figures"][update[name]]["value"] for name in ("linear", "quadratic"))
        updates.append(
            {
                "linear": linear,
                "quadratic": quadratic,
                "lr": result["about"]["lr"],
                "rates": update["rates"],
                "floor": update["floor"],
                "reach": result["figures"][update["reach"]],
                "sweep": update["sweep"],
            }
        )
        share = update["vector"]["batch_norm"] / update["vector"]["norm"]
        rows.append(
            (
                k,
                _figure(result, update["slope"], 1, 4),
                number(update["r2"], 6),
                _power(result, update["reach"]),
                f"{share:.2f}",
                text("; ".join(update["flags"]) or "none"),
            )
        )
    note = (
        '<p class="note">Shaded: rounding in float32 makes more than 5 % of the change. Dashed: |quadratic| is half of'
        " |linear|. Bars: 95 %; one that reaches 0 has no lower end. Points of one kind share their rollouts and err"
        " together.</p>"
    )
    table = _table("Updates", ("update", "slope", "R²", "linear range", "batch’s part of |Δθ|", "flags"), rows)
    return Section("Over learning rates", note + table, compact(updates), "sweep.js", ("plot.js", "axes.js"))


def _predicted(result: Mapping[str, Any]) -> Section:
    """Predicted against true, one point per update, and how the errors of small predictions are spread."""
    kinds = {"the step, odd half": ("linear", "true"), "the batch’s own part": ("batch_linear", "batch_true")}
    points = {
        kind: [
            {
                axis: {key: result["figures"][update[name]][key] for key in ("value", "low", "high")}
                for axis, name in zip(("predicted", "true"), names)
            }
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
        (k, *(_figure(result, update[name], MILLI, 3) for name in names))
        for k, update in enumerate(result["updates"], start=1)
    ]
    body = note + _table("Predicted and true", heads, rows)
    return Section("Predicted and true change", body, compact(data), "predicted.js", ("plot.js", "axes.js"))


def _terms(result: Mapping[str, Any]) -> Section:
    """What the prediction is made of, and what the baselines do for it."""
    terms = [(name, _figure(result, result["terms"][name], MILLI, 3), what) for name, what in TERMS.items()]
    baselines = [
        (
            text(row["name"]),
            _figure(result, row["linear"], MILLI, 3),
            number(row["error"] * MILLI),
            "–" if row["spread"] is None else _figure(result, row["spread"], 1, 2),
        )
        for row in result["baselines"]
    ]
    note = (
        f'<p class="note">In thousandths of a nat per token; the typical prediction is '
        f"{number(result['figures']['predicted']['value'] * MILLI)}. Control variates: sums of ∇log π along the"
        " step.</p>"
    )
    heads = (
        "baseline of what is to come",
        "prediction, mean over updates",
        "its standard error, one update",
        f"spread of relative errors from {result['sub_batch']} rollouts",
    )
    tables = _table("Terms", ("term", "mean over updates", "what changes"), terms) + _table(
        "Baselines", heads, baselines
    )
    return Section("Terms and baselines", note + tables)


def _precision(result: Mapping[str, Any]) -> Section:
    floors = {"float32": "precision_floor", "float64": "precision_floor/float64"}
    rows = [
        (name, f"{result['precision'][f'{name}_noise']:.1e} nats", _power(result, key)) for name, key in floors.items()
    ]
    note = (
        '<p class="note">ΔH along the first update on the same rollouts, against its expansion in float64. Norms and'
        " the attention’s softmax stay float32 inside the model in both.</p>"
    )
    data = {key: result["precision"][key] for key in ("factors", "float32_changes", "float64_changes", "expansion")}
    return Section(
        "How small a change shows",
        note + _table("Rounding", ("arithmetic", "noise of ΔH", "smallest rate"), rows),
        compact({**data, "lr": result["about"]["lr"]}, 6),
        "rounding.js",
        ("plot.js", "axes.js"),
    )


def _theory(result: Mapping[str, Any]) -> Section:
    parts = {"whole": "the whole step", "batch": "the batch’s own part"}
    rows = [
        (
            text(row["theory"]),
            parts[row["part"]],
            f"{row['predicted'] * MILLI:.3g}",
            f"{row['true'] * MILLI:.3g}",
            f"{row['same_sign']} of {row['of']}",
            _figure(result, row["correlation"], 1, 2),
        )
        for row in result["theory"]
    ]
    note = (
        '<p class="note">−η Cov(log π, πA) and −η Cov(log π, A) over the batch’s tokens (Cui et al., arXiv:2505.22617,'
        " theorems 1 and 2), in thousandths of a nat. The theory is of one logit per state and action, within a state;"
        " here tokens are pooled, states share parameters, and the step is the optimizer’s, in its units.</p>"
    )
    heads = ("theory", "compared with", "predicted", "true", "same sign", "correlation over updates")
    return Section("What tabular theory says", note + _table("Theory", heads, rows))


def _table(label: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of cells that are HTML already; the first of a row names it."""
    head = "".join(f"<th>{text(name)}</th>" for name in heads)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for name, *cells in rows
    )
    return scrolling(label, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _figure(result: Mapping[str, Any], name: str, scale: float, decimals: int) -> str:
    figure = result["figures"][name]
    value, *ends = (
        None if figure[key] is None else number(scale * figure[key], decimals) for key in ("value", "low", "high")
    )
    return f"{value or '–'}" + ("" if None in ends else f' <span class="ends">[{ends[0]}, {ends[1]}]</span>')


def _power(result: Mapping[str, Any], name: str) -> str:
    """A learning rate with its interval."""
    shown: Sequence[str] = [
        "–" if value is None else f"{value:.1e}".replace("-", "−")
        for value in (result["figures"][name][key] for key in ("value", "low", "high"))
    ]
    return f'{shown[0]} <span class="ends">[{shown[1]}, {shown[2]}]</span>'
