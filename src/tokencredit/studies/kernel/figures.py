"""The figures of the kernel study: influence by learning rate, the diagonal against the rest, pairs, spectrum; and what
the page draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.influence import over_prompts, r2_over_prompts, slope
from tokencredit.dynamics.kernel import cosines
from tokencredit.dynamics.kernel_pairs import effective_rank, pair_table, spectrum, top_share
from tokencredit.dynamics.kernel_shares import EDGES, SharedChange, share_figures
from tokencredit.figure import Figure
from tokencredit.studies.book import Book
from tokencredit.studies.kernel.measurement import KernelMeasurement, at_units, unit_rows
from tokencredit.studies.kernel.question import KernelConfig
from tokencredit.studies.kernel.ties import tie_rows

POINTS = 400
SEQUENCES = 64
GOOD = 0.99
"""R² from which a prediction is said to hold."""


def study_of(
    checkpoint: Checkpoint, config: KernelConfig, m: KernelMeasurement, book: Book
) -> tuple[dict[str, Any], dict[str, list[dict]]]:
    """(what the page draws, {table: rows}); figures go into the book."""
    change = None if m.noise else SharedChange.of(m.own, m.units)
    credit = at_units(-m.update.coefficient, m.units)
    tokens = config.level == "tokens"
    probability = np.exp(at_units(m.update.batch.rollouts.score("logprob").double(), m.units)) if tokens else None
    influence = _influence(config, m, book)
    found = {} if change is None else share_figures(change, credit, probability)
    shares = {name: book.enter(f"change/{name}", e, _unit(name)) for name, e in found.items()}
    pairs = pair_table(m.kernel, m.units)
    spectra = {name: _spectrum(book, name, k, m) for name, k in (("kernel", m.kernel), ("cosines", cosines(m.kernel)))}
    book.number("noise", m.noise, "cosine", config.directions)
    rows, cosine = _completions(m)
    ties = tie_rows(checkpoint, m.update.batch, rows, cosine)
    parts = {"coefficient": -credit} | ({} if change is None else {**change.parts, "total": change.total})
    tables = {
        "pairs": [_pair_row(each) for each in pairs],
        "ties": ties,
        "senders": [
            row | {name: float(x[i]) for name, x in parts.items()}
            for i, row in enumerate(unit_rows(checkpoint, m.update.batch, m.units))
        ],
        "held_out": [
            row | {"predicted": float(m.held["all"][i]), "real": m.held["real"][:, i].tolist()}
            for i, row in enumerate(unit_rows(checkpoint, m.held_batch, m.held_units))
        ],
    }
    num = {
        "senders": len(m.units),
        "rollouts": len(np.unique(m.units.row)),
        "prompts": len(np.unique(m.units.prompt)),
        "held_out": len(m.held_units),
        "held_prompts": len(np.unique(m.held_units.prompt)),
        "parameters": sum(p.numel() for p in m.update.passes.parameters.values()),
    }
    study = {
        "influence": influence,
        "shares": shares,
        "pairs": _pairs(book, pairs),
        "spectra": spectra,
        "num": num,
        "lr": m.update.lr,
        "clip": m.update.clip,
        "edges": EDGES if tokens else (),
        "noise": m.noise,
        "heat": _heat(checkpoint, m, rows, cosine, tokens),
        "ties": ties,
    }
    return study | {"findings": findings(config, study, book.figures)}, tables


def _influence(config: KernelConfig, m: KernelMeasurement, book: Book) -> dict[str, Any]:
    """R² and slope at every rate, of tokens and of whole completions; the kernel against the forward pass; points to
    draw.
    """
    prompt, rows = m.held_units.prompt, []
    completion, index = np.unique(m.held_units.row, return_inverse=True)
    whole = lambda x: np.bincount(index, x, len(completion))  # noqa: E731
    first = np.array([prompt[m.held_units.row == row][0] for row in completion])
    for factor, real in zip(config.factors, m.held["real"]):
        guess = factor * m.held["all"]
        names = {"r2": book.enter(f"influence/r2/{factor:g}", r2_over_prompts(real, guess, prompt), "R²")}
        rest = factor * (m.held["all"] - m.held["fresh"])
        names["r2_fresh"] = book.enter(
            f"influence/r2_fresh/{factor:g}", r2_over_prompts(real - rest, guess - rest, prompt), "R²"
        )
        names["slope"] = book.enter(
            f"influence/slope/{factor:g}", over_prompts(slope, real, guess, prompt), "real / predicted"
        )
        if config.level == "tokens":
            estimate = r2_over_prompts(whole(real), whole(guess), first)
            names["r2_completions"] = book.enter(f"influence/r2_completions/{factor:g}", estimate, "R²")
        rows.append({"factor": factor, "lr": factor * m.update.lr, **names})
    through, fresh = m.cross.sum(1).numpy(), m.held["fresh"]
    gap = float(np.abs(through - fresh).max() / np.abs(fresh).max())
    book.number("influence/kernel_gap", gap, "largest difference / largest change", len(fresh))
    return {"rates": rows, "points": _points(config, m)}


def _points(config: KernelConfig, m: KernelMeasurement) -> dict[str, Any]:
    """Predicted and real changes of a few hundred units: those that change most, and others at random."""
    guess = m.held["all"]
    order = np.argsort(-np.abs(guess), kind="stable")
    rest = np.random.default_rng(config.seed).permutation(order[POINTS // 4 :])
    some = np.concatenate([order[: POINTS // 4], rest[: POINTS - POINTS // 4]])
    return {
        "predicted": guess[some].tolist(),
        "real": m.held["real"][:, some].tolist(),
        "factors": list(config.factors),
    }


def _unit(name: str) -> str:
    kinds = {
        "share": "share of the squared change",
        "mass": "share of all pushes",
        "token": "mean share of a token’s pushes",
        "sign": "share of tokens",
        "tokens": "share of tokens",
        "of_squared_change": "share of the squared change",
    }
    return kinds.get(name.split("/")[0], "correlation")


def _pairs(book: Book, pairs: list) -> list[dict[str, Any]]:
    rows = []
    for each in pairs:
        prefix = f"pairs/{each.scope}/{each.likeness}"
        names = {
            name: book.enter(f"{prefix}/{name}", getattr(each, name), "cosine")
            for name in ("cosine", "size", "deviation")
        }
        rows.append({"scope": each.scope, "likeness": each.likeness, "num": each.num, **names})
    return rows


def _pair_row(each: Any) -> dict[str, Any]:
    found = {"scope": each.scope, "likeness": each.likeness, "pairs": each.num}
    for name in ("cosine", "size", "deviation"):
        estimate = getattr(each, name)
        found |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return found


def _spectrum(book: Book, name: str, k: Any, m: KernelMeasurement) -> dict[str, Any]:
    values = spectrum(k)
    return {
        "effective_rank": book.enter(
            f"spectrum/{name}/effective_rank", effective_rank(k, m.units, m.noise), "dimensions"
        ),
        "top_share": book.enter(f"spectrum/{name}/top_share", top_share(k, m.units), "share of the trace"),
        "shares": (values / float(k.diagonal().sum())).tolist(),
    }


def _completions(m: KernelMeasurement) -> tuple[np.ndarray, np.ndarray]:
    """(rows [R] that send, their cosines [R, R]): the kernel of tokens summed over completions."""
    rows = np.unique(m.units.row)
    member = (m.units.row[:, None] == rows).astype(float)
    return rows, cosines(m.kernel.new_tensor(member.T @ m.kernel.numpy() @ member)).numpy()


def _heat(
    checkpoint: Checkpoint, m: KernelMeasurement, rows: np.ndarray, cosine: np.ndarray, tokens: bool
) -> dict[str, Any]:
    """Cosines of completions in the order of their prompts and, of tokens, those of two rollouts of one prompt, a right
    and a wrong one.
    """
    batch, units = m.update.batch, m.units
    few = rows[:SEQUENCES]
    outcome, group = batch.rollouts.success.tolist(), batch.rollouts.group_index.tolist()
    found: dict[str, Any] = {
        "completions": {
            "cosine": cosine[: len(few), : len(few)].tolist(),
            "block": [group[i] for i in few],
            "names": [f"prompt {group[i]}, {'right' if outcome[i] else 'wrong'}" for i in few],
        }
    }
    if tokens and (pair := _two(rows, outcome, group)):
        at = np.concatenate([np.flatnonzero(units.row == row) for row in pair])
        words = [word for row in pair for word in checkpoint.policy.tokens(batch.completions[row])]
        found["tokens"] = {
            "cosine": cosines(m.kernel)[at][:, at].tolist(),
            "block": [pair.index(units.row[i]) for i in at],
            "names": words,
        }
    return found


def _two(rows: np.ndarray, outcome: list[bool], group: list[int]) -> list[int] | None:
    """A right and a wrong rollout of the first prompt that has both."""
    for prompt in dict.fromkeys(group[i] for i in rows):
        sides = [[i for i in rows if group[i] == prompt and outcome[i] == side] for side in (True, False)]
        if all(sides):
            return [int(side[0]) for side in sides]
    return None


def findings(config: KernelConfig, study: Mapping[str, Any], figures: Mapping[str, Figure]) -> list[str]:
    """The study in sentences."""
    value = lambda name: figures[name].value  # noqa: E731
    rates, what = study["influence"]["rates"], "tokens" if config.level == "tokens" else "completions"
    good = [row["factor"] for row in rates if value(row["r2"]) >= GOOD]
    reach = f"at least {GOOD} from {good[0]:g} to {good[-1]:g} times the rate" if good else f"nowhere {GOOD}"
    best, own = max(rates, key=lambda row: value(row["r2"])), min(rates, key=lambda row: abs(np.log(row["factor"])))
    said = [
        f"Influence: R² {value(best['r2']):.5f} at {best['factor']:g} of the run's rate, {value(own['r2']):.4f} at"
        f" {own['factor']:g}; " + reach
    ]
    said.append(
        f"Summed over senders, the kernel is the forward pass to {value('influence/kernel_gap'):.1e} of the largest"
        " change"
    )
    if study["noise"]:
        said.append(
            f"The kernel is a sketch: its cosines are within ± {study['noise']:.3f} (one standard error), its sums over"
            " senders are noise, so the diagonal's share is left out"
        )
    else:
        share, token, sign = (_shown(figures[study["shares"][name]]) for name in ("share/own", "token/own", "sign/own"))
        said.append(
            f"Diagonal: own terms make {share} of the squared change of the {what} that send, but {token} of what"
            f" pushes one of them on average; {sign} of them move as their own term says"
        )
    for row in study["pairs"]:
        if row["likeness"] == "all":
            said.append(f"Cosine of two {what}, {row['scope']}: {_shown(figures[row['cosine']])}")
    rank = figures[study["spectra"]["cosines"]["effective_rank"]]
    said.append(f"Effective rank of the cosines: {_shown(rank)} of {study['num']['senders']}")
    return said


def _shown(figure: Figure) -> str:
    return figure.text(".3g" if abs(figure.value) < 100 else ".0f")
