"""What a training run leaves behind: figures of every step, evaluations on held-out prompts, per-token records, whole
checkpoints.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from tokencredit.budget import UNITS, Budget
from tokencredit.checkpoints import keep_newest, seal
from tokencredit.engines.configs import read_trainer
from tokencredit.engines.processes import part_of
from tokencredit.engines.trainer import Trainer
from tokencredit.exclusive import exclusive
from tokencredit.lm.evaluate import ask, figures_of
from tokencredit.lm.key_values import check_shareable
from tokencredit.lm.models import CausalModel
from tokencredit.lm.policy import Policy
from tokencredit.lm.prompts import completion_text, prompt_text, set_template_options
from tokencredit.lm.room import beside_training
from tokencredit.lm.sampling import Progress
from tokencredit.methods import METHODS
from tokencredit.runs import Run, RunError
from tokencredit.tasks import load, named
from tokencredit.tasks.data import held_out
from tokencredit.tasks.given import Given
from tokencredit.tasks.source import own_source, rows_source
from tokencredit.tasks.task import Row, Task
from tokencredit.train_config import TrainConfig

__all__ = ["RunRecorder"]

UNSAID = Path("trainer_output")
"""Where transformers writes when nobody says where."""
Listener = Callable[[str, dict], None]
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
    "entropy_change/predicted",
    "entropy_change/realised",
    "learned/captured",
    "learned/rollouts",
    "learned/tokens",
    "past_pass_rate",
    "past_pass_rate/known",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
)


UNSAVED, SHARE = 600, 0.02
"""Seconds of training that `train` leaves without a checkpoint, at most; and the share of its time that writing them
may take: those of a large model are further apart.
"""


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


class RunRecorder(TrainerCallback):
    """Makes a run directory of what a `CreditTrainer` does, as `tokencredit train` does, with any model, method and
    reward: `report`, `evaluate` and `dynamics` read it.

        recorder = RunRecorder("runs/mine", task="gsm8k", options={"path": "data/gsm8k"})
        CreditTrainer(..., method=mine, args=GRPOConfig(...), callbacks=[recorder]).train()

    out            the directory. Checkpoints go to out/checkpoints, which becomes the trainer's output_dir, and every
                   step is logged
    task, options  a Task, or what `tasks.load` takes: what is evaluated on, whose roles and reasons stand beside the
                   tokens, and what commands ask the run; without it they need a --task
    name           of the run, the directory's by default
    chat           of evaluation: text prompts are asked as a user's message
    eval_every ... record_rows   as in TrainConfig; evaluation is off by default
    listen         hears "start" or "resume", "step", "evaluating", "evaluation" and "finished", with figures

    Several processes record one run, by the first; they evaluate together, each its part of the prompts. Every record
    says what was spent until then: `seconds` of training alone (generation, scoring and updates, without evaluations
    and without writing), `rollouts` and `tokens` sampled, those that dynamic sampling left out included.

    ValueError where the trainer writes elsewhere, or evaluation is asked for without a task; RunError where `out` holds
    another run, or a finished one. An unfinished one goes on with trainer.train(resume_from_checkpoint=True).
    """

    def __init__(
        self,
        out: str | Path,
        task: str | Task | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
        chat: bool | None = None,
        eval_every: int = 0,
        eval_prompts: int | None = None,
        eval_samples: int | None = None,
        record_every: int = 10,
        record_rows: int = 64,
        listen: Listener | None = None,
    ):
        self.out, self.name = Path(out), name or Path(out).resolve().name
        self.command = shlex.join(sys.argv)
        self.task = load(task, **(options or {})) if isinstance(task, str) else task
        told = (task, dict(options or {})) if isinstance(task, str) else named(task) if task else ("", {})
        self._told = {"task": told[0], "task_options": told[1], "chat": chat}
        self._told |= {"eval_every": eval_every, "eval_prompts": eval_prompts, "eval_samples": eval_samples}
        self._told |= {"record_every": record_every, "record_rows": record_rows}
        self.listen = listen or (lambda event, figures: None)
        self.config: TrainConfig | None = None
        self.rows: Sequence[Row] | None = None
        self.held_out: Sequence[Row] | None = None
        self.trainer: Trainer | None = None
        self.run: Run | None = None
        self.spent, self.mark, self._since = dict.fromkeys(UNITS, 0), 0, time.perf_counter()
        self.seen: set[tuple] = set()
        self.memory: int | None = None
        self.saves_between = False
        self._saved, self._saving, self._waited = 0.0, 0.0, time.perf_counter()
        self.began = self.opened = False
        self._hold = ExitStack()

    def attach(self, trainer: Trainer) -> None:
        """What `CreditTrainer` calls when it is made: the trainer records into this run from now on."""
        args, folder, given = trainer.args, self.out / "checkpoints", Path(trainer.args.output_dir)
        if given.resolve() not in [path.resolve() for path in (UNSAID, self.out, folder)]:
            raise ValueError(
                f"the run is recorded in {self.out}, its checkpoints in {folder}: leave output_dir out, or set it to"
                f" that; it is {args.output_dir}"
            )
        self.kept, args.save_total_limit = args.save_total_limit, None  # `keep_newest` removes whole checkpoints alone
        args.output_dir, args.logging_steps, args.logging_strategy = str(folder), 1, "steps"
        if given == UNSAID and given.is_dir() and not any(given.iterdir()):
            given.rmdir()  # transformers makes it whether it is used or not
        self.trainer, self.config = trainer, self.config or read_trainer(trainer, **self._told)
        self.every = self.config.updates * self.config.minibatches
        self.budget = Budget.of(self.config.budget)
        set_template_options(trainer._tokenizer, args.chat_template_kwargs)
        self.policy = Policy(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer._tokenizer,
            self.task or Given(),
            trainer.temperature,
            trainer.max_completion_length,
            self.config.chat,
            self.config.model,
        )
        if self.config.eval_every:
            self._check_evaluation()
        if self.config.record_every and trainer.record is None:
            trainer.record, trainer.record_every = self.record, self.config.record_every * self.every

    def _check_evaluation(self) -> None:
        if self.task is None:
            raise ValueError("eval_every evaluates on a task's held-out prompts: name a task, or eval_every=0")
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise ValueError(
                "a model in parts on several processes is not evaluated while it is trained: eval_every=0, and"
                f" `tokencredit evaluate --model {self.out}` afterwards"
            )
        try:
            check_shareable(self.policy.model)
        except ValueError as error:
            raise ValueError(f"an evaluation samples prefixes, and {error}: set eval_every=0") from error
        if self.held_out is None:
            self.held_out = held_out(self.task, self.config.eval_prompts, self.config.eval_part)
            self.policy.encode_rows(self.held_out)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the run this one and no other."""
        c = self.config
        own = c.method in METHODS
        return {
            "name": self.name,
            "method": repr(c.build_method() if own else self.trainer._start),
            "method_name": c.method,
            "task": c.task,
            "model": c.model,
            "config": c.as_dict(),
            "seed": c.seed,
            "command": self.command,
            "verifier": own_source(self.task) if self.task else None,
            "rests_on": {f"the data of {c.task}": rows_source(self.task)} if self.task else {},
        }

    def open(self, step: int) -> None:
        """Record into the run of `out`, which holds what was done until `step` and nothing later."""
        spent, seen = None, None
        if self.trainer.accelerator.is_main_process:
            self.run = self.run or Run.create(self.out, **self.identity)
            self.run.truncate_after(step)
            spent = {k: v for record in self.run.metrics()[-1:] for k, v in record.items() if k in UNITS}
            seen = {(e["step"], e.get("split")) for e in self.run.evaluations()}
        spent, self.seen = broadcast_object_list([spent, seen])
        self.spent, self.opened = self.spent | spent, True
        self._saved = self.spent["seconds"]
        self.mark = self.budget.mark(self.spent) if self.budget else 0
        self.listen("resume" if step else "start", {"step": step})

    def on_train_begin(self, args, state, control, model: CausalModel | None = None, **_):
        if self.trainer is None:
            raise RuntimeError("give the recorder to the trainer when it is made: CreditTrainer(callbacks=[recorder])")
        self.began = True
        if not self.opened:
            self._begin(state.global_step)
        if state.global_step == 0:
            self._evaluate(0, model)

    def _begin(self, step: int) -> None:
        """Holds the directory and opens the run, for a trainer that was started by its user."""
        self.config = read_trainer(self.trainer, **self._told)  # now it knows how many steps it makes
        if self.trainer.accelerator.is_main_process:
            self._hold.enter_context(exclusive(self.out))
            there = Run.open(self.out) if (self.out / "run.json").exists() else None
            if there and there.status == "finished":
                raise RunError(f"{self.out} holds a finished run: choose another directory")
        self.open(step)

    def on_train_end(self, args, state, control, **_):
        if self.run:
            self.run.finish("finished")
        self._hold.close()
        self.listen("finished", {"step": state.global_step})

    def on_step_begin(self, args, state, control, **_):
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.spent["seconds"] += time.perf_counter() - self._since
        if self.saves_between and state.global_step % self.every == 0:
            unsaved = self.spent["seconds"] - self._saved > max(UNSAVED, self._saving / SHARE)
            [control.should_save] = broadcast_object_list([control.should_save or unsaved])
        self._waited = time.perf_counter()

    def on_log(self, args, state, control, logs=None, model: CausalModel | None = None, **_):
        if not logs or "loss" not in logs:
            return
        if (state.global_step - 1) % self.every == 0:  # the other steps use the same rollouts again
            self.spent |= {unit: self.spent[unit] + int(logs[f"sampled_{unit}"]) for unit in ("rollouts", "tokens")}
        record = {"step": state.global_step, **self.spent} | {k: logs[k] for k in METRICS if k in logs}
        if self.run:
            self.run.log_metrics(record)
        refuse_divergence(state.global_step, logs["loss"], model, self.config.learning_rate)
        self.listen("step", record)
        if self._due(state, control):
            self._evaluate(state.global_step, model)
        self._waited = time.perf_counter()

    def _due(self, state, control) -> bool:
        """Whether to evaluate now; a run whose budget is spent is told to end."""
        if state.global_step % self.every:
            return False
        if self.budget:  # the first process's clock decides for all
            [self.spent] = broadcast_object_list([self.spent])
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
        self.trainer.accelerator.wait_for_everyone()  # every process writes into it
        self._saved, self._saving = self.spent["seconds"], time.perf_counter() - self._waited
        if self.run:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            keep_newest(args.output_dir, self.kept)

    def record(self, batch: dict) -> None:
        """Per-token records of the first groups of a rollout batch (the step is the one whose rollouts they are)."""
        began = time.perf_counter()
        self.run.write_tokens(
            batch["step"], [self._row(batch, i) for i in range(min(self.config.record_rows, len(batch["texts"])))]
        )
        self._since += time.perf_counter() - began

    def _row(self, batch: dict, i: int) -> dict:
        known = batch["rows"][i] if self.rows is None else self.rows[batch["rows"][i]["row"]]
        mask = batch["mask"][i]
        ids = batch["completion_ids"][i][mask].tolist()
        row = {
            "group": batch["group"][i],
            "prompt": prompt_text(batch["prompts"][i]),
            "completion": completion_text(batch["texts"][i]),
            "reward": batch["reward"][i],
            "success": batch["success"][i],
            "reason": self._reason(batch, i, known),
            "token_ids": ids,
            "tokens": self.policy.tokens(ids),
            "credit": batch["credit"][i][mask].tolist(),
        }
        row |= {name: score[i][mask].tolist() for name, score in batch["scores"].items()}
        roles = self.policy.roles(known, ids)
        return row if roles is None else row | {"role": roles}

    def _reason(self, batch: dict, i: int, row: Row) -> str:
        """The verifier's, where it agrees with the rewards that trained; else what these say."""
        success = batch["success"][i]
        if self.task is not None:
            verdict = self.task.verify(completion_text(batch["texts"][i]), row, batch["truncated"][i])
            if verdict.correct == success:
                return verdict.reason
        return "correct" if success else "wrong"

    def _evaluate(self, step: int, model: CausalModel) -> None:
        """The prompts are spread over the processes, the first one records; the figures are those of one process."""
        if not self.config.eval_every or (step, "test") in self.seen:
            return
        self.seen.add((step, "test"))
        c, accelerator = self.config, self.trainer.accelerator
        own = part_of(len(self.held_out), accelerator.process_index, accelerator.num_processes)
        rows, trained = self.held_out[own], accelerator.unwrap_model(model)
        policy = replace(self.policy, model=trained, memory=beside_training(trained, self.memory))
        options = {"num_samples": c.eval_samples, "seed": c.seed, "batch": c.eval_batch, "first": own.start}
        heard = self._heard(step, len(rows) * (c.eval_samples + 1))
        answers = gather_object(ask(policy, rows, progress=heard, **options) if rows else [])
        if self.run:
            ks = sorted({1, c.eval_samples or 1})
            figures = figures_of(answers, ks=ks, temperature=policy.temperature)
            record = {"step": step, **self.spent, "split": "test", **figures}
            self.run.log_evaluation(record)
            self.listen("evaluation", record)

    def _heard(self, step: int, total: int) -> Progress:
        """Tells the listener how many of the completions of an evaluation are there, greedy ones among them."""
        done = 0.0

        def heard(rows: float, tokens: int = 0, _: float | None = None) -> None:
            nonlocal done
            done += rows
            self.listen("evaluating", {"step": step, "done": done, "total": total})

        return heard


class RoundsLeft(TrainerCallback):
    """Lets dynamic sampling draw no more rounds than the budget of rollouts has left: methods with and without it spend
    the same.
    """

    def __init__(self, recorder: RunRecorder):
        self.recorder, self.trainer, self.most = recorder, recorder.trainer, recorder.trainer.max_rounds

    def on_step_begin(self, args, state, control, **_):
        budget, config = self.recorder.budget, self.recorder.config
        left = (budget.amount - self.recorder.spent[budget.unit]) // (config.prompts * config.group)
        self.trainer.max_rounds = max(1, min(self.most, int(left)))
