"""Trains the cases below on fixed completions and writes what the loss was given; launched by torchrun, and imported
for the comparison.

    torchrun --standalone --nproc_per_node 2 tests/trl_two_processes.py FOLDER [MODE ...]

Every process holds the whole model (ddp), then, for the cases that can, a part of it (fsdp2); with deepspeed also zero2
and zero3, where they are asked for. Each writes its own file, so that decisions can be compared:
FOLDER/<mode>.<case>.<rank>.json, and FOLDER/<mode>.<case>.<rank>.safetensors.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

from fsdp_on_cpu import sharded, sharding
from test_trl_generation import check_equal, trained
from tokencredit import METHODS
from tokencredit.engines.processes import shards
from tokencredit.engines.scorers import task_scorers
from tokencredit.tasks.verdict import Verdict
from trl_tiny import LONGEST, FixedCredit, steps, sums, tiny_tokenizer, train, weights

GROUP, ROWS = 4, 12


def one_sided(prompts, completions, **_):
    """Groups with both outcomes are seldom: dynamic sampling has to draw again."""
    return [float(prompt[0] in "024") or float("3" in completion) for prompt, completion in zip(prompts, completions)]


class Digits:
    """A task whose completions are right with a 3 or a 7 in them, for values at the boundaries of steps."""

    name = "digits"

    def verify(self, text, row, truncated):
        correct = any(digit in text for digit in "37")
        return Verdict(correct, True, "correct" if correct else "wrong")


TWICE = {"num_iterations": 2}
CASES = {
    "gtpo": (METHODS["gtpo"], {}),
    "gtpo_batch": (METHODS["gtpo"].replace(scope="batch"), TWICE),
    "clip_cov": (METHODS["clip_cov"].replace(fraction=0.2, band=(0.0, 5.0)), TWICE),
    "forking_tokens": (METHODS["forking_tokens"], {}),
    "dapo": (METHODS["dapo"], {"gradient_accumulation_steps": 2}),
    "grpo": (METHODS["grpo"], {}),
    "entropy_bonus_adaptive": (METHODS["entropy_bonus_adaptive"].replace(target=1.0, delta=0.1), {}),
    "kl_cov": (METHODS["kl_cov"].replace(fraction=0.2), TWICE),
    "gspo": (METHODS["gspo"], TWICE),
    "gspo_token": (METHODS["gspo_token"], TWICE),
    "cispo": (METHODS["cispo"], TWICE),
    "sapo": (METHODS["sapo"], TWICE),
    "ce_gppo": (METHODS["ce_gppo"], TWICE),
    "grpo_s": (METHODS["grpo_s"], {}),
    "dr_grpo": (METHODS["dr_grpo"], {}),
    "random_tokens": (METHODS["random_tokens"], {}),
    "ptw_entropy": (METHODS["ptw_entropy"], {}),
    "arm": (METHODS["arm"], {}),
    "past": (METHODS["entropy_bonus"].replace(coef=0.3, difficulty=0.9, rate="past_pass_rate"), {}),
}
MEASURED = ("gtpo", "clip_cov", "dapo", "entropy_bonus_adaptive")
"""Cases in which the noise scale is measured as well."""
WHOLE = {
    name: (METHODS[name], {})
    for name in ("ptw_gradient_norm", "ptw_fisher", "ptw_perturbation", "ptw_attention", "token_sampling", "vineppo")
}
"""Cases whose scores are measured with the whole model in each process."""
MODES = {"ddp": CASES | WHOLE, "fsdp2": CASES, "zero2": CASES | WHOLE, "zero3": CASES}


def run(case: str, processes: int, folder, mode: str = "ddp"):
    """The trainer after two steps of a case; groups of 4 in batches of 6 span two processes."""
    method, changes = (CASES | WHOLE)[case]
    keywords = {"reward_funcs": one_sided} if method.mixed_groups_only else {}
    if case == "vineppo":
        keywords["scorers"] = task_scorers(Digits(), tiny_tokenizer(), LONGEST)
    if case == "past":
        keywords["train_dataset"] = sums(ROWS // GROUP)  # the second batch asks the prompts of the first
    every = int(mode == "ddp" and case in MEASURED)
    keywords |= {"noise_scale_every": every, "entropy_change_every": every}
    return train(FixedCredit, folder, size_of(mode, processes) | changes, method=method, max_rounds=3, **keywords)


def size_of(mode: str, processes: int) -> dict:
    """The settings of a mode."""
    size: dict = {
        "per_device_train_batch_size": ROWS // processes,
        "num_generations": GROUP,
        "ddp_find_unused_parameters": False,
    }
    if mode == "fsdp2":
        size |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
        size["fsdp_config"] |= {"reshard_after_forward": True, "cpu_ram_efficient_loading": False}
    if mode.startswith("zero"):
        automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
        size["deepspeed"] = dict.fromkeys((*automatic, "gradient_clipping"), "auto")
        size["deepspeed"] |= {"zero_optimization": {"stage": int(mode[-1])}, "zero_allow_untested_optimizer": True}
    return size


def main(folder: Path, *modes: str) -> None:
    for mode in modes or ("ddp", "fsdp2"):
        for case in MODES[mode]:
            with sharding() if mode == "fsdp2" else nullcontext():
                trainer = run(case, 2, folder, mode)
            assert shards(trainer) == {"fsdp2": "FSDP", "zero3": "DeepSpeed ZeRO-3"}.get(mode), mode
            assert mode != "fsdp2" or sharded(trainer.model), type(trainer.model)
            stem = folder / f"{mode}.{case}.{trainer.accelerator.process_index}"
            kept = {
                f"{turn}.{name}": x.contiguous() for turn, batch in enumerate(trainer.kept) for name, x in batch.items()
            }
            save_file(kept | {"weights": weights(trainer)}, f"{stem}.safetensors")
            Path(f"{stem}.json").write_text(json.dumps(steps(trainer), allow_nan=False))
        if mode in ("ddp", "fsdp2"):
            with sharding() if mode == "fsdp2" else nullcontext():
                check_heard(folder, size_of(mode, 2))


def check_heard(folder: Path, size: dict) -> None:
    """What each of two processes heard while it generated is what a pass over it measures."""
    heard, plain = (trained(folder, METHODS["gtpo"], size, heard=heard) for heard in (True, False))
    assert heard.passes == 1 < plain.passes
    check_equal(heard, plain)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    torch.distributed.barrier()
    os._exit(0)  # without the interpreter's farewell, in which gloo's threads sometimes abort the process
