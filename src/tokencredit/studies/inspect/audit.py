"""The logged credit against what a token really did: Q − V of a sample of the logged completions, by re-sampling.

    reached    Σ of (Q − V)² over the 20 % of tokens with the largest |c|, over Σ (Q − V)²
    explained  (Σ c (Q − V))² / (Σ c² Σ (Q − V)²), the share of Σ (Q − V)² in the direction of the credit

Squares are unbiased: each less its own variance. Intervals are over prompts; a token's own, over its rollouts. A token
without an alternative has no effect, exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokencredit.agreement.ranks import share_of_top
from tokencredit.agreement.resampling import Bootstrap, compare
from tokencredit.lm.fingerprint import model_hash
from tokencredit.lm.policy import Policy
from tokencredit.lm.sampling import Trace
from tokencredit.logs import LoggedRollout
from tokencredit.pivotality.budgets import Fixed
from tokencredit.pivotality.estimator import discoveries
from tokencredit.pivotality.measure import MeasuredTrace, measure
from tokencredit.pivotality.store import RolloutStore, sampler_identity
from tokencredit.studies.book import Book
from tokencredit.studies.inspect.sample import LoggedStep
from tokencredit.studies.inspect.source import Missing
from tokencredit.tasks.source import task_source
from tokencredit.tasks.task import Endless, Recognising, Row, Task

TOP = 0.2
SHOWN = 10
AROUND = 8
"""Tokens that are shown before and after a mistake."""
FEW = 5
"""Tokens with a sure effect below which nothing is said of signs."""
CHANCE = "chance"
NEGLIGIBLE = 0.02
"""Size of an effect that nobody minds: a sure one is surely larger."""


def task_rows(task: Task, logged: Sequence[LoggedRollout]) -> list[Row | None]:
    """What the task knows of every rollout's prompt: with the answer that was logged, where there is one; None where
    the task does not know the prompt.
    """
    if isinstance(task, Recognising):
        return [task.row_of(each.prompt) if isinstance(each.prompt, str) else None for each in logged]
    if all(each.answer is not None for each in logged):
        return [{**each.others, "prompt": each.prompt, "answer": each.answer} for each in logged]
    if isinstance(task, Endless) or task.name == "given":
        return [None] * len(logged)
    known = {str(row["prompt"]): row for split in ("train", "test") for row in task.rows(split)}
    return [known.get(str(each.prompt)) for each in logged]


@dataclass(frozen=True, eq=False)
class Audited:
    """Completions of a step that were measured. row [n]: which of the step's; tokens are laid one after the other [N].

    effect, error   of Q − V, 0 where a token has no alternative; low, high its interval; square, unbiased
    prompt          the group of every token
    """

    row: np.ndarray
    trace: np.ndarray
    position: np.ndarray
    prompt: np.ndarray
    effect: np.ndarray
    error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sure: np.ndarray
    generated: int

    @property
    def square(self) -> np.ndarray:
        return self.effect**2 - self.error**2

    def along(self, x: Any) -> np.ndarray:
        """[N]: a column [B, T] of the step, on these tokens."""
        return x[self.row[self.trace], self.position].double().numpy()


def candidates(step: LoggedStep, policy: Policy, rows: Sequence[Row | None], seed: int) -> list[int]:
    """The completions that can be measured, in random order: whole, all the policy's own, and of a known prompt."""
    encoded, limit = step.encoded, policy.max_new_tokens
    fits = []
    for i, ids in enumerate(encoded.completion_ids):
        ended = ids[-1] in policy.ends or len(ids) == limit
        inner = any(token in policy.ends for token in ids[:-1])
        if rows[i] is not None and all(encoded.mask[i]) and ended and not inner and len(ids) <= limit:
            fits.append(i)
    return np.random.default_rng(seed).permutation(fits).astype(int).tolist() if fits else []


def affordable(lengths: Sequence[int], rollouts: int, tokens: int) -> list[int]:
    """Of completions in this order, those that fit into the tokens that may be generated: a rollout after each of T
    tokens is taken to be as long as the rest, T²/2 in all. Missing where not even one does.
    """
    found, left = [], float(tokens)
    for k, length in enumerate(lengths):
        cost = rollouts * length * (length + 1) / 2
        if cost <= left:
            found.append(k)
            left -= cost
    if not found:
        least = rollouts * min(lengths) * (min(lengths) + 1) / 2
        raise Missing(
            f"the audit may generate {tokens:,} tokens, and {rollouts} rollouts of every token of the shortest"
            f" completion take about {least:,.0f}: raise --tokens, or lower --rollouts"
        )
    return found


def verified(policy: Policy, step: LoggedStep, rows: Sequence[Row | None], chosen: Sequence[int]) -> float:
    """How often the task's verdict on a chosen completion is the outcome that was logged."""
    ids = step.encoded.completion_ids
    verdicts = [policy.verdict(ids[i], rows[i], ids[i][-1] not in policy.ends).correct for i in chosen]
    return float(np.mean([bool(each) == bool(step.rollouts.success[i]) for each, i in zip(verdicts, chosen)]))


def generation_speed(policy: Policy, step: LoggedStep, num: int = 64) -> float:
    """Tokens per second of `num` completions of the step's prompts, sampled now."""
    prompts = list(step.encoded.prompt_ids[:num])
    policy.complete(prompts[:2], 1, seed=0)
    start = time.perf_counter()
    found = policy.complete(prompts, 1, seed=0, batch=256)
    return sum(len(each.ids) for some in found for each in some) / (time.perf_counter() - start)


def effects_grid(a: Audited, step: LoggedStep) -> torch.Tensor:
    """[B, T] Q − V; NaN where it was not measured."""
    grid = torch.full(step.mask.shape, torch.nan, dtype=torch.float64)
    grid[torch.from_numpy(a.row[a.trace]), torch.from_numpy(a.position)] = torch.from_numpy(a.effect)
    return grid


def measured(
    step: LoggedStep,
    policy: Policy,
    rows: Sequence[Row | None],
    chosen: Sequence[int],
    *,
    rollouts: int,
    store: Path,
    model: str,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[MeasuredTrace]:
    """The chosen completions, token by token; rollouts are kept in `store`, so that a killed audit goes on."""
    encoded = step.encoded
    traces = [Trace(tuple(encoded.prompt_ids[i]), tuple(encoded.completion_ids[i])) for i in chosen]
    own = [rows[i] for i in chosen]
    sampler = policy.sampler(256)
    identity = sampler_identity(
        type(sampler).__name__,
        sampler.settings,
        sampler.ends,
        model=model,
        model_digest=model_hash(policy.model),
        verifier=policy.task.name,
        verifier_source=task_source(policy.task),
        max_new_tokens=policy.max_new_tokens,
    )

    def judge(k: int, ids: tuple[int, ...], truncated: bool) -> Any:
        return policy.verdict(ids, own[k], truncated)

    kept = RolloutStore(store, identity, labels=[str(sorted(map(str, row.items()))) for row in own])
    return measure(
        traces,
        sampler,
        judge,
        budget=Fixed(rollouts),
        max_new_tokens=policy.max_new_tokens,
        store=kept,
        seed=seed,
        progress=progress,
    )


def audited(step: LoggedStep, chosen: Sequence[int], found: Sequence[MeasuredTrace]) -> Audited:
    """Their tokens in one row."""
    effects = [m.estimate.before_after for m in found]
    columns = {
        name: np.nan_to_num(np.concatenate([getattr(each, name) for each in effects]))
        for name in ("value", "standard_error", "low", "high")
    }
    p = np.concatenate([each.p_value for each in effects])
    lengths = [len(m.trace.completion) for m in found]
    group = step.rollouts.group_index.numpy()
    trace = np.repeat(np.arange(len(found)), lengths)
    return Audited(
        np.array(chosen),
        trace,
        np.concatenate([np.arange(length) for length in lengths]),
        group[np.array(chosen)][trace],
        columns["value"],
        columns["standard_error"],
        columns["low"],
        columns["high"],
        discoveries(p) & (np.minimum(np.abs(columns["low"]), np.abs(columns["high"])) >= NEGLIGIBLE),
        sum(m.generated for m in found),
    )


def audit_block(
    a: Audited,
    step: LoggedStep,
    credits: Mapping[str, Any],
    proxies: Mapping[str, Any],
    book: Book,
    num: int,
    seed: int,
) -> dict[str, Any]:
    """Figures of every credit and proxy [B, T], against the effects; the first credit is the one whose mistakes are
    shown.
    """
    boot, square = Bootstrap(a.prompt, num, seed), a.square
    total = boot.estimate(boot.sums(square) / boot.num_clusters)
    signed = {name: a.along(x) for name, x in credits.items()}
    sizes = {name: np.abs(x) for name, x in signed.items()} | {name: np.abs(a.along(x)) for name, x in proxies.items()}
    # A column without differences counts every token in part: exactly what a choice that knows nothing reaches.
    sizes[CHANCE] = np.zeros(len(square))
    block: dict[str, Any] = {
        "tokens": len(square),
        "completions": len(a.row),
        "prompts": boot.num_clusters,
        "generated": a.generated,
        "sure": int(a.sure.sum()),
        "squares": book.enter("audit/Σ (Q − V)² by prompt", total, "reward²", over="prompts"),
        "resolved": bool(total.low > 0),
        "of": next(iter(credits)),
        "reached": {},
        "explained": {},
        "signs": {},
        "mistakes": [],
    }
    if not block["resolved"]:
        return block
    draws = {name: share_of_top(x, square, TOP, boot.weights, per_token=False) for name, x in sizes.items()}
    for name, x in draws.items():
        block["reached"][name] = book.enter(
            f"audit/reached/{name}", boot.estimate(x), "share of Σ (Q − V)²", over="prompts"
        )
    for what, baseline in (("chance", CHANCE), ("over", block["of"])):
        block[what] = {
            name: book.enter(
                f"audit/reached/{name} minus {baseline}", each["difference"], "difference", holm=each["holm"]
            )
            for name, each in compare(boot, draws, baseline).items()
        }
    for name, x in signed.items():
        block["explained"][name] = book.enter(
            f"audit/explained/{name}", boot.estimate(_explained(x, a, boot)), "share of Σ (Q − V)²", over="prompts"
        )
        if a.sure.sum() >= FEW:
            wrong = a.sure & (x != 0) & (np.sign(x) != np.sign(a.effect))
            share = boot.sums(wrong.astype(float)) / np.where((n := boot.sums(a.sure.astype(float))) > 0, n, np.nan)
            block["signs"][name] = book.enter(
                f"audit/wrong sign/{name}", boot.estimate(share), "share of tokens with a sure effect", over="prompts"
            )
    block["mistakes"] = mistakes(a, step, signed[block["of"]])
    return block


def _explained(x: np.ndarray, a: Audited, boot: Bootstrap) -> np.ndarray:
    """[1 + num]; the square of the sum less the variance of its errors, as if tokens were independent."""
    along, noise, size, square = boot.sums(np.stack([x * a.effect, (x * a.error) ** 2, x * x, a.square], 1)).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (along**2 - noise) / np.where((size > 0) & (square > 0), size * square, np.nan)


def mistakes(a: Audited, step: LoggedStep, credit: np.ndarray, num: int = SHOWN) -> list[dict[str, Any]]:
    """The clearest: tokens with a sure effect of the other sign than their credit, by how far from 0 it surely is."""
    wrong = np.flatnonzero(a.sure & (credit != 0) & (np.sign(credit) != np.sign(a.effect)))
    least = np.minimum(np.abs(a.low), np.abs(a.high))
    found = []
    for k in wrong[np.argsort(-least[wrong], kind="stable")][:num].tolist():
        i, at = int(a.row[a.trace[k]]), int(a.position[k])
        pieces = step.pieces[i]
        found.append(
            {
                "place": step.encoded.logged[i].place,
                "position": at,
                "before": "".join(pieces[max(0, at - AROUND) : at]),
                "token": pieces[at],
                "after": "".join(pieces[at + 1 : at + 1 + AROUND]),
                "credit": float(credit[k]),
                "effect": [float(a.effect[k]), float(a.low[k]), float(a.high[k])],
                "success": bool(step.rollouts.success[i]),
            }
        )
    return found
