"""What inspecting a log without a model costs: `python benchmarks/inspect_page.py` writes 200 steps of 256 rollouts in
the layout of TRL's table, 200 words each, and inspects it in a process of its own: seconds, memory, the page's size.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from _result import alone, finish, peak_gib

STEPS, ROLLOUTS, WORDS, GROUP = 200, 256, 200, 8


def write_log(folder: Path, steps: int) -> None:
    """completions_STEP.parquet, as GRPOTrainer(log_completions=True) writes it."""
    from tokencredit.durable import write_parquet

    rng = random.Random(0)
    for step in range(1, steps + 1):
        rows = []
        for i in range(ROLLOUTS):
            reward = float(rng.random() < 0.2 + 0.5 * step / steps)
            words = " ".join(f"w{rng.randrange(2000)}" for _ in range(WORDS))
            row = {"step": step, "prompt": f"prompt {step} {i // GROUP}", "completion": words}
            rows.append(row | {"correct": reward, "format": float(rng.random() < 0.9), "advantage": reward - 0.5})
        write_parquet(folder / f"completions_{step:05d}.parquet", rows)


def inspect(folder: Path) -> dict[str, float]:
    """A core's seconds and peak memory of this process, and the page's size."""
    from tokencredit.cli import main as tokencredit

    start, out = time.process_time(), folder.parent / "out"
    assert tokencredit(["inspect", str(folder), "--out", str(out)]) == 0
    return {
        "core_seconds": time.process_time() - start,
        "peak_gib": peak_gib(),
        "page_mb": (out / "report.html").stat().st_size / 1e6,
        "result_mb": (out / "result.json").stat().st_size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the log (default: %(default)s)")
    parser.add_argument("--inspect", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inspect:
        print(json.dumps(inspect(args.inspect)))
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        write_log(log, args.steps)
        found = alone(__file__, "--inspect", str(log)) | {"rollouts": args.steps * ROLLOUTS}
    print(found)
    if args.steps == STEPS:
        finish("inspect_page", found)


if __name__ == "__main__":
    main()
