"""A training step of SmolLM2-135M with `grpo` and `gtpo`, against that of stock TRL: processor seconds, memory.

    python benchmarks/pretrained_step.py [--runs 3] [--steps 4] [--threads 1]

Rewards depend on the text alone and differ within nearly every group, so that all steps train. They take turns, each in
a process of its own; ratios: the median over the runs of (median step) / (stock TRL's in the same run), the first step
of each left out; ratio: the larger of the two methods'. peak_gib: the largest resident set of each.
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
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=RUNS, help="one of the runs, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model_path()
    if options.one:
        print(json.dumps(run(options.one, options.steps)))
        return
    found = {name: [] for name in RUNS}
    for _ in range(options.runs):
        for name, each in found.items():
            each.append(alone(__file__, "--one", name, f"--steps={options.steps}", f"--threads={options.threads}"))
    medians = {name: [statistics.median(one["seconds"]) for one in each] for name, each in found.items()}
    ratios = {name: [a / b for a, b in zip(medians[name], medians["stock"])] for name in ("grpo", "gtpo")}
    middle = {name: statistics.median(each) for name, each in ratios.items()}
    finish(
        "pretrained_step",
        {
            "ratio": max(middle.values()),
            "ratios": middle,
            "ratios_range": {name: [min(each), max(each)] for name, each in ratios.items()},
            "seconds_per_step": {name: statistics.median(each) for name, each in medians.items()},
            "peak_gib": {name: max(one["peak_gib"] for one in each) for name, each in found.items()},
            "per_run": {name: [one["seconds"] for one in each] for name, each in found.items()},
            "runs": options.runs,
            "steps": options.steps,
        },
    )


if __name__ == "__main__":
    main()
