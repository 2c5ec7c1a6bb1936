"""Trains the cases below on fixed completions and writes what the loss was given; launched by torchrun, and imported
for the comparison.

    torchrun --standalone --nproc_per_node 2 tests/trl_two_processes.py FOLDER

Every process writes its own file, so that decisions can be compared: FOLDER/<case>.<rank>.json, and
FOLDER/<case>.<rank>.safetensors.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tokencredit import METHODS
from trl_tiny import FixedCredit, steps, train, weights

GROUP, ROWS = 4, 12


def one_sided(prompts, completions, **_):
    """Groups with both outcomes are seldom: dynamic sampling has to draw again."""
    return [float(prompt[0] in "024") or float("3" in completion) for prompt, completion in zip(prompts, completions)]


CASES = {
    "gtpo": (METHODS["gtpo"], {}),
    "gtpo_batch": (METHODS["gtpo"].replace(scope="batch"), {"num_iterations": 2}),
    "clip_cov": (METHODS["clip_cov"].replace(fraction=0.2, band=(0.0, 5.0)), {"num_iterations": 2}),
    "forking_tokens": (METHODS["forking_tokens"], {}),
    "dapo": (METHODS["dapo"], {"gradient_accumulation_steps": 2}),
    "grpo": (METHODS["grpo"], {}),
    "entropy_bonus_adaptive": (METHODS["entropy_bonus_adaptive"].replace(target=1.0, delta=0.1), {}),
}


def run(case: str, processes: int, folder):
    """The trainer after two steps of a case; groups of 4 in batches of 6 span two processes."""
    method, changes = CASES[case]
    keywords = {"reward_funcs": one_sided} if method.mixed_groups_only else {}
    size = {
        "per_device_train_batch_size": ROWS // processes,
        "num_generations": GROUP,
        "ddp_find_unused_parameters": False,
    }
    keywords |= {"noise_scale_every": 1, "entropy_change_every": 1}
    return train(FixedCredit, folder, size | changes, method=method, max_rounds=3, **keywords)


def main(folder: Path) -> None:
    for case in CASES:
        trainer = run(case, 2, folder)
        stem = folder / f"{case}.{trainer.accelerator.process_index}"
        kept = {
            f"{turn}.{name}": x.contiguous() for turn, batch in enumerate(trainer.kept) for name, x in batch.items()
        }
        save_file(kept | {"weights": weights(trainer)}, f"{stem}.safetensors")
        Path(f"{stem}.json").write_text(json.dumps(steps(trainer), allow_nan=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.barrier()
    os._exit(0)  # without the interpreter's farewell, in which gloo's threads sometimes abort the process
