"""What a training run leaves behind: figures of every step, evaluations on held-out prompts, per-token records, whole
checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainerCallback

from tokencredit.budget import UNITS, Budget
from tokencredit.checkpoints import keep_newest, seal
from tokencredit.engines.trainer import Trainer
from tokencredit.lm.evaluate import evaluate
from tokencredit.lm.models import CausalModel
from tokencredit.lm.policy import Policy
from tokencredit.lm.prompts import completion_text, prompt_text
from tokencredit.runs import Run
from tokencredit.tasks.task import Row
from tokencredit.train_config import TrainConfig

Listener = Callable[[str, dict], None]
KEPT = 2
"""Checkpoints of a run: the last one, and the one to fall back on."""
METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "reward",
    "pass_rate",
    "entropy",
    "length",
    "truncated",
    "clip_low",
    "clip_high",
    "kl",
    "credit_against_outcome",
    "credited_tokens",
    "credited_share",
    "credit_mean",
    "credit_std",
    "zero_variance_groups",
    "uncredited_groups",
    "tokens_per_second",
    "seconds_generation",
    "seconds_scoring",
    "seconds_update",
    "seconds_importance",
    "dynamic_sampling/rounds",
    "dynamic_sampling/drawn_groups",
    "dynamic_sampling/filled_groups",
    "noise_scale",
    "noise_scale/signal",
    "noise_scale/noise",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
)


class Diverged(RuntimeError):
    """A run whose weights or loss are no longer numbers."""


def refuse_divergence(step: int, loss: float, model: CausalModel, learning_rate: float) -> None:
    """Diverged where the loss or a trained weight is NaN or infinite; before a checkpoint of the step is written."""
    sums = [p.detach().sum(dtype=torch.float32).cpu() for p in model.parameters() if p.requires_grad]
    wrong = ["the loss"] * (not math.isfinite(loss)) + ["the weights"] * (not torch.stack(sums).isfinite().all())
    if wrong:
        raise Diverged(
            f"step {step}: {' and '.join(wrong)} became NaN or infinite. Lower learning_rate (it is"
            f" {learning_rate:g}), or bound a step with a smaller trl.max_grad_norm, in another directory"
        )


class Recorder(TrainerCallback):
    """Writes what a run does into its directory, once `open` has said which; a callback of the trainer and its
    `record`.

    Every record says what was spent until then: `seconds` of training alone (generation, scoring and updates, without
    evaluations and without writing), `rollouts` and `tokens` sampled, those that dynamic sampling left out included.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        held_out: list[Row],
        listen: Listener,
    ):
        self.config, self.policy, self.held_out, self.listen = config, policy, held_out, listen
        self.every = config.updates * config.minibatches
        self.budget = Budget.of(config.budget)
        self.spent, self.mark, self._since = dict.fromkeys(UNITS, 0), 0, time.perf_counter()
        self.run: Run | None = None
        self.seen: set[tuple] = set()
        self.began = False

    def open(self, run: Run) -> None:
        """Record into this run, after what it already holds."""
        self.run = run
        self.spent |= {
            unit: number for record in run.metrics()[-1:] for unit, number in record.items() if unit in UNITS
        }
        self.mark = self.budget.mark(self.spent) if self.budget else 0
        self.seen = {(e["step"], e.get("split")) for e in run.evaluations()}

    def on_train_begin(self, args, state, control, model: CausalModel | None = None, **_):
        self.began = True
        if state.global_step == 0:
            self._evaluate(0, model)

    def on_step_begin(self, args, state, control, **_):
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.spent["seconds"] += time.perf_counter() - self._since

    def on_log(self, args, state, control, logs=None, model: CausalModel | None = None, **_):
        if not logs or "loss" not in logs:
            return
        if (state.global_step - 1) % self.every == 0:  # the other steps use the same rollouts again
            self.spent |= {unit: self.spent[unit] + int(logs[f"sampled_{unit}"]) for unit in ("rollouts", "tokens")}
        record = {"step": state.global_step, **self.spent} | {k: logs[k] for k in METRICS if k in logs}
        self.run.log_metrics(record)
        refuse_divergence(state.global_step, logs["loss"], model, self.config.learning_rate)
        self.listen("step", record)
        if self._due(state, control):
            self._evaluate(state.global_step, model)

    def _due(self, state, control) -> bool:
        """Whether to evaluate now; a run whose budget is spent is told to end."""
        if state.global_step % self.every:
            return False
        last = state.global_step == state.max_steps
        if self.budget is None:
            return last or bool(
                self.config.eval_every and state.global_step // self.every % self.config.eval_every == 0
            )
        before, self.mark = self.mark, self.budget.mark(self.spent)
        if self.mark == self.budget.marks:
            control.should_training_stop = control.should_save = True
        return last or self.mark > before

    def on_save(self, args, state, control, **_):
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        keep_newest(args.output_dir, self.config.trl.get("save_total_limit", KEPT))

    def record(self, batch: dict) -> None:
        """Per-token records of the first groups of a rollout batch (the step is the one whose rollouts they are)."""
        began = time.perf_counter()
        self.run.write_tokens(
            batch["step"], [self._row(batch, i) for i in range(min(self.config.record_rows, len(batch["texts"])))]
        )
        self._since += time.perf_counter() - began

    def _row(self, batch: dict, i: int) -> dict:
        mask = batch["mask"][i]
        ids = batch["completion_ids"][i][mask].tolist()
        row = {
            "group": batch["group"][i],
            "prompt": prompt_text(batch["prompts"][i]),
            "completion": completion_text(batch["texts"][i]),
            "reward": batch["reward"][i],
            "success": batch["success"][i],
            "reason": batch["reasons"][i],
            "token_ids": ids,
            "tokens": self.policy.tokens(ids),
            "credit": batch["credit"][i][mask].tolist(),
        }
        row |= {name: score[i][mask].tolist() for name, score in batch["scores"].items()}
        roles = self.policy.roles(batch["rows"][i], ids)
        return row if roles is None else row | {"role": roles}

    def _evaluate(self, step: int, model: CausalModel) -> None:
        if not self.config.eval_every or (step, "test") in self.seen:
            return
        c = self.config
        figures = evaluate(
            replace(self.policy, model=model),
            self.held_out,
            num_samples=c.eval_samples,
            ks=sorted({1, c.eval_samples}),
            seed=c.seed,
            batch=c.eval_batch,
        )
        record = {"step": step, **self.spent, "split": "test", **figures}
        self.run.log_evaluation(record)
        self.seen.add((step, "test"))
        self.listen("evaluation", record)


class RoundsLeft(TrainerCallback):
    """Lets dynamic sampling draw no more rounds than the budget of rollouts has left: methods with and without it spend
    the same.
    """

    def __init__(self, trainer: Trainer, recorder: Recorder):
        self.trainer, self.recorder, self.most = trainer, recorder, trainer.max_rounds

    def on_step_begin(self, args, state, control, **_):
        budget, config = self.recorder.budget, self.recorder.config
        left = (budget.amount - self.recorder.spent[budget.unit]) // (config.prompts * config.group)
        self.trainer.max_rounds = max(1, min(self.most, int(left)))
