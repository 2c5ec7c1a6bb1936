"""Trains a model on a task with a method, and records the run: the job behind `tokencredit train`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import GRPOConfig

from tokencredit.checkpoints import step_of
from tokencredit.engines.adaptor import judged, make_reward, prompts_of, training_rows
from tokencredit.engines.page import log_page
from tokencredit.engines.recorder import Listener, Recorder, RoundsLeft
from tokencredit.engines.resume import explained, lost_its_end, place
from tokencredit.engines.scorers import on_rows, task_scorers
from tokencredit.engines.trl import CreditTrainer
from tokencredit.exclusive import exclusive
from tokencredit.lm.load import find_device, load_config, load_tokenizer, read_weights, resolve_model
from tokencredit.lm.policy import Policy, usual_limit
from tokencredit.lm.prompts import encode_prompts
from tokencredit.method import Method
from tokencredit.runs import Run
from tokencredit.scores.table import check_available
from tokencredit.tasks import load
from tokencredit.tasks.data import held_out
from tokencredit.tasks.task import Task
from tokencredit.train_config import TrainConfig, check_size

DECIDED = {
    "output_dir": "the run directory",
    "num_generations": "group",
    "num_iterations": "updates",
    "max_steps": "steps",
    "seed": "seed",
    "per_device_train_batch_size": "prompts, group, minibatches and accumulate",
    "steps_per_generation": "minibatches and accumulate",
    "gradient_accumulation_steps": "accumulate",
    "max_completion_length": "max_new_tokens",
    "temperature": "temperature",
    "learning_rate": "learning_rate",
    "save_steps": "save_every",
    "logging_steps": "every step",
    "num_train_epochs": "steps",
    "shuffle_dataset": "seed",
}


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    name: str | None = None,
    command: str = "",
    listen: Listener | None = None,
    page: Callable[[Path], Path] | None = None,
) -> Run:
    """Train and record a run in the directory `out`; an interrupted run of the same config goes on from its last
    checkpoint.

    `listen(event, figures)` hears "start", "step", "evaluation", "resume" and "finished". `page(out)` writes the page
    of the run, which trackio or W&B get where `trl.report_to` names them. RunError where `out` holds a
    different run; Diverged where weights or loss are no longer finite. Whatever can be refused is refused before the
    directory is made.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError(
            "`train` is one process; for several, launch a script with CreditTrainer, which gathers whole groups"
        )
    out, listen = Path(out), listen or (lambda event, figures: None)
    check_size(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    task, method = load(config.task, **config.task_options), config.build_method()
    identity = {
        "name": name or out.resolve().name,
        "method": repr(method),
        "method_name": config.method,
        "task": config.task,
        "model": config.model,
        "config": config.as_dict(),
        "seed": config.seed,
        "command": command,
    }
    there = Run.open(out) if (out / "run.json").exists() else None
    if there and there.status == "finished" and not lost_its_end(there, config):
        run = Run.create(out, **identity)
        listen("finished", {"step": config.optimizer_steps})
        return run
    trainer, recorder = make_trainer(config, method, task, out / "checkpoints", listen)
    with exclusive(out):
        run = Run.create(out, **identity)
        if page:
            log_page(trainer, partial(_finished_page, run, page))
        checkpoint = place(run, config)
        try:
            _go_on(run, trainer, recorder, checkpoint, listen)
        except Exception as error:
            with suppress(OSError):
                run.finish("failed")
            if told := explained(error, out, None if recorder.began else checkpoint):
                raise told from error
            raise
        run.finish("finished")
    listen("finished", {"step": config.optimizer_steps})
    return run


def _finished_page(run: Run, page: Callable[[Path], Path]) -> Path:
    run.finish("finished")
    return page(run.path)


def _go_on(run: Run, trainer: CreditTrainer, recorder: Recorder, checkpoint: Path | None, listen: Listener) -> None:
    """Train from a checkpoint, without the records of later steps; from the start where there is none."""
    resumed = step_of(checkpoint) if checkpoint else 0
    run.truncate_after(resumed)
    recorder.open(run)
    listen("resume" if resumed else "start", {"step": resumed})
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def make_trainer(
    config: TrainConfig, method: Method, task: Task, folder: Path, listen: Listener
) -> tuple[CreditTrainer, Recorder]:
    """The trainer and the recorder that it calls. Task, tokenizer, prompts and options are checked before the model is
    loaded.
    """
    model_path = resolve_model(config.model)
    tokenizer, shape = load_tokenizer(model_path), load_config(model_path)
    limit = config.max_new_tokens or usual_limit(task, shape)
    check_available(sorted(method.needs), task)
    scorers = task_scorers(task, tokenizer, limit, config.eval_batch)
    args = make_args(config, limit, folder)
    rows, order = training_rows(config, task)
    tested = held_out(task, config.eval_prompts, config.eval_part) if config.eval_every else []
    if config.eval_every and not tested:
        raise ValueError(
            f"{config.task} has no prompts to evaluate on: give a file of them (task_options.test), or set eval_every=0"
        )
    for some in (rows, tested):
        encode_prompts(tokenizer, some, shape, limit, config.chat)
    dtype = getattr(torch, config.dtype) if config.dtype not in (None, "auto") else config.dtype or torch.float32
    init = {"dtype": dtype} | dict(config.trl.get("model_init_kwargs") or {})
    torch.manual_seed(config.seed)
    model = read_weights(model_path, AutoModelForCausalLM, **init)
    policy = Policy(model, tokenizer, task, config.temperature, limit, config.chat, config.model)
    recorder = Recorder(config, policy, tested, listen)
    every = config.updates * config.minibatches
    trainer = CreditTrainer(
        model=model,
        method=method,
        args=args,
        reward_funcs=make_reward(task, tokenizer, model, rows),
        processing_class=tokenizer,
        train_dataset=prompts_of(rows, order, config.chat),
        scorers={k: on_rows(f, rows) for k, f in scorers.items()},
        max_rounds=config.max_rounds,
        noise_scale_every=config.noise_scale_every,
        record=judged(recorder, task, rows) if config.record_every else None,
        record_every=max(config.record_every, 1) * every,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    if recorder.budget and recorder.budget.unit == "rollouts":
        trainer.add_callback(RoundsLeft(trainer, recorder))
    return trainer, recorder


def make_args(config: TrainConfig, max_new_tokens: int, folder: Path) -> GRPOConfig:
    """TRL's config. ValueError for an option of `trl` that another field decides, or that TRL does not have."""
    further = {k: v for k, v in config.trl.items() if k not in ("model_init_kwargs", "save_total_limit")}
    for key in further:
        if key in DECIDED:
            raise ValueError(f"trl.{key} is decided by {DECIDED[key]}: set that instead")
        if key not in GRPOConfig.__dataclass_fields__:
            near = difflib.get_close_matches(key, GRPOConfig.__dataclass_fields__, n=1)
            raise ValueError(f"TRL's GRPOConfig has no option {key}{f'; did you mean {near[0]}?' if near else ''}")
    place = find_device(config.device)
    if place.index is not None:
        raise ValueError(f"device: training uses the GPUs that it sees; for {place} alone set CUDA_VISIBLE_DEVICES")
    pieces, cuda = config.minibatches * config.accumulate, place.type == "cuda"
    save = {
        "save_strategy": "steps",
        "save_steps": (config.save_every or config.steps) * config.updates * config.minibatches,
    }
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.prompts * config.group // pieces,
        "num_generations": config.group,
        "steps_per_generation": pieces,
        "num_iterations": config.updates,
        "gradient_accumulation_steps": config.accumulate,
        "max_steps": config.optimizer_steps,
        "max_completion_length": max_new_tokens,
        "temperature": config.temperature,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.99,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "bf16": cuda,
        "gradient_checkpointing": cuda,
        "logging_steps": 1,
        "save_total_limit": None,  # the recorder removes older ones, and nothing that is no checkpoint of the run
        "report_to": "none",
        "seed": config.seed,
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "log_level": "error",
        "dataloader_pin_memory": cuda,
        "use_cpu": place.type == "cpu",
    }
    return GRPOConfig(**settings | save | further)
