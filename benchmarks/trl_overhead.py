"""What CreditTrainer costs over stock TRL: seconds per step of the same training, side by side.

The two take turns; the ratio is that of the medians over the runs of a run's median step. `ratio` keeps every row in the update, as
TRL does; `ratio_default` drops the rows without credit, as CreditTrainer does on its own.
"""

import argparse
import statistics

import torch
from trl import GRPOTrainer

from _result import finish
from _trainers import make
from tokencredit import METHODS
from tokencredit.engines.trl import CreditTrainer

# TRL's "dapo" loss with its group-normalised advantages: a token mean with a symmetric clip.
SAME = METHODS["grpo"].replace(eps=1e-4, aggregate=METHODS["dapo"].aggregate)


class EveryRow(CreditTrainer):
    """Keeps the rows without credit in the update."""

    def _credited_rows(self, inputs):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = {"stock": [], "every_row": [], "default": []}
    for _ in range(options.runs):
        for name, trainer_class, extra in (
            ("stock", GRPOTrainer, {}),
            ("every_row", EveryRow, {"method": SAME}),
            ("default", CreditTrainer, {"method": SAME}),
        ):
            trainer, times = make(trainer_class, options.steps, **extra)
            trainer.train()
            seconds[name].append(statistics.median(times.seconds[1:]))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    finish("trl_overhead", {
        "ratio": median["every_row"] / median["stock"],
        "ratio_default": median["default"] / median["stock"],
        "seconds_per_step": median, "per_run": seconds, "runs": options.runs, "steps": options.steps,
    })  # fmt: skip


if __name__ == "__main__":
    main()
