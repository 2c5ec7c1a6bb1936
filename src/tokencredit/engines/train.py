"""Trains a model on a task with a method, and records the run: the job behind `tokencredit train`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PrinterCallback

from tokencredit.checkpoints import step_of
from tokencredit.engines.adaptor import make_reward, prompts_of, training_rows
from tokencredit.engines.configs import fewest_passes, make_args
from tokencredit.engines.lora import make_lora
from tokencredit.engines.page import log_page
from tokencredit.engines.processes import with_a_word
from tokencredit.engines.recorder import Listener, RoundsLeft, RunRecorder
from tokencredit.engines.resume import explained, lost_its_end, place
from tokencredit.engines.scorers import log_ratio, on_rows, task_scorers
from tokencredit.engines.trl import CreditTrainer
from tokencredit.exclusive import exclusive
from tokencredit.lm.key_values import check_shareable
from tokencredit.lm.load import base_of, load_config, load_tokenizer, read_model, resolve_model
from tokencredit.lm.policy import usual_limit
from tokencredit.lm.prompts import encode_prompts, set_template_options
from tokencredit.lm.room import Room, beside_training, size_of
from tokencredit.method import Method
from tokencredit.runs import Run
from tokencredit.scores.table import OF_A_RUN, check_available, names_of
from tokencredit.tasks import load
from tokencredit.tasks.data import held_out
from tokencredit.tasks.task import Task
from tokencredit.train_config import TrainConfig, check_size


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    name: str | None = None,
    command: str = "",
    listen: Listener | None = None,
    page: Callable[[Path], Path] | None = None,
    memory: int | None = None,
) -> Run:
    """Train and record a run in the directory `out`; an interrupted run of the same config goes on from its last
    checkpoint.

    `listen(event, figures)` hears "start", "step", "evaluating", "evaluation", "resume" and "finished". `page(out)`
    writes the page of the run, which trackio or W&B get where `trl.report_to` names them. RunError where `out` holds a
    different run; Diverged where weights or loss are no longer finite. Whatever can be refused is refused before the
    directory is made. A process takes no more than `memory` bytes, where that is given, and sees to its room itself
    otherwise (`lm.room`): rows are written, trained and evaluated together as they fit. Several processes of a launcher
    (`accelerate launch -m tokencredit train ...`) train together, and the first one records.
    """
    out = Path(out)
    check_size(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    task, method = load(config.task, **config.task_options), config.build_method()
    recorder = RunRecorder(out, task, name=name, listen=listen)
    recorder.config, recorder.command, recorder.memory = config, command, memory
    recorder.saves_between = bool(config.save_every)
    there = Run.open(out) if (out / "run.json").exists() else None
    if there and there.status == "finished" and not lost_its_end(there, config):
        run = Run.create(out, **recorder.identity)
        recorder.listen("finished", {"step": config.optimizer_steps})
        return run
    try:
        trainer = make_trainer(config, method, task, recorder)
    except Exception:
        with suppress(OSError):  # transformers makes the directory before the trainer can refuse; one with files stays
            (out / "checkpoints").rmdir()
            out.rmdir()
        raise
    if page:
        log_page(trainer, partial(page, out))
    first = trainer.accelerator.is_main_process
    with exclusive(out) if first else nullcontext():
        recorder.run = Run.create(out, **recorder.identity) if first else None
        [checkpoint] = broadcast_object_list([place(recorder.run, config) if first else None])
        try:
            recorder.open(step_of(checkpoint) if checkpoint else 0)
            with with_a_word(trainer):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Exception as error:
            if recorder.run:
                with suppress(OSError):
                    recorder.run.finish("failed")
            if told := explained(error, out, None if recorder.began else checkpoint):
                raise told from error
            raise
    return recorder.run or Run.open(out)


def make_trainer(config: TrainConfig, method: Method, task: Task, recorder: RunRecorder) -> CreditTrainer:
    """The trainer, which calls the recorder. Task, tokenizer, prompts and options are checked before the model is
    loaded.
    """
    model_path = resolve_model(config.model)
    if Path(model_path).is_dir():  # an adapter remembers its base by this name
        model_path = str(Path(model_path).resolve())
    tokenizer, shape = load_tokenizer(model_path), load_config(model_path)
    limit = config.max_new_tokens or usual_limit(task, shape)
    check_available(sorted(method.needs - OF_A_RUN), task)
    if config.credit_model and "learned_credit" not in method.needs:
        raise ValueError(f"credit_model is for methods that read learned_credit, which {method.name} does not")
    lora = make_lora(config, model_path, shape)
    scorers = task_scorers(task, tokenizer, limit, config.eval_batch)
    args = make_args(config, limit, recorder.out / "checkpoints")
    set_template_options(tokenizer, args.chat_template_kwargs)
    rows, order = training_rows(config, task)
    prompts = prompts_of(rows, order, config.chat)
    tested = held_out(task, config.eval_prompts, config.eval_part) if config.eval_every else []
    if config.eval_every and not tested:
        raise ValueError(
            f"{config.task} has no prompts to evaluate on: give a file of them (task_options.test), or set eval_every=0"
        )
    asked, _ = (encode_prompts(tokenizer, some, shape, limit, config.chat) for some in (rows, tested))
    recorder.rows, recorder.held_out = rows, tested
    dtype = getattr(torch, config.dtype) if config.dtype not in (None, "auto") else config.dtype or torch.float32
    init = {"dtype": dtype} | dict(config.trl.get("model_init_kwargs") or {})
    torch.manual_seed(config.seed)
    model = read_model(model_path, **init)
    if method.needs & {"learned_credit", *names_of("steps")}:
        check_shareable(model)
    longest = max(map(len, asked))
    references = ("self_reward" in method.needs) + bool(args.beta and not lora and not base_of(model_path))
    trained, held = 0 if config.peft else None, references * size_of(model)
    room = Room.of(model, beside_training(model, recorder.memory, trained, args.device, held), args.device)
    recorder.memory = recorder.memory and recorder.memory - held
    passes, rows_written = zip(
        *gather_object([(fewest_passes(config, room, longest, limit), room.rows(longest + limit))])
    )
    if config.accumulate is None:  # the process with the least room decides for all
        args = make_args(replace(config, accumulate=max(passes)), limit, recorder.out / "checkpoints")
    scorers = {name: on_rows(scorer, rows) for name, scorer in scorers.items()}
    if "self_reward" in method.needs:
        reference = read_model(model_path, **init).eval().requires_grad_(False).to(args.device)
        scorers["self_reward"] = log_ratio(None, reference)
    if "learned_credit" in method.needs:
        from tokencredit.engines.trl_learned import learned_credit

        scorers["learned_credit"] = learned_credit(task, tokenizer, rows, limit, config.credit_model)
    trainer = CreditTrainer(
        model=model,
        peft_config=lora,
        method=method,
        args=args,
        reward_funcs=make_reward(task, tokenizer, model, rows),
        processing_class=tokenizer,
        train_dataset=prompts,
        scorers=scorers,
        max_rounds=config.max_rounds,
        noise_scale_every=config.noise_scale_every,
        entropy_change_every=config.entropy_change_every,
        generation_rows=min(rows_written),
        memory=recorder.memory,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    if recorder.budget and recorder.budget.unit == "rollouts":
        trainer.add_callback(RoundsLeft(recorder))
    return trainer
