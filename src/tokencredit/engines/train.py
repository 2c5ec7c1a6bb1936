"""Trains a model on a task with a method, and records the run: the job behind `tokencredit train`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig

from tokencredit.engines.config import TrainConfig
from tokencredit.engines.trl import CreditTrainer
from tokencredit.lm.evaluate import encode_prompt, evaluate
from tokencredit.lm.load import COMPLETE, last_checkpoint, load_tokenizer, resolve_model
from tokencredit.runs import Run
from tokencredit.tasks import load

Listener = Callable[[str, dict], None]
METRICS = (
    "loss", "grad_norm", "learning_rate", "reward", "pass_rate", "entropy", "length", "truncated", "clip_low", "clip_high", "kl",
    "credit_against_outcome", "credited_tokens", "credited_share", "credit_mean", "credit_std", "zero_variance_groups", "tokens_per_second",
    "seconds_generation", "seconds_scoring", "seconds_update", "seconds_importance", "dynamic_sampling/rounds",
    "dynamic_sampling/drawn_groups", "dynamic_sampling/filled_groups",
)  # fmt: skip


def train(config: TrainConfig, out: str | Path, *, name: str | None = None, command: str = "", listen: Listener | None = None) -> Run:
    """Train and record a run in the directory `out`; an interrupted run of the same config goes on from its last checkpoint.

    `listen(event, figures)` hears "start", "step", "evaluation", "resume" and "finished". RunError where `out` holds a different run.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    listen = listen or (lambda event, figures: None)
    method = config.build_method()
    task = load(config.task, **config.task_options)
    model_path = resolve_model(config.model)
    run = Run.create(out, name=name or Path(out).name, method=repr(method), method_name=config.method, task=config.task, model=config.model,
                     config=config.as_dict(), seed=config.seed, command=command)  # fmt: skip
    if run.status == "finished":
        listen("finished", {"step": config.steps})
        return run
    tokenizer = load_tokenizer(model_path)
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32 if not torch.cuda.is_available() else "auto")
    checkpoint = last_checkpoint(Path(out) / "checkpoints", clean=True)
    resumed = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    run.truncate_after(resumed)
    recorder = Recorder(run, config, task, tokenizer, listen)
    recorder.seconds = max((m["seconds"] for m in run.metrics()), default=0.0)
    trainer = make_trainer(config, method, task, model, tokenizer, Path(out) / "checkpoints", recorder)
    listen("resume" if resumed else "start", {"step": resumed, "steps": config.optimizer_steps})
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except OSError as error:
        run.finish("failed")
        raise OSError(
            f"{out}: writing failed ({error}). Nothing that was finished is lost: free some space and run the same command again; it goes "
            f"on from {last_checkpoint(Path(out) / 'checkpoints') or 'the start'}"
        ) from error
    run.finish("finished")
    listen("finished", {"step": config.steps})
    return run


def make_trainer(config: TrainConfig, method, task, model, tokenizer, folder: Path, recorder: Recorder) -> CreditTrainer:
    max_new_tokens = completion_limit(config, task)
    rows = config.prompts * config.group
    every = config.updates * config.minibatches
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": rows // config.minibatches, "num_generations": config.group,
        "steps_per_generation": config.minibatches, "num_iterations": config.updates, "gradient_accumulation_steps": 1,
        "max_steps": config.optimizer_steps, "max_completion_length": max_new_tokens, "temperature": config.temperature,
        "learning_rate": config.learning_rate, "lr_scheduler_type": "constant", "adam_beta2": 0.99, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "beta": 0.0, "bf16": torch.cuda.is_available(), "gradient_checkpointing": torch.cuda.is_available(),
        "logging_steps": 1, "save_steps": config.save_every * every, "save_total_limit": 2, "report_to": "none", "seed": config.seed,
        "disable_tqdm": True, "shuffle_dataset": False, "log_level": "error", "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    trainer = CreditTrainer(
        model=model, method=method, args=GRPOConfig(**settings | config.trl), reward_funcs=make_reward(task, tokenizer),
        train_dataset=training_rows(config, task), processing_class=tokenizer, scorers=make_scorers(task, tokenizer, max_new_tokens),
        max_rounds=config.max_rounds, record=recorder.record, record_every=config.record_every * every, callbacks=[recorder],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_reward(task, tokenizer) -> Callable:
    """TRL's reward function of a task's verifier: 1 for correct, 0 otherwise; the verdicts' reasons join TRL's table of completions."""
    end = tokenizer.eos_token_id

    def reward(prompts, completions, completion_ids, log_extra=None, **columns):
        hidden = ("trainer_state", "log_metric", "environments")
        names = [k for k in columns if k not in hidden]
        verdicts = []
        for i, (completion, ids) in enumerate(zip(completions, completion_ids)):
            row = {"prompt": prompts[i]} | {k: columns[k][i] for k in names}
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            verdicts.append(task.verify(text, row, end not in ids))
        if log_extra:
            log_extra("reason", [v.reason for v in verdicts])
        return [float(v.correct) for v in verdicts]

    reward.__name__ = "correct"
    return reward


def make_scorers(task, tokenizer, max_new_tokens: int) -> dict[str, Callable]:
    """Scores beyond a forward pass: `exact_value`, Q − V from the model's own prefix tree, where the world is small enough for it."""

    def exact_value(trainer, inputs, batch):
        from tokencredit.pivotality.tree import exact_value_scores, on_text

        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in inputs]
        verify = [on_text(task.verify, tokenizer, row) for row in inputs]
        names: dict[Any, int] = {}
        group = torch.tensor([names.setdefault(str(row["prompt"]), len(names)) for row in inputs])
        model = trainer.accelerator.unwrap_model(trainer.model)
        training = model.training
        model.eval()
        scores = exact_value_scores(
            model, prompts, batch["completion_ids"].cpu(), batch["completion_mask"].bool().cpu(), group, verify,
            eos_token_id=tokenizer.eos_token_id, max_new_tokens=max_new_tokens, eps=1e-4, temperature=trainer.temperature,
        )  # fmt: skip
        model.train(training)
        return scores.to(batch["completion_ids"].device)

    return {"exact_value": exact_value} if getattr(task, "name", "") == "reckon" else {}


def training_rows(config: TrainConfig, task) -> Dataset:
    """The prompts in the order in which they are used: the same for every method at the same seed."""
    return Dataset.from_list(task.rows("train", config.steps * config.prompts, config.seed))


def completion_limit(config: TrainConfig, task) -> int:
    return config.max_new_tokens or getattr(task, "max_new_tokens", 256)


class Recorder(TrainerCallback):
    """Writes what a run does into its directory: metrics, evaluations on held-out prompts, per-token records; marks whole checkpoints.

    `seconds` counts training alone: generation, scoring and updates, without evaluations and without writing.
    """

    def __init__(self, run: Run, config: TrainConfig, task, tokenizer, listen: Listener):
        self.run, self.config, self.task, self.tokenizer, self.listen = run, config, task, tokenizer, listen
        self.every = config.updates * config.minibatches
        self.held_out = task.rows("test", config.eval_prompts, 0) if config.eval_every else []
        self.seconds, self._since = 0.0, time.perf_counter()
        self.seen = {(e["step"], e.get("split")) for e in run.evaluations()}

    def on_train_begin(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self._evaluate(0, model)

    def on_step_begin(self, args, state, control, **_):
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds += time.perf_counter() - self._since

    def on_log(self, args, state, control, logs=None, model=None, **_):
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "seconds": self.seconds} | {k: logs[k] for k in METRICS if k in logs}
        self.run.log_metrics(record)
        self.listen("step", record)
        if state.global_step == state.max_steps or self.due(self.config.eval_every, state.global_step):
            self._evaluate(state.global_step, model)

    def due(self, every: int, step: int) -> bool:
        return bool(every) and step % (every * self.every) == 0

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    def record(self, batch: dict) -> None:
        """Per-token records of the first groups of a rollout batch (the step is the one whose rollouts they are)."""
        began = time.perf_counter()
        self.run.write_tokens(batch["step"], [self._row(batch, i) for i in range(min(self.config.record_rows, len(batch["texts"])))])
        self._since += time.perf_counter() - began

    def _row(self, batch: dict, i: int) -> dict:
        mask = batch["mask"][i]
        ids = batch["completion_ids"][i][mask].tolist()
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        reason = "truncated" if batch["truncated"][i] else "correct" if batch["success"][i] else "wrong"
        row = {
            "group": batch["group"][i], "prompt": _as_text(batch["prompts"][i]), "completion": _as_text(batch["texts"][i]),
            "reward": batch["reward"][i], "success": batch["success"][i], "reason": reason, "token_ids": ids, "tokens": tokens,
            "credit": batch["credit"][i][mask].tolist(),
        }  # fmt: skip
        row |= {name: score[i][mask].tolist() for name, score in batch["scores"].items()}
        if hasattr(self.task, "roles"):
            row["role"] = self.task.roles(batch["rows"][i], tokens)
        return row

    def _evaluate(self, step: int, model) -> None:
        if not self.held_out or (step, "test") in self.seen:
            return
        c = self.config
        figures = evaluate(model, self.tokenizer, self.task, self.held_out, num_samples=c.eval_samples, ks=(1, c.eval_samples),
                           max_new_tokens=completion_limit(c, self.task), temperature=c.temperature, seed=c.seed)  # fmt: skip
        record = {"step": step, "seconds": self.seconds, "split": "test", **figures}
        self.run.log_evaluation(record)
        self.seen.add((step, "test"))
        self.listen("evaluation", record)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(f"{m['role']}: {m['content']}" for m in value)
