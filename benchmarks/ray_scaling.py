"""What Ray costs a pivotality study, and how well two workers share it: processor time, since machines are busy.

    python benchmarks/ray_scaling.py [--prompts 16] [--rollouts 16] [--runs 3]

The same traces of the shipped model are measured by this process alone, and by two workers, in turn. Counted is the
processor time of every process: this one, the workers, and Ray's own.

    efficiency_2       alone / (2 (the busier worker + this process)): one process against two, if each has a processor
                       and nothing that this process does overlaps with the workers; so it is a lower bound
    overhead_per_part  (all processes with workers − alone) / parts, in seconds of processor time; loading the model is
                       not in it

Medians of the runs, the ranges beside them; the estimates of both are compared, to the bit.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import ray
import torch

from _result import finish
from tokencredit.distribute.host import HostSpec
from tokencredit.distribute.pool import Alone, pool
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.sampling import Trace
from tokencredit.pivotality.away import crew_of
from tokencredit.pivotality.budgets import Fixed
from tokencredit.pivotality.measure import measure_with
from tokencredit.pivotality.store import RolloutStore


def spent(process):
    """Seconds of processor time."""
    times = process.cpu_times()
    return times.user + times.system


def process(host):
    return os.getpid()


def processes(workers):
    """The numbers of the workers' processes."""
    identity = workers.facts.model_hash
    return ray.get([each.do.remote(identity, process, ()) for each in workers.workers])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 16), ("rollouts", 16), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = HostSpec(PolicyConfig().settled().as_dict())
    alone = Alone(spec)
    policy = alone.policy
    rows = [row for row in policy.task.rows("train", options.prompts, 0) for _ in range(2)]
    drawn = policy.complete(policy.encode_rows(rows[::2]), 2, seed=0)
    prompts = policy.encode_rows(rows)
    traces = [Trace(tuple(prompt), c.ids) for prompt, c in zip(prompts, (c for group in drawn for c in group))]

    def measured(here):
        """(estimates as bytes, parts, rollouts, bytes stored)."""
        with tempfile.TemporaryDirectory() as folder:
            found, failed = measure_with(
                crew_of(here, policy, rows),
                traces,
                budget=Fixed(options.rollouts),
                max_new_tokens=policy.max_new_tokens,
                store=RolloutStore(folder, {}),
            )
            assert not failed
            parts = len(list(Path(folder, "parts").glob("*.parquet")))
        return (
            [m.estimate.replace.value.tobytes() for m in found.values()],
            parts,
            sum(m.rollouts for m in found.values()),
        )

    whole, parts, rollouts = measured(alone)  # warms up
    times = {"alone": [], "busier": [], "driver": [], "all": []}
    with pool(spec, "local", 2) as two:
        ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
        assert measured(two)[0] == whole
        workers = [psutil.Process(number) for number in processes(two)]
        me = psutil.Process()
        for _ in range(options.runs):
            start = spent(me)
            assert measured(alone)[0] == whole
            times["alone"].append(spent(me) - start)
            before = {each: spent(each) for each in [me, *me.children(recursive=True)]}
            assert measured(two)[0] == whole
            now = {each: spent(each) - earlier for each, earlier in before.items()}
            times["driver"].append(now[me])
            times["busier"].append(max(now[each] for each in workers))
            times["all"].append(sum(now.values()))
    efficiency = [a / (2 * (b + d)) for a, b, d in zip(times["alone"], times["busier"], times["driver"])]
    overhead = [(every - a) / parts for every, a in zip(times["all"], times["alone"])]
    finish(
        "ray_scaling",
        {
            "efficiency_2": statistics.median(efficiency),
            "efficiency_2_range": [min(efficiency), max(efficiency)],
            "overhead_per_part": statistics.median(overhead),
            "overhead_per_part_range": [min(overhead), max(overhead)],
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "parts": parts,
            "rollouts": rollouts,
            "traces": len(traces),
            "runs": options.runs,
            "clock": "processor time",
            "ray": ray.__version__,
        },
    )


if __name__ == "__main__":
    main()
