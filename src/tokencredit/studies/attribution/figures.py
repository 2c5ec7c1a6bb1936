"""Arrays of the attribution -> named figures with intervals, and the blocks that the report draws.

Blocks refer to figures by name. Of what the step's own tokens add
up to, intervals are over the step's prompts, as if its rollouts were drawn again at the same gain; of whole changes
they are over the evaluation's prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.agreement.ranks import share_of_top
from tokencredit.agreement.resampling import Bootstrap
from tokencredit.dynamics import diagnostics as of
from tokencredit.dynamics.ablation import without_linear
from tokencredit.dynamics.attribution import GOALS, PARTS, Attribution
from tokencredit.dynamics.exchange import ANY, STEP_KINDS, THIS, Change, rate, verdict
from tokencredit.dynamics.pivotal import ESTIMANDS, TOP, carried
from tokencredit.masked import row_mean
from tokencredit.method import Method
from tokencredit.stats import mean_of_units
from tokencredit.studies.book import Book

DRAWN = 20_000_000
"""Numbers of a bootstrap's weights, draws times tokens, at most: long batches get fewer draws, never fewer than 200."""


@dataclass(frozen=True, eq=False)
class View:
    """The step's tokens laid one after the other. columns {diagnostic: [B, T]}, role per token or None."""

    attribution: Attribution
    columns: Mapping[str, Tensor]
    role: np.ndarray | None
    bootstraps: int
    seed: int

    @classmethod
    def of(
        cls,
        attribution: Attribution,
        columns: Mapping[str, Tensor],
        roles: Sequence[Sequence[str]] | None,
        bootstraps: int,
        seed: int,
    ) -> View:
        role = None if roles is None else np.array([name for row in roles for name in row])
        return cls(attribution, columns, role, bootstraps, seed)

    @property
    def mask(self) -> Tensor:
        return self.attribution.update.batch.rollouts.mask

    @property
    def credited(self) -> Tensor:
        """[B, T] bool: the tokens that have a gradient."""
        return self.attribution.update.coefficient != 0

    def prompt(self, where: Tensor) -> np.ndarray:
        """[N]: the prompt of the tokens that `where` [B, T] selects."""
        return self.attribution.update.batch.rollouts.group_index[:, None].expand_as(where)[where].numpy()

    def boot(self, where: Tensor) -> Bootstrap:
        return self._boot(self.prompt(where))

    def share(self, goal: str, where: Tensor) -> np.ndarray:
        return self.attribution.shares[goal][where].numpy()

    @cached_property
    def by_row(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Bootstrap]:
        """(means of the diagnostics, sums of the shares, bootstrap) of the rollouts that have a gradient."""
        keep = self.credited.any(1)
        means = {name: row_mean(x, self.mask)[keep].numpy() for name, x in self.columns.items() if name != "position"}
        means["length"] = self.mask.sum(1)[keep].double().numpy()
        sums = {goal: share.sum(1)[keep].numpy() for goal, share in self.attribution.shares.items()}
        return means, sums, self._boot(self.attribution.update.batch.rollouts.group_index[keep].numpy())

    def _boot(self, cluster: np.ndarray) -> Bootstrap:
        return Bootstrap(cluster, min(self.bootstraps, max(200, DRAWN // max(len(cluster), 1))), self.seed)


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """What became of one method: `counterfactual.consequences`, the rollouts it kept, which of its own parts act here,
    and an earlier method whose coefficients times a factor are its own."""

    method: Method
    arrays: Mapping[str, np.ndarray]
    rollouts: int
    acting: Mapping[str, bool] = field(default_factory=dict)
    twin: tuple[str, float] | None = None


def attribution_blocks(view: View, book: Book) -> dict[str, Any]:
    """Everything about the step itself."""
    a, whole = view.attribution, view.boot(view.mask)
    parts = {
        goal: {
            part: book.enter(f"change/{goal}/{part}", a.estimate(goal, part), unit, over="evaluation prompts")
            for part in (*PARTS, "total")
        }
        for goal, unit in GOALS.items()
    }
    tails = {goal: _heaviest(sum(a.parts[part][goal] for part in PARTS)) for goal in GOALS}
    success = a.update.batch.rollouts.success[:, None].expand_as(view.mask)[view.mask].numpy()
    groups = {"successes": success, "failures": ~success}
    roles = {} if view.role is None else {name: view.role == name for name in sorted(set(view.role.tolist()))}
    rows, sums, _ = view.by_row
    keep = view.credited.any(1)
    sequences = {goal: values.tolist() for goal, values in sums.items()} | {
        "success": a.update.batch.rollouts.success[keep].tolist(),
        "prompt": a.update.batch.rollouts.group_index[keep].tolist(),
        "length": rows["length"].tolist(),
    }
    return {
        "parts": parts,
        "tails": tails,
        "outcomes": _sums("outcome", groups, view, whole, book),
        "roles": _sums("role", roles, view, whole, book),
        "diagnostics": _diagnostics(view, book),
        "covariance": _covariance(view, book),
        "concentration": _concentration(view, book),
        "sequences": sequences,
    }


def _heaviest(values: np.ndarray) -> float | None:
    """The part of the squared deviations that one prompt makes: near 1, an interval rests on it alone."""
    gap = np.square(values - values.mean())
    return float(gap.max() / gap.sum()) if gap.sum() > 0 else None


def _enter_sum(name: str, unit: str, found: Mapping[str, Any], book: Book) -> dict[str, Any]:
    over = {"over": "the step's prompts"}
    return {
        "tokens": found["tokens"],
        "sum": book.enter(f"{name}/sum", found["sum"], unit, **over),
        "negative": book.enter(f"{name}/negative", found["negative"], "share of tokens", **over),
    }


def _sums(kind: str, groups: Mapping[str, np.ndarray], view: View, boot: Bootstrap, book: Book) -> dict[str, dict]:
    return {
        name: {
            goal: _enter_sum(f"{kind}/{name}/{goal}", unit, of.summed(view.share(goal, view.mask), inside, boot), book)
            for goal, unit in GOALS.items()
        }
        for name, inside in groups.items()
        if inside.any()
    }


def _diagnostics(view: View, book: Book) -> dict[str, dict]:
    """{"tokens" or "sequences": {target: {diagnostic: figure}}}."""
    boot, where = view.boot(view.credited), view.credited
    levels = {
        "tokens": (
            {name: x[where].numpy() for name, x in view.columns.items()},
            {goal: view.share(goal, where) for goal in GOALS},
            boot,
        ),
        "sequences": view.by_row,
    }
    found = {}
    for level, (columns, shares, boot) in levels.items():
        targets = shares | {f"size of {goal}": np.abs(x) for goal, x in shares.items()}
        found[level] = {
            target: {
                name: book.enter(
                    f"diagnostic/{level}/{target}/{name}",
                    each["estimate"],
                    "rank correlation",
                    p=each["p"],
                    holm=each["holm"],
                )
                for name, each in some.items()
            }
            for target, some in of.rank_correlations(columns, targets, boot).items()
        }
    return found


def _covariance(view: View, book: Book) -> dict[str, dict]:
    """Do tokens of high covariance lower entropy? By group of tokens, and by how often the sign is what the tabular
    picture says.
    """
    where, boot = view.credited, view.boot(view.credited)
    share, column = (
        view.share("entropy", where),
        {name: view.columns[name][where].numpy() for name in ("covariance", "tabular")},
    )
    groups = of.by_covariance(column["covariance"], share, boot)
    predictions = {
        "−covariance (natural gradient)": -column["covariance"],
        "tabular (plain gradient)": column["tabular"],
    }
    signs = {
        name: {
            kind: book.enter(f"sign/{name}/{kind}", each, "share", over="the step's prompts")
            for kind, each in of.agreement_in_sign(x, share, boot).items()
        }
        for name, x in predictions.items()
    }
    unit = GOALS["entropy"]
    return {
        "groups": {name: _enter_sum(f"covariance/{name}", unit, each, book) for name, each in groups.items()},
        "signs": signs,
    }


def _concentration(view: View, book: Book) -> dict[str, str]:
    """{goal: what the 2 % of tokens that do most make of all that is done, Σ |share|}."""
    found = {}
    for goal in GOALS:
        size = np.abs(view.share(goal, view.mask))
        boot = view.boot(view.mask)
        found[goal] = book.enter(
            f"concentration/{goal}",
            boot.estimate(share_of_top(size, size, 0.02, boot.weights, per_token=False)),
            "share of Σ |share|",
            over="the step's prompts",
        )
    return found


def methods_block(found: Sequence[Counterfactual], book: Book) -> list[dict[str, Any]]:
    """Every method against the first one, by step and over this batch or any batch. An undefined ratio is None."""
    length = float(found[0].arrays["length"])
    baseline = {step: Change.of(found[0].arrays, step, length) for step in STEP_KINDS}
    block = []
    for each in found:
        entry: dict[str, Any] = {
            "name": each.method.name,
            "summary": each.method.summary,
            "rollouts": each.rollouts,
            "twin": each.twin,
            "acting": dict(each.acting),
            "length": float(each.arrays["length"]) / length,
            "clip": float(each.arrays["clip"]),
            "steps": {},
        }
        for step in STEP_KINDS:
            own = Change.of(each.arrays, step, length)
            entry["steps"][step] = {
                over: _step(f"method/{each.method.name}/{step}/{over}", own, baseline[step], over, book)
                for over in (THIS, ANY)
            }
        block.append(entry)
    return block


def _step(name: str, own: Change, baseline: Change, over: str, book: Book) -> dict[str, Any]:
    ratio = "nats per token and unit of reward"
    found: dict[str, Any] = {
        goal: book.enter(f"{name}/{goal}", own.estimate(goal, over), unit, over=over) for goal, unit in GOALS.items()
    }
    slope, rated = own.slope(over), rate(own, baseline, over) if own is not baseline else None
    found["slope"] = None if slope is None else book.enter(f"{name}/entropy per reward", slope, ratio, over=over)
    if own.same(baseline):
        return found | {"difference": None, "rate": None, "verdict": "the same step"}
    gap = own - baseline
    found["difference"] = {
        goal: book.enter(f"{name}/{goal} minus baseline", gap.estimate(goal, over), unit, over=over)
        for goal, unit in GOALS.items()
    }
    found["rate"] = (
        None if rated is None else book.enter(f"{name}/entropy kept per reward given up", rated, ratio, over=over)
    )
    return found | {"verdict": verdict(own, baseline, over)}


def without_block(
    view: View, sets: Mapping[str, Tensor], found: Mapping[str, Mapping[str, np.ndarray]], book: Book
) -> list[dict]:
    """What the step's change would gain or lose without some tokens: by linearity, and with gain and clipping made
    anew.
    """
    total = int(view.mask.sum())
    return [
        {
            "name": name,
            "tokens": int(sets[name].sum()),
            "share": float(sets[name].sum() / total),
            "linear": without_linear(view.attribution, sets[name]),
            "exact": {
                goal: book.enter(
                    f"without/{name}/{goal}", mean_of_units(arrays[f"exact/{goal}"]), unit, over="evaluation prompts"
                )
                for goal, unit in GOALS.items()
            },
        }
        for name, arrays in found.items()
    ]


def pivotal_block(view: View, known: Mapping[str, Tensor], stored: bool, book: Book) -> dict[str, Any] | None:
    """What the tokens that decide carry of the change, beside what the uncertain ones carry; None without a token of
    known pivotality.
    """
    where = view.credited & torch.stack([known[name].isfinite() for name in ESTIMANDS]).all(0)
    if not where.any():
        return None
    boot, over = view.boot(where), {"over": "the step's prompts"}
    columns = {"|Q − V|": known["before_after"], "spread": known["spread"]} | {
        name: view.columns[name] for name in ("entropy", "surprisal", "tabular")
    }
    flat = {name: x[where].abs().numpy() for name, x in columns.items()}
    width = float(known["width"][where].mean()) if "width" in known else None
    block: dict[str, Any] = {
        "source": "a stored run" if stored else "prefix trees",
        "tokens": int(where.sum()),
        "prompts": boot.num_clusters,
        "width": width,
        "goals": {},
    }
    for goal, unit in GOALS.items():
        share, name = view.share(goal, where), f"pivotal/{goal}"
        found = carried(flat, share, boot)
        top = _on_top(flat["|Q − V|"])
        sums = {
            kind: _enter_sum(f"{name}/{kind}", unit, of.summed(share, inside, boot), book)
            for kind, inside in (("top 20 % by |Q − V|", top), ("the others", ~top))
        }
        block["goals"][goal] = {
            "captured": {
                column: book.enter(f"{name}/captured/{column}", each, "share of Σ |share|", **over)
                for column, each in found["captured"].items()
            },
            "spearman": {
                column: book.enter(f"{name}/spearman/{column}", each, "rank correlation", **over)
                for column, each in found["spearman"].items()
            },
            "compared": {
                column: {
                    "holm": each["holm"],
                    "figure": book.enter(
                        f"{name}/captured/{column} minus entropy",
                        each["difference"],
                        "difference",
                        p=each["p"],
                        holm=each["holm"],
                        **over,
                    ),
                }
                for column, each in found["compared"].items()
            },
            "sums": sums,
        }
    return block


def _on_top(x: np.ndarray) -> np.ndarray:
    chosen = np.zeros(len(x), bool)
    chosen[np.argsort(-x, kind="stable")[: max(1, round(TOP * len(x)))]] = True
    return chosen
