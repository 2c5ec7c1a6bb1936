"""What a pivotality study of many traces of a large model will take: rollouts, tokens, GPU-hours, storage, memory.

    python benchmarks/ray_plan.py [--traces 10000] [--tokens 500] [--tokens-per-second 2000 10000] [--prompts 16]

Computed from a small run of the shipped model, measured now, and from what a rollout cost the process that hands the
work out (`results/ray_scaling.json`):

    rollouts   = traces · tokens · per token         with two stages screen + confirm (select + control (1 − select))
    generated  = rollouts · tokens / 2 · length      length: rollouts of the small run against the rest of their trace
    GPU-hours  = generated / tokens per second       which is assumed: no GPU was at hand
    storage    = rollouts · bytes + generated · 4    bytes: of the small run's parts without token ids, which are
                                                     counted as they are, 4 bytes each
    memory     = rollouts · bytes                    of the process that hands the work out
    driver     = rollouts · its processor time

Assumed, and not measured: that rollouts of a large model are as long, against the rest of their trace, as those of the
small one; the speed; the mean length of a trace; that the driver's time does not grow with the length of a rollout.
"""

import argparse
import json
import os
import tempfile
import tracemalloc
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow.parquet
import torch

from _result import finish
from tokencredit.distribute.host import HostSpec
from tokencredit.distribute.pool import Alone
from tokencredit.lm.policy import PolicyConfig
from tokencredit.lm.sampling import Trace
from tokencredit.pivotality.away import crew_of
from tokencredit.pivotality.budgets import Fixed, TwoStage
from tokencredit.pivotality.measure import measure_with
from tokencredit.pivotality.parts import MOST
from tokencredit.pivotality.store import RolloutStore

SMALL = 8  # rollouts per token of the small run
BUDGETS = {"fixed": Fixed(8), "two stages": TwoStage(4, 64, select=0.05, control=0.02)}


def small_run(prompts):
    """What a run of the shipped model took, per rollout."""
    alone = Alone(HostSpec(PolicyConfig().settled().as_dict()))
    policy = alone.policy
    rows = policy.task.rows("train", prompts, 0)
    ids = policy.encode_rows(rows)
    traces = [Trace(tuple(p), c.ids) for p, [c] in zip(ids, policy.complete(ids, 1, seed=0))]
    with tempfile.TemporaryDirectory() as folder:
        store, crew = RolloutStore(folder, {}), crew_of(alone, policy, rows)
        options = {"budget": Fixed(SMALL), "max_new_tokens": policy.max_new_tokens, "store": store}
        found, failed = measure_with(crew, traces, **options)
        assert not failed
        tracemalloc.start()
        measure_with(crew, traces, **options)  # all of it is stored: what is held is what the driver holds
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        beside = sum(map(beside_ids, Path(folder, "parts").glob("*.parquet")))
    rollouts = sum(m.rollouts for m in found.values())
    generated = sum(m.generated for m in found.values())
    rest = SMALL * sum(len(t.completion) * (len(t.completion) - 1) / 2 for t in traces)
    return {
        "traces": len(traces),
        "tokens": sum(len(t.completion) for t in traces),
        "rollouts": rollouts,
        "generated": generated,
        "length": generated / rest,
        "bytes_per_rollout": beside / rollouts,
        "memory_per_rollout": held / rollouts,
    }


def beside_ids(path):
    """Bytes of a part, its token ids left out."""
    about = pyarrow.parquet.ParquetFile(path).metadata
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    columns = [group.column(j) for group in groups for j in range(group.num_columns)]
    return path.stat().st_size - sum(c.total_compressed_size for c in columns if c.path_in_schema.startswith("ids"))


def per_token(budget):
    """Rollouts per token."""
    if isinstance(budget, Fixed):
        return budget.num
    return budget.screen + budget.confirm * (budget.select + budget.control * (1 - budget.select))


def planned(budget, options, small, seconds):
    rollouts = options.traces * options.tokens * per_token(budget)
    generated = rollouts * (options.tokens - 1) / 2 * small["length"]
    return {
        "budget": repr(budget),
        "rollouts": rollouts,
        "generated": generated,
        "gpu_hours": {str(speed): generated / speed / 3600 for speed in options.tokens_per_second},
        "storage_gib": (rollouts * small["bytes_per_rollout"] + generated * 4) / 2**30,
        "memory_gib": rollouts * small["memory_per_rollout"] / 2**30,
        "parts": rollouts / MOST,
        "driver_hours": rollouts * seconds / 3600,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=500, help="of a trace, on average")
    parser.add_argument("--tokens-per-second", type=int, nargs="+", default=[2_000, 10_000], help="of one GPU")
    parser.add_argument("--prompts", type=int, default=16, help="of the small run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = small_run(options.prompts)
    scaling = json.loads((Path(__file__).parent / "results" / "ray_scaling.json").read_text())
    seconds = scaling["seconds"]["driver"] / scaling["rollouts"]
    plans = {name: planned(budget, options, small, seconds) for name, budget in BUDGETS.items()}
    asked = {key: value for key, value in vars(options).items() if key != "prompts"}
    finish("ray_plan", {"small": small, "asked": asked, "plans": plans, "driver_seconds_per_rollout": seconds})


if __name__ == "__main__":
    main()
