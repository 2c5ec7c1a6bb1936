"""One run: a policy that learns from pairs, and what it then does on other prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig

from tokencredit.engines.trl_preference import PreferenceTrainer
from tokencredit.lm.evaluate import evaluate
from tokencredit.lm.policy import Policy
from tokencredit.studies.preference.question import PreferenceConfig
from tokencredit.tasks.task import Row


def learned(config: PreferenceConfig, pairs: Sequence[Mapping], method: str, rate: float, seed: int) -> Policy:
    """The configured policy after `config.steps` steps of AdamW on these pairs, its reference being what it was."""
    policy, reference = config.policy.open(), config.policy.open()
    place = next(policy.model.parameters()).device.type
    with TemporaryDirectory() as folder, _quiet():
        args = DPOConfig(
            output_dir=folder,
            max_steps=config.steps,
            per_device_train_batch_size=config.pairs,
            learning_rate=rate,
            lr_scheduler_type="constant",
            adam_beta2=0.99,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=None,
            bf16=place == "cuda",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=place == "cuda",
            use_cpu=place == "cpu",
            seed=seed,
            log_level="error",
        )
        trainer = PreferenceTrainer(
            model=policy.model,
            ref_model=reference.model,
            args=args,
            processing_class=policy.tokenizer,
            train_dataset=Dataset.from_list([dict(pair) for pair in pairs]),
            method=method,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return replace(policy, model=trainer.accelerator.unwrap_model(trainer.model))


def judged(policy: Policy, rows: Sequence[Row], config: PreferenceConfig, seed: int) -> dict[str, Any]:
    """{"correct" [P] of `config.samples` completions each, "entropy", "length"} on these prompts."""
    found = evaluate(policy, rows, num_samples=config.samples, ks=(1,), greedy=False, seed=seed)
    return {
        "correct": found["by_prompt"]["correct"],
        "entropy": found["entropy"]["value"],
        "length": found["length"]["value"],
    }


@contextlib.contextmanager
def _quiet():
    """Inside, no bar of `datasets`."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
