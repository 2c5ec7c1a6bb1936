"""Short training runs on reckon, for the benchmarks of the TRL engine: stock TRL and ours under the same arguments."""

import os
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig

from tokencredit.engines.train import make_reward
from tokencredit.tasks.reckon import MAX_NEW_TOKENS, Reckon, model_path

logging.set_verbosity_error()


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step, generation included, by a clock."""

    def __init__(self, clock=time.perf_counter):
        self.seconds, self.clock = [], clock

    def on_step_begin(self, *_, **__):
        self.began = self.clock()

    def on_step_end(self, *_, **__):
        self.seconds.append(self.clock() - self.began)


def make(
    trainer_class,
    steps: int,
    *,
    updates: int = 1,
    prompts: int = 64,
    group: int = 8,
    seed: int = 0,
    clock=time.perf_counter,
    **extra,
):
    """(trainer, its step times)."""
    task, tokenizer = Reckon(), AutoTokenizer.from_pretrained(model_path())
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=prompts * group,
        num_generations=group,
        num_iterations=updates,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        max_steps=steps,
        max_completion_length=MAX_NEW_TOKENS,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        loss_type="dapo",
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        seed=seed,
    )
    times = StepTimes(clock)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model_path()),
        args=args,
        reward_funcs=make_reward(task, tokenizer),
        train_dataset=Dataset.from_list(task.rows("train", steps * prompts, seed)),
        processing_class=tokenizer,
        callbacks=[times],
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, times
