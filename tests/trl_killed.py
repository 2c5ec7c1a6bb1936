"""Trains with a checkpoint after every step and kills itself, as the kernel would, in the middle of the fourth.

python tests/trl_killed.py FOLDER
"""

import os
import signal
import sys

from tokencredit.engines.trl import CreditTrainer
from trl_tiny import build, reward

STEPS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "num_iterations": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
}


def deadly(trainer_state, **columns):
    """The usual reward, until the rollouts of the fifth update are scored."""
    if trainer_state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return reward(**columns)


if __name__ == "__main__":
    build(CreditTrainer, sys.argv[1], STEPS, method="gtpo", reward_funcs=deadly).train()
