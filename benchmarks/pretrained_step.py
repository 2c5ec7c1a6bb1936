"""A training step of SmolLM2-135M with `grpo` and `gtpo`, against that of stock TRL: processor seconds, memory.

    python benchmarks/pretrained_step.py [--steps 4] [--threads 1]

Rewards depend on the text alone and differ within nearly every group, so that all steps train. ratio: the larger of the
two methods' median step over stock TRL's; the first step of each is left out. peak_gib: the largest resident set of
each alone, in a process of its own.
"""

import argparse
import json
import statistics
import tempfile
import time
import zlib

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from _pretrained import model_path, problems
from _result import alone, finish, peak_gib
from _trainers import StepTimes
from tokencredit.engines.trl import CreditTrainer

PROMPTS, GROUP, TOKENS = 2, 4, 16
RUNS = {
    "stock": (GRPOTrainer, {}),
    "grpo": (CreditTrainer, {"method": "grpo"}),
    "gtpo": (CreditTrainer, {"method": "gtpo"}),
}


def reward(completions, **_) -> list[float]:
    return [float(zlib.crc32(each[-1]["content"].encode()) % 2) for each in completions]


def run(name: str, steps: int) -> dict:
    """Seconds of every step but the first, and the peak."""
    path = model_path()
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_steps=steps + 1,
        max_completion_length=TOKENS,
        temperature=0.6,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        loss_type="dapo",
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=0,
    )
    asked = [{"prompt": [{"role": "user", "content": text}]} for text in problems(PROMPTS * (steps + 1))]
    kind, extra = RUNS[name]
    times = StepTimes(time.process_time)
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(asked),
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=[times],
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"seconds": times.seconds[1:], "peak_gib": peak_gib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=RUNS, help="one of the runs, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model_path()
    if options.one:
        print(json.dumps(run(options.one, options.steps)))
        return
    found = {}
    for name in RUNS:
        found[name] = alone(__file__, "--one", name, *(f"--{k}={getattr(options, k)}" for k in ("steps", "threads")))
    seconds = {name: statistics.median(each["seconds"]) for name, each in found.items()}
    ratios = {name: seconds[name] / seconds["stock"] for name in ("grpo", "gtpo")}
    figures = {"ratio": max(ratios.values()), "ratios": ratios, "seconds_per_step": seconds, "steps": options.steps}
    figures["peak_gib"] = {name: each["peak_gib"] for name, each in found.items()}
    finish("pretrained_step", figures | {"per_run": {name: each["seconds"] for name, each in found.items()}})


if __name__ == "__main__":
    main()
