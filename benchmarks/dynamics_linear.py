"""Predicted against true change of entropy on the embedded world: trains a short GRPO run and asks `tokencredit
dynamics entropy` about it.

    python benchmarks/dynamics_linear.py [--seed 0] [--updates 8] [--workers 2]

`slopes`: |ΔH| against the learning rate, by kind of truth; `r2` the least of the updates'. `error_low`, `error_high`:
95 % interval of the mean relative error of the linear prediction against fresh samples of the moved policy;
`spread_256` that of predictions from 256 rollouts. `seconds` are those of the study, `core_seconds` what its stages
took in all processes together. The defaults are those of the command.
"""

import argparse
import tempfile
import time
from pathlib import Path

from _checkpoint import STEP, trained_run
from _result import finish
from tokencredit.lm.policy import PolicyConfig
from tokencredit.studies.entropy.question import STUDY, SweepConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("seed", 0), ("updates", 8), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with trained_run(options.seed) as trained, tempfile.TemporaryDirectory() as folder:
        config = SweepConfig(
            policy=PolicyConfig(str(trained)),
            checkpoint=STEP,
            updates=options.updates,
            seed=options.seed,
            workers=options.workers,
        )
        start = time.perf_counter()
        result = STUDY.run(config, Path(folder) / "entropy", command="python benchmarks/dynamics_linear.py", say=print)
        seconds = time.perf_counter() - start
    f = {name: figure.as_json() for name, figure in result["figures"].items()}
    names = ("same", "independent", "fresh")
    error, spread = f["relative_error_mean"], f[f"relative_error_spread_{result['sub_batch']}"]
    picked = (
        "relative_error_mean",
        "relative_error_mean/own",
        "predicted_over_true",
        "relative_error_mean/batch",
        f"relative_error_spread_{result['sub_batch']}/batch",
        "slope/independent/whole",
        "theory/natural gradient/batch/correlation",
        "theory/policy gradient/batch/correlation",
        "linear_range",
        "relative_error_mean/whole/linear",
        "relative_error_mean/whole/quadratic",
        "precision_floor",
        "precision_floor/float64",
    )
    finish(
        "dynamics_linear",
        {
            "slopes": {name: {key: f[f"slope/{name}"][key] for key in ("value", "low", "high")} for name in names},
            "r2": {name: f[f"r2/{name}"]["value"] for name in names},
            "error_low": error["low"],
            "error_high": error["high"],
            "spread_256": spread["value"],
            "spread_low": spread["low"],
            "spread_high": spread["high"],
            "seconds": seconds,
            "core_seconds": sum(result["seconds"].values()),
            "figures": {name: f[name] for name in picked},
            "updates": options.updates,
            "seed": options.seed,
            "checkpoint": STEP,
            "findings": result["findings"],
        },
    )


if __name__ == "__main__":
    main()
