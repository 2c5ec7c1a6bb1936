"""The share of a training step that computing credit and plan takes, for each of several methods, on reckon."""

import argparse
import statistics
import time

import torch

from _result import finish
from _trainers import make
from tokencredit import METHODS
from tokencredit.engines.trl import CreditTrainer

MEASURED = ("grpo", "gtpo", "grpo_s", "forking_tokens", "clip_cov", "ptw_entropy")


class Timed(CreditTrainer):
    """Counts the seconds of credit and plan."""

    seconds_credit = 0.0

    def _assign(self, batch):
        began = time.perf_counter()
        found = super()._assign(batch)
        self.seconds_credit += time.perf_counter() - began
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shares = {name: [] for name in MEASURED}
    for _ in range(options.runs):
        for name in MEASURED:
            trainer, times = make(Timed, options.steps, method=METHODS[name].replace(mixed_groups_only=False))
            trainer.train()
            shares[name].append(trainer.seconds_credit / sum(times.seconds))
    median = {name: statistics.median(values) for name, values in shares.items()}
    finish(
        "credit_cost",
        {"share_of_step": max(median.values()), "by_method": median, "runs": options.runs, "steps": options.steps},
    )


if __name__ == "__main__":
    main()
