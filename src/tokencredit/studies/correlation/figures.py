"""Draws of the correlation study -> named figures with intervals, and the blocks that the report draws.

The name of a figure says source, estimand, measure and proxy. Blocks refer to figures by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tokencredit.agreement.moments import UNRESOLVED
from tokencredit.agreement.resampling import Bootstrap, compare
from tokencredit.studies.book import Book
from tokencredit.studies.correlation import conditions
from tokencredit.studies.correlation.proxy_figures import Draws, Sampled, Tokens, split_figures

UNITS = {
    "spearman": "correlation",
    "spearman_within": "correlation",
    "kendall": "correlation",
    "partial": "correlation",
    "corrected": "correlation",
    "corrected_ranks": "correlation",
    "auroc": "probability",
    "average_precision": "precision",
    "precision_few": "share of tokens",
    "precision_top": "share of tokens",
    "captured": "share of squared effect",
    "base_rate": "share of tokens",
    "limit": "correlation",
    "ece": "probability",
    "overconfidence": "probability",
    "success": "probability",
    "entropy": "nats",
    "captured_spread": "share of squared effect",
    "signed": "share of variance",
    "squared": "share of variance",
}
COMPARED = ("spearman", "captured", "corrected_ranks")
BASELINE = "entropy"
CONTROL = "(chance)"


def law_block(book: Book, total: np.ndarray, spread: np.ndarray, prompt: np.ndarray, num: int) -> dict[str, str]:
    """Σ before_after² and V₀(1 − V₀) per completion, and their difference, over prompts with two completions or
    more.
    """
    known = np.isfinite(spread)
    if not known.any():
        return {}
    boot = Bootstrap(prompt[known], num, book.seed)
    ones = boot.sums(np.ones(known.sum()))
    draws = {"sum_of_squares": boot.sums(total[known]) / ones, "success_variance": boot.sums(spread[known]) / ones}
    draws["difference"] = draws["sum_of_squares"] - draws["success_variance"]
    return {name: book.enter(f"law/{name}", boot.estimate(each), "probability²") for name, each in draws.items()}


def estimand_block(
    book: Book, source: str, estimand: str, figures: Draws, boot: Bootstrap, sampled: Sampled | None = None
) -> dict:
    """{"measures": {measure: {proxy: name}}, "comparisons", ...} of one estimand from one source."""
    names = {
        measure: {
            proxy: book.enter(f"{source}/{estimand}/{measure}/{proxy}", boot.estimate(draws), UNITS[measure])
            for proxy, draws in each.items()
        }
        for measure, each in figures.items()
    }
    block = {
        "measures": names,
        "comparisons": {
            m: _compared(book, f"{source}/{estimand}/{m}", figures[m], boot) for m in COMPARED if m in figures
        },
    }
    if sampled is None:
        return block
    prefix = f"{source}/{estimand}"
    curve, few = sampled.curve, Bootstrap(boot.cluster, len(next(iter(sampled.curve.limit.values()))) - 1, boot.seed)
    limit = {
        proxy: book.enter(f"{prefix}/limit/{proxy}", few.estimate(draws), "correlation")
        for proxy, draws in curve.limit.items()
    }
    points = {proxy: [asdict(few.estimate(draws)) for draws in each] for proxy, each in curve.draws.items()}
    return block | {
        "noise_only": {
            proxy: book.null(f"{prefix}/noise_only/{proxy}", null) for proxy, null in sampled.noise_only.items()
        },
        "permuted": {proxy: book.null(f"{prefix}/permuted/{proxy}", null) for proxy, null in sampled.permuted.items()},
        "limit": limit,
        "curve": {"rollouts": curve.rollouts, "points": points, "constant": curve.constant},
        "ceiling": book.null(f"{prefix}/ceiling", sampled.ceiling) if sampled.ceiling else None,
        "reliability": {
            kind: book.enter(f"{prefix}/reliability/{kind}", boot.estimate(draws), UNITS[kind])
            for kind, draws in sampled.reliability.items()
        },
        "resolved": sampled.resolved,
        "verdict": "resolved" if sampled.resolved else UNRESOLVED,
    }


def _compared(book: Book, prefix: str, draws: Mapping[str, np.ndarray], boot: Bootstrap) -> dict[str, dict]:
    """Every proxy against entropy, paired, with Holm's adjustment; the control and the oracle are no candidates."""
    candidates = {name: each for name, each in draws.items() if not name.startswith("(")}
    found = compare(boot, candidates, BASELINE)
    return {
        name: {
            "holm": each["holm"],
            "figure": book.enter(
                f"{prefix}/{name} minus {BASELINE}", each["difference"], "difference", p=each["p"], holm=each["holm"]
            ),
        }
        for name, each in found.items()
    }


def validation_block(book: Book, estimand: str, sampled: Sampled, known: Draws, boot: Bootstrap) -> dict:
    """The sampled figures minus the exact ones, paired by prompt: what the rollouts' noise does, and what its
    correction undoes.
    """
    pairs = {"spearman (naive)": (sampled.figures["spearman"], known["spearman"])}
    pairs |= {name: (sampled.figures[name], known[name]) for name in ("corrected", "corrected_ranks", "captured")}
    if "auroc" in sampled.figures:
        pairs |= {"auroc (soft labels)": (sampled.figures["auroc"], known["auroc"])}
    block = {}
    for name, (measured, truth) in pairs.items():
        differences = {
            proxy: measured[proxy] - truth[proxy] for proxy in measured if proxy in truth and proxy != CONTROL
        }
        entered = {
            proxy: book.enter(f"validation/{estimand}/{name}/{proxy}", boot.estimate(each), "difference")
            for proxy, each in differences.items()
        }
        covers = [book.figures[figure].low <= 0 <= book.figures[figure].high for figure in entered.values()]
        block[name] = {
            "differences": entered,
            "covers_zero": int(sum(covers)),
            "of": len(covers),
            "mean_error": float(np.mean([abs(each[0]) for each in differences.values()])) if differences else None,
        }
    return block


def splits_block(book: Book, estimand: str, tokens: Tokens, effect: np.ndarray, config: Any) -> dict:
    """{group: {"tokens", "prompts", "spearman": {proxy: name}, "captured": {...}}}."""
    block = {}
    for group, found in split_figures(tokens, effect, min(config.bootstraps, 400), config.seed, top=config.top).items():
        block[group] = {key: found[key] for key in ("tokens", "prompts")}
        for measure in ("spearman", "captured"):
            if measure in found:
                prefix, boot = f"split/{group}/{estimand}/{measure}", found["bootstrap"]
                block[group][measure] = {
                    proxy: book.enter(f"{prefix}/{proxy}", boot.estimate(draws), UNITS[measure])
                    for proxy, draws in found[measure].items()
                }
    return block


def conditions_block(rows: Sequence[dict[str, Any]], book: Book) -> dict:
    """The table of conditions, and the hypothesis over all of them and over those that are policies or temperatures."""
    table = []
    for row in rows:
        boot = row["bootstrap"]
        figures = {
            name: book.enter(f"condition/{row['label']}/{name}", boot.estimate(draws), UNITS[name])
            for name, draws in row["draws"].items()
        }
        table.append(
            {
                "label": row["label"],
                "kind": row["kind"],
                "prompts": row["prompts"],
                "tokens": row["tokens"],
                "curve": row["curve"],
                "expected_ece": row["expected_ece"],
                "figures": figures,
            }
        )
    tests = {}
    kinds = {"all conditions": rows, "policies and temperatures": [row for row in rows if row["kind"] != "difficulty"]}
    for name, some in kinds.items():
        boot = Bootstrap(np.arange(max(row["prompts"] for row in some)), len(some[0]["draws"]["ece"]) - 1, book.seed)
        tests[name] = {"conditions": len(some)} | {
            agreement: book.enter(
                f"hypothesis/{name}/{agreement}",
                boot.estimate(conditions.across(some, agreement)),
                "correlation",
                p=conditions.permutation_p(some, agreement),
            )
            for agreement in conditions.AGREEMENT
        }
    return {"rows": table, "hypothesis": tests}
