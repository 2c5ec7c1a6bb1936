"""What the TRL engine logs: figures of a rollout batch, figures of an update, and where the seconds went."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import TrainerCallback

from tokencredit.engines.trl_groups import GatheredBatch
from tokencredit.masked import over, zero_off
from tokencredit.rollouts import Rollouts
from tokencredit.silence import without_credit

PHASES = ("generation", "scoring", "update")
EXTREMES = {"ratio_max": max, "ratio_min": min, "clip_low_min": min, "clip_high_max": max}
TRL_NAMES = {
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clip_low_min": "clip_ratio/low_min",
    "clip_high_max": "clip_ratio/high_max",
}
CISPO_NAME = "cispo_clip_ratio"


class Clock(TrainerCallback):
    """Seconds of optimizer steps by phase, each without the phases inside it; evaluation, logging and checkpoints are
    not counted.

    "update" is what is left of a step: forward, backward and the optimizer. On an accelerator, work that is still
    queued when a phase ends is counted in the next one.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.tokens = 0.0
        self._inside, self._step_began = 0.0, None

    @contextmanager
    def phase(self, name: str):
        began, before, self._inside = time.perf_counter(), self._inside, 0.0
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            self._count(name, elapsed)
            self._inside = before + elapsed

    def on_step_begin(self, args, state, control, **_):
        self._inside, self._step_began = 0.0, time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if self._step_began is not None:
            self._count("update", time.perf_counter() - self._step_began)
        self._step_began = None

    def _count(self, name: str, elapsed: float) -> None:
        if self._step_began is not None:
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inside

    def take(self) -> dict[str, float]:
        """Seconds by phase, and completion tokens trained on per second of them, since the last call."""
        figures = {f"seconds_{phase}": self.seconds[phase] for phase in PHASES}
        total = sum(figures.values())
        figures["tokens_per_second"] = self.tokens / total if total > 0 else 0.0
        self.seconds, self.tokens = dict.fromkeys(PHASES, 0.0), 0.0
        return figures


def rollout_figures(batch: GatheredBatch, rollouts: Rollouts, credit: Tensor) -> dict[str, float]:
    """Figures of a rollout batch, moved off the device at once.

    reward, pass_rate, length, truncated and the two sampled_ numbers describe everything that was sampled, what dynamic
    sampling left out included; the others the rollouts that are trained on. credited_tokens is the effective number
    (Σ|c|)² / Σc².
    """
    mask, given = rollouts.mask, credit != 0
    tokens = mask.sum().to(credit.dtype)
    against = given & ((credit > 0) != rollouts.success[:, None])
    mean = over(credit.sum(), tokens)
    variance = over(zero_off((credit - mean).square(), mask).sum(), (tokens - 1).clamp(min=0))
    drawn = [
        torch.cat([getattr(b, name) for b in batch.drawn or (batch,)]).float()
        for name in ("reward", "length", "truncated")
    ]
    figures = {
        "reward": drawn[0].mean(),
        "pass_rate": (drawn[0] > rollouts.success_above).float().mean(),
        "length": drawn[1].mean(),
        "truncated": drawn[2].mean(),
        "sampled_rollouts": drawn[1].new_tensor(len(drawn[1])),
        "sampled_tokens": drawn[1].sum(),
        "zero_variance_groups": (~rollouts.informative).float().mean(),
        "uncredited_groups": without_credit(credit, rollouts).float().mean(),
        "credit_against_outcome": over(against.sum().to(credit.dtype), given.sum().to(credit.dtype)),
        "credited_tokens": over(credit.abs().sum().square(), credit.square().sum()),
        "credit_mean": mean,
        "credit_std": variance.sqrt(),
    }
    if "entropy" in rollouts.scores:
        figures["entropy"] = over(rollouts.scores["entropy"].sum(), tokens)
    return dict(zip(figures, torch.stack([f.float() for f in figures.values()]).tolist()))


def update_figures(accelerator, pending: list[dict[str, Tensor]]) -> dict[str, float]:
    """Stats of the micro-batches of one optimizer step over all processes, weighted by tokens, moved off the device at
    once.

    Every micro-batch comes with `in_loss`, `credited` and `tokens`: how many tokens were in its loss, how many have
    credit, and how many it has. Clip fractions and entropy refer to all tokens (what carries no credit is not clipped),
    the other stats to those in the loss.
    """
    names = sorted(pending[0])
    local = torch.stack([torch.stack([stats[name].float() for name in names]) for stats in pending])
    column = dict(zip(names, zip(*accelerator.gather(local).tolist())))
    in_loss, credited, tokens = column.pop("in_loss"), column.pop("credited"), column.pop("tokens")
    figures = {"tokens": sum(tokens), "credited_share": sum(credited) / max(sum(tokens), 1)}
    for name, values in column.items():
        weights, total = (
            (tokens if name == "entropy" else in_loss),
            (tokens if name == "entropy" or name.startswith("clip") else in_loss),
        )
        mean = sum(value * weight for value, weight in zip(values, weights)) / max(sum(total), 1)
        figures[name] = EXTREMES[name](values) if name in EXTREMES else mean
    return figures


def as_trl(figures: Mapping[str, float]) -> dict[str, float]:
    """The clip figures of an update under the names by which TRL logs them, for those who look there.

    TRL counts a ratio of whole sequences (GSPO) by sequence, these count it by token; everything else is the same.
    """
    if "clip_high_gain" in figures:
        return {CISPO_NAME: figures["clip_high_gain"]}
    named = {name: figures[own] for own, name in TRL_NAMES.items() if own in figures}
    return named | ({"clip_ratio/region_mean": figures["clip_low"] + figures["clip_high"]} if named else {})
