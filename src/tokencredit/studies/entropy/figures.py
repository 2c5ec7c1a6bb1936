"""The measured updates -> named figures with intervals over prompts, and the blocks that the report draws.

The error of an update's prediction is divided by the root mean square true change of all updates: one that changes
nothing would make its own ratio meaningless, and leaving it out would choose the result. Errors over each update's own
change stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.durable import write_parquet
from tokencredit.dynamics.measured import Measured, combined, mean
from tokencredit.dynamics.precision import DTYPES
from tokencredit.dynamics.to_go import BASELINES
from tokencredit.dynamics.true_change import COLLAPSED
from tokencredit.stats import Estimate, cluster_bootstrap
from tokencredit.studies.book import Book
from tokencredit.studies.entropy.findings import findings
from tokencredit.studies.entropy.measure import BEST, Arrays
from tokencredit.studies.entropy.statistics import (
    KINDS,
    OUTSIDE,
    ROUNDING,
    UpdateStatistics,
    pooled_ratio,
    relative_errors,
    scale,
    sub_errors,
    theory,
)

NATS = "nats per token"
UNKNOWN = Estimate(np.nan, np.nan, np.nan, 0)
CARRIERS = 10
"""Prompts that carry an error, below which its interval is called doubtful."""


def figures(
    updates: Sequence[UpdateStatistics], rounding: Mapping[str, np.ndarray], size: int, book: Book
) -> dict[str, Any]:
    """Everything that the result holds besides its figures, which go into the book."""
    lr = float(updates[0].arrays["lr"])
    noise = {name: float(rounding[f"{name}_noise"]) for name in DTYPES if f"{name}_noise" in rounding}
    floors = [noise["float32"] / (ROUNDING * abs(u.linear().value)) for u in updates]
    _slopes(updates, floors, book)
    _errors(updates, size, book)
    typical = combined(_rms, [u.linear() for u in updates])
    for name, each in noise.items():
        floor = combined(lambda x, e=each: e * lr / (ROUNDING * _rms(x)), [u.linear() for u in updates])
        book.enter(
            "precision_floor" + ("" if name == "float32" else f"/{name}"), floor.estimate(), "learning rate", noise=each
        )
    reach = combined(
        lambda x: OUTSIDE * lr * _rms(x[: len(updates)]) / _rms(x[len(updates) :]),
        [*(u.linear() for u in updates), *(u.quadratic for u in updates)],
    )
    book.enter("linear_range", reach.estimate(), "learning rate")
    book.enter("predicted", typical.estimate(), NATS)
    result = {
        "updates": [_update(k, u, floor, book) for k, (u, floor) in enumerate(zip(updates, floors))],
        "terms": _terms(updates, book),
        "baselines": _baselines(updates, size, book),
        "theory": _theory(updates, book),
        "sub_errors": [x.tolist() for x in sub_errors(updates, BASELINES.index(BEST))],
        "sub_batch": size,
        "precision": {name: np.asarray(x).tolist() for name, x in rounding.items()},
    }
    return result | {"findings": findings(result, book.figures)}


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


def _slopes(updates: Sequence[UpdateStatistics], floors: Sequence[float], book: Book) -> None:
    """Mean over the updates that have one of the slope, and the smallest R²: of the odd half-differences, and of the
    changes themselves.
    """
    for kind in KINDS:
        for odd, name in ((True, ""), (False, "/whole")):
            found = [slope for u, floor in zip(updates, floors) if (slope := u.slope(kind, floor, odd))]
            whole = mean([slope for slope, _ in found]).estimate() if found else UNKNOWN
            book.enter(f"slope/{kind}{name}", whole, "log |ΔH| per log rate")
            least = min((r2 for _, r2 in found), default=np.nan)
            book.enter(
                f"r2/{kind}{name}",
                Estimate(least, np.nan, np.nan, len(found)),
                "share of variance, least of all updates",
            )
    book.figures |= {name: book.figures[f"{name}/independent"] for name in ("slope", "r2")}


def _errors(updates: Sequence[UpdateStatistics], size: int, book: Book) -> None:
    unit = "share of the root mean square true change"
    for part, name in (("", ""), ("batch_", "/batch")):
        errors = relative_errors(updates, part)
        book.enter(f"relative_error_mean{name}", errors["typical"].estimate(), unit)
        book.enter(f"relative_error_mean{name}/own", errors["own"].estimate(), "share of each true change")
        book.enter(f"predicted_over_true{name}", pooled_ratio(updates, part), "ratio of sums over updates")
        column = BASELINES.index(BEST) if not part else 0
        book.enter(f"relative_error_spread_{size}{name}", _spread(sub_errors(updates, column, part), book.seed), unit)
    whole = [u.own.whole for u in updates]
    for name, parts in (
        ("linear", [[u.linear()] for u in updates]),
        ("quadratic", [[u.linear(), u.quadratic] for u in updates]),
    ):
        terms = [combined(lambda x: float(x.sum()), each) for each in parts]
        num = len(updates)
        error = combined(lambda x, n=num: float((x[:n] - x[n:]).mean()) / scale(x[n:]), [*terms, *whole])
        book.enter(f"relative_error_mean/whole/{name}", error.estimate(), unit)


def _spread(errors: Sequence[np.ndarray], seed: int) -> Estimate:
    """Standard deviation of the errors of all updates' sub-batches, whole ones drawn again for the interval."""
    flat = np.concatenate(errors)
    return cluster_bootstrap(lambda rows: float(flat[rows].std(ddof=1)), np.arange(len(flat)), num=1000, seed=seed)


def _update(k: int, u: UpdateStatistics, floor: float, book: Book) -> dict[str, Any]:
    """One update: predictions, truths, its sweep, and what is wrong with it."""
    lr, a = float(u.arrays["lr"]), u.arrays
    named = {
        "linear": u.linear(),
        "quadratic": u.quadratic,
        "true": u.own.odd,
        "true_whole": u.own.whole,
        "batch_linear": u.linear(part="batch_"),
        "batch_true": u.own_batch,
    }
    block = {name: book.enter(f"update/{k}/{name}", each.estimate(), NATS) for name, each in named.items()}
    slope = u.slope("independent", floor)
    block["slope"] = book.enter(f"update/{k}/slope", slope[0].estimate() if slope else UNKNOWN, "log |ΔH| per log rate")
    block["r2"] = slope[1] if slope else None
    reach = u.reach()
    block["reach"] = book.enter(
        f"update/{k}/linear_range",
        Estimate(reach.value * lr, reach.low * lr, reach.high * lr, reach.num),
        "learning rate",
    )
    sweep = {
        kind: [{"whole": _point(t.whole), "odd": _point(t.odd), "size": t.size} for t in truths]
        for kind, truths in u.sweep.items()
    }
    sizes = {kind: float(a[f"{kind}_size"].min() / len(a[f"{kind}_rest"])) for kind in KINDS[:2]}
    vector = dict(zip(("norm", "batch_norm", "momentum_norm", "cosine", "clip"), a["vector"].tolist()))
    block |= {
        "rates": [lr * factor for factor in u.factors],
        "sweep": sweep,
        "floor": lr * floor,
        "inside": u.inside(floor),
        "effective_share": sizes,
        "vector": vector,
    }
    return block | {
        "flags": [
            *_flags(u, reach, sizes),
            *([] if slope else ["fewer than 3 rates are inside its linear range: no slope"]),
        ]
    }


def _point(measured: Measured) -> dict[str, float]:
    return {"value": measured.value, "error": measured.error}


def _flags(u: UpdateStatistics, reach: Estimate, sizes: Mapping[str, float]) -> list[str]:
    found = []
    if reach.low < 1:
        state = "is" if reach.value < 1 else "may be"
        found.append(
            f"its own learning rate {state} outside the linear range: |quadratic| is {OUTSIDE / reach.value:.2g} of"
            " |linear|"
        )
    for kind, share in sizes.items():
        if share < COLLAPSED:
            found.append(
                f"the importance weights of the {kind} rollouts collapse within the sweep: their effective sample size"
                f" falls to {share:.1%} of the rollouts"
            )
    if not u.own.odd.resolved:
        found.append("its true change is not resolved from 0")
    if (carriers := u.linear().carriers) < CARRIERS:
        found.append(
            f"the error of its prediction rests on the equivalent of {carriers:.0f} prompts: the interval may be too"
            " narrow"
        )
    return found


def _terms(updates: Sequence[UpdateStatistics], book: Book) -> dict[str, str]:
    """Mean over updates of every term of the linear prediction, and of the quadratic one."""
    parts = {name: [u.term(name) for u in updates] for name in ("direct", "path", "length")}
    parts |= {"linear": [u.linear() for u in updates], "quadratic": [u.quadratic for u in updates]}
    return {name: book.enter(f"term/{name}", mean(each).estimate(), NATS) for name, each in parts.items()}


def _baselines(updates: Sequence[UpdateStatistics], size: int, book: Book) -> list[dict[str, Any]]:
    """Mean prediction with each baseline and with control variates, its mean standard error, and the spread of small
    batches.
    """
    rows = []
    for column, name in enumerate(BASELINES):
        parts = [u.linear(name) for u in updates]
        spread = book.enter(
            f"relative_error_spread_{size}/{name}",
            _spread(sub_errors(updates, column), book.seed),
            "share of the root mean square true change",
        )
        rows.append(
            {
                "name": name,
                "error": _rms(np.array([part.error for part in parts])),
                "spread": spread,
                "linear": book.enter(f"baseline/{name}", mean(parts).estimate(), NATS),
            }
        )
    parts = [u.with_variates for u in updates]
    rows.append(
        {
            "name": f"{BEST}, with control variates",
            "error": _rms(np.array([part.error for part in parts])),
            "spread": None,
            "linear": book.enter("baseline/control_variates", mean(parts).estimate(), NATS),
        }
    )
    return rows


def _theory(updates: Sequence[UpdateStatistics], book: Book) -> list[dict[str, Any]]:
    """What tabular theory makes of the updates: its prediction over the truth, and the correlation over updates."""
    found, rows = theory(updates), []
    for name in ("policy gradient", "natural gradient"):
        for part in ("whole", "batch"):
            x, y = found[name], found[part]
            rows.append(
                {
                    "theory": name,
                    "part": part,
                    "predicted": float(x.mean()),
                    "true": float(y.mean()),
                    "correlation": book.enter(
                        f"theory/{name}/{part}/correlation", _correlation(x, y), "correlation over updates"
                    ),
                    "same_sign": int((np.sign(x) == np.sign(y)).sum()),
                    "of": len(x),
                }
            )
    return rows


def _correlation(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Pearson's, with Fisher's interval; NaN for fewer than four updates."""
    if len(x) < 4 or not (x.std() and y.std()):
        return Estimate(np.nan, np.nan, np.nan, len(x))
    r = float(np.corrcoef(x, y)[0, 1])
    half = 1.96 / np.sqrt(len(x) - 3)
    low, high = np.tanh(np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)) + np.array([-half, half]))
    return Estimate(r, float(low), float(high), len(x))


def write_rollouts(path: Path, updates: Sequence[Arrays]) -> None:
    """A row per evaluation rollout: its entropy and tokens, what it says of the step, and its prompt's fresh
    completions on either side.
    """
    import pyarrow

    columns: dict[str, list[np.ndarray]] = {}
    for k, a in enumerate(updates):
        plus, minus = a["fresh_own"][0]
        own = {
            "update": np.full(len(a["prompt"]), k),
            "prompt": a["prompt"],
            "entropy": a["rest_entropy"],
            "length": a["rest_length"],
            "direct": a["direct"],
            "path": a[f"path_{BEST}"],
            "length_slope": a[f"length_{BEST}"],
            "fresh_plus_entropy": plus[:, 0],
            "fresh_plus_length": plus[:, 1],
            "fresh_minus_entropy": minus[:, 0],
            "fresh_minus_length": minus[:, 1],
        }
        for name, x in own.items():
            columns.setdefault(name, []).append(x)
    write_parquet(path, pyarrow.table({name: np.concatenate(parts) for name, parts in columns.items()}))
