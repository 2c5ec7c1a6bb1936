"""What CreditTrainer costs over stock TRL: seconds per step of the same training, side by side.

They take turns; a ratio is the median over the runs of (median step here) / (median step of stock TRL in the same run).
`ratio` is CreditTrainer as it comes, which leaves the rows without credit out of the update; `ratio_every_row` keeps
them, as TRL does: the bare overhead of the engine.
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
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
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
    ratios = {name: [a / b for a, b in zip(values, seconds["stock"])] for name, values in seconds.items()}
    finish(
        "trl_overhead",
        {
            "ratio": statistics.median(ratios["default"]),
            "ratio_range": [min(ratios["default"]), max(ratios["default"])],
            "ratio_every_row": statistics.median(ratios["every_row"]),
            "ratio_every_row_range": [min(ratios["every_row"]), max(ratios["every_row"])],
            "seconds_per_step": {name: statistics.median(values) for name, values in seconds.items()},
            "per_run": seconds,
            "runs": options.runs,
            "steps": options.steps,
        },
    )


if __name__ == "__main__":
    main()
