"""Sections of a variance study: the bias-variance plane, the table, signal per credited token, and what sampling tokens
costs.

Everything shown is a figure of the study's `result.json`; names of figures are resolved here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.report.section import Section, compact, duration, scrolling, text
from tokencredit.runs import read_json

COLUMNS = {
    "relative_variance": ("tr Cov / |mean|²", "prompts at which half of the squared batch gradient is noise"),
    "between_prompts": (
        "between prompts",
        "share of the variance that no further rollout of the same prompts takes away",
    ),
    "tokens_apart": (
        "tokens apart",
        "squared norms of the tokens’ terms over that of their sum: 1 if orthogonal, less if they add up",
    ),
    "truth_angle": ("angle to truth", "of the mean gradient to the true policy gradient, degrees"),
    "angle": ("angle to unweighted", "of the mean gradients, degrees"),
    "length": ("length", "of the mean gradient, against the unweighted one"),
    "mse_raw": ("MSE, own length", "of a batch against the true gradient, over its squared norm"),
    "mse": ("MSE, best length", "the same at the best learning rate"),
    "ess_variance": ("ESS, variance", "unweighted rollouts that one weighted rollout is worth, bias apart"),
    "ess": (
        "ESS",
        "the same for the mean squared error at the best length; ∞: no number of unweighted rollouts gets there",
    ),
    "efficiency_ratio": (
        "per token",
        "squared signal over second moment per credited token, against the unweighted gradient",
    ),
}
FAMILIES = {
    "unweighted": (6, ("dapo",)),
    "credit of the rollout": (5, ("grpo", "reinforce", "rloo", "dr_grpo", "otb", "reinforce_pp_baseline")),
    "shaped by entropy": (
        0,
        ("gtpo", "grpo_s", "entropy_advantage", "gtpo_geometric", "grpo_s_geometric", "gtpo_2025_08"),
    ),
    "selects tokens": (1, ("forking_tokens", "random_tokens", "oracle_positions")),
    "samples tokens": (4, ("token_sampling",)),
    "value of the token": (3, ("exact_value", "vineppo")),
}
OTHER = ("weighs tokens", 2)


def sections(directory: str | Path) -> list[Section]:
    """All sections of the study in `directory`."""
    result = read_json(Path(directory) / "result.json")
    return [_about(result), _plane(result), _tables(result), _efficiency(result), _sampling(result)]


def write(directory: Path, out: Path, title: str = "Bias and variance of weighted gradients") -> Path:
    """The study's own page."""
    from tokencredit import report

    return report.write([], out, {}, title=title, extra=sections(directory))


def _about(result: Mapping[str, Any]) -> Section:
    config, blocks = result["config"], result["checkpoints"]
    first = blocks[0]
    along = first["directions"]
    how = f"sketched along {along} directions, norms ± {100 / (2 * along) ** 0.5:.0f} %" if along else "whole"
    truth = {"exact": "from Q − V of every token, by prefix trees", "rloo": "from leave-one-out REINFORCE"}[
        first["truth"]
    ]
    facts = [
        ("Task", config["policy"]["task"]),
        ("Checkpoints", ", ".join(f"{b['label']} ({b['num']['success']:.0%} correct)" for b in blocks)),
        ("Rollouts", f"{config['prompts']} prompts × 2 groups × {config['group']}"),
        ("Unweighted", config["baseline"]),
        ("True policy gradient", truth),
        ("Gradients", f"{first['num']['parameters']:,} parameters, {how}"),
        ("Mean squared errors", f"at {config['batch']} prompts"),
        ("Seed", config["seed"]),
        ("Time", duration(sum(b["seconds"] for b in blocks))),
    ]
    listed = "".join(f'<div class="fact"><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in facts)
    said = "".join(f"<li>{text(finding)}</li>" for finding in result["findings"])
    note = (
        '<p class="note">Intervals: 95 %, jackknife over prompts. Differences named above hold after Holm’s adjustment'
        " over methods.</p>"
    )
    command = f"<p><code>{text(result['command'])}</code></p>"
    return Section("Weighted gradients", f'<dl class="facts">{listed}</dl><ul>{said}</ul>{note}{command}')


def _worlds(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Label -> the methods' block: checkpoints, then the enumerated world."""
    return {block["label"]: block["methods"] for block in result["checkpoints"]} | {
        "exact world": result["exact"]["methods"]
    }


def _figure(result: Mapping[str, Any], name: str | None) -> str:
    """Value and interval; an end that is not finite is ∞, what is not resolved is said to be."""
    figure = result["figures"].get(name)
    if figure is None:
        return "–"
    if figure.get("note"):
        return f'<span class="ends">{text(figure["note"])}</span>'
    value, low, high = (
        "∞" if figure[key] is None else f"{figure[key]:.3g}".replace("-", "−") for key in ("value", "low", "high")
    )
    return value if not figure["num"] else f'{value} <span class="ends">[{low},&nbsp;{high}]</span>'


def _tables(result: Mapping[str, Any]) -> Section:
    head = "".join(f'<th title="{text(why)}">{text(name)}</th>' for name, why in COLUMNS.values())
    body = []
    for label, methods in _worlds(result).items():
        rows = "".join(
            f'<tr><th scope="row">{text(name)}</th><td>{each["tokens"]:.3g}</td>'
            + "".join(f"<td>{_figure(result, each['figures'].get(column))}</td>" for column in COLUMNS)
            + "</tr>"
            for name, each in methods.items()
        )
        heads = f"<tr><th>method</th><th>tokens with weight, per group</th>{head}</tr>"
        table = scrolling(label, f"<table><thead>{heads}</thead><tbody>{rows}</tbody></table>")
        body.append(f"<h3>{text(label)}</h3>{_enumerated(result) if label == 'exact world' else ''}{table}")
    return Section("Bias and variance of every method", "".join(body))


def _enumerated(result: Mapping[str, Any]) -> str:
    found = result["exact"]
    return (
        f'<p class="note">A small transformer whose {found["groups"]:,} groups of {found["group"]} completions are all'
        " enumerated: no sampling, no interval. Methods that draw tokens at random are left out.</p>"
    )


def _family(name: str) -> tuple[str, int]:
    return next(((family, colour) for family, (colour, names) in FAMILIES.items() if name in names), OTHER)


def _plane(result: Mapping[str, Any]) -> Section:
    """A point per method: relative variance across, angle up."""
    axes = {
        "truth_angle": "angle to the true policy gradient, degrees",
        "angle": f"angle to {result['config']['baseline']}, degrees",
    }
    worlds: dict[str, list[dict[str, Any]]] = {}
    for label, methods in _worlds(result).items():
        worlds[label] = [
            {"name": name, "colour": _family(name)[1]}
            | {column: _ends(result, each["figures"][column]) for column in ("relative_variance", *axes)}
            for name, each in methods.items()
            if each["resolved"]
        ]
    worlds = {label: points for label, points in worlds.items() if points}
    legend = {family: colour for family, (colour, _) in FAMILIES.items()} | dict([OTHER])
    note = (
        '<p class="note">To the left: less noise. Down: less bias. The axis of variance is logarithmic; methods whose'
        " mean gradient is not resolved are left out.</p>"
    )
    data = compact({"worlds": worlds, "axes": axes, "legend": legend})
    return Section("Bias against variance", note, data, "variance_plane.js", ("plot.js", "axes.js"))


def _ends(result: Mapping[str, Any], name: str) -> dict[str, float | None]:
    return {key: result["figures"][name][key] for key in ("value", "low", "high")}


def _efficiency(result: Mapping[str, Any]) -> Section:
    bars = {}
    for label, methods in _worlds(result).items():
        named = [
            {"name": name} | _ends(result, each["figures"]["efficiency_ratio"])
            for name, each in methods.items()
            if each["resolved"]
        ]
        if shown := [bar for bar in named if bar["value"] is not None]:
            bars[label] = sorted(shown, key=lambda bar: -bar["value"])
    note = (
        f'<p class="note">Squared projection of the mean gradient on the true one, over E|gradient|², per token with'
        f" weight; "
        f"{text(result['config']['baseline'])} is 1. Tokens without weight cost nothing here.</p>"
    )
    return Section("Signal per credited token", note, compact({"bars": bars}), "bars.js", ("plot.js", "axes.js"))


def _sampling(result: Mapping[str, Any]) -> Section:
    """Cost and added variance over the fraction kept, a line per scheme, and whether draws agree with the formula."""
    worlds, rows = {}, []
    for block in result["checkpoints"]:
        found = block["sampling"]
        worlds[block["label"]] = {
            measure: [
                {"label": scheme, "colour": at, "points": [_ends(result, name) for name in curves[measure]]}
                for at, (scheme, curves) in enumerate(found["curves"].items())
            ]
            for measure in ("cost", "added")
        }
        rows += [
            "<tr><th"
            f' scope="row">{text(block["label"])}</th><td>{text(scheme)}</td><td>{_figure(result, name)}</td></tr>'
            for scheme, name in found["drawn"].items()
        ]
    data = compact({"worlds": worlds, "fractions": result["checkpoints"][0]["sampling"]["fractions"]})
    note = (
        '<p class="note">Tokens kept at random and weighted by 1/q: no bias. Cost: tokens for a given variance; keeping'
        " all is 1. Theory’s optimum is q ∝ |credit| × gradient norm.</p>"
    )
    head = "<thead><tr><th></th><th>drawn</th><th>variance over the formula’s</th></tr></thead>"
    checks = scrolling("Drawn as well", f"<table>{head}<tbody>{''.join(rows)}</tbody></table>")
    body = f"{note}<details><summary>Drawn as well</summary>{checks}</details>"
    return Section("Sampling tokens", body, data, "variance_sampling.js", ("plot.js", "axes.js"))
