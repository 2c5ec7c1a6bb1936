"""A short GRPO run on reckon with checkpoints of its optimizer, for the benchmarks of the dynamics laboratory: about 25
s on one core.
"""

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers.utils import logging

logging.set_verbosity_error()
STEP = 40


@contextmanager
def trained_run(seed: int = 0, steps: int = 30):
    """The run directory; its checkpoint `STEP` is some dozens of optimizer steps in."""
    from tokencredit.engines.train import train
    from tokencredit.train_config import TrainConfig

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        config = TrainConfig(steps=steps, seed=seed, eval_every=0, record_every=0, save_every=10, threads=1)
        yield train(config, Path(folder) / "grpo").path
