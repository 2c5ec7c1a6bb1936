"""What reading a log costs: `python benchmarks/inspect_log.py` writes a million rollouts as verl's JSONL and as Parquet
of token ids, and reads each in a process of its own: rows per second of one core, peak memory of the whole process.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from _result import alone, finish, peak_gib

ROWS, TOKENS, SHARD = 1_000_000, 48, 10_000


def write_verl(folder: Path, rows: int) -> None:
    """STEP.jsonl of 10,000 rollouts each, eight of a prompt; 48 words in each completion."""
    words = " ".join(str(i % 10) for i in range(TOKENS))
    for step in range(-(-rows // SHARD)):
        with (folder / f"{step}.jsonl").open("w") as file:
            for i in range(min(SHARD, rows - step * SHARD)):
                row = {"input": f"What is {i // 8} + {step}?", "output": words, "gts": str(i // 8 + step)}
                file.write(json.dumps({**row, "score": float(i % 3 == 0), "step": step, "acc": i % 3 == 0}) + "\n")


def write_ids(folder: Path, rows: int) -> None:
    """One Parquet file of ids, log-probs and entropies of 48 tokens."""
    import pyarrow
    import pyarrow.parquet

    lists = {"completion_ids": list(range(TOKENS)), "logprobs": [-0.5] * TOKENS, "entropy": [0.25] * TOKENS}
    writer = None
    for start in range(0, rows, SHARD):
        num = min(SHARD, rows - start)
        table = pyarrow.table(
            {"prompt_ids": [[1, 2, i // 8] for i in range(start, start + num)]}
            | {name: [values] * num for name, values in lists.items()}
            | {"reward": [float(i % 3 == 0) for i in range(num)], "step": [start // SHARD] * num}
        )
        writer = writer or pyarrow.parquet.ParquetWriter(folder / "log.parquet", table.schema)
        writer.write_table(table)
    writer.close()


def read(folder: Path) -> dict[str, float]:
    """Rows per second of one core, and the peak memory of this process in GiB."""
    from tokencredit import logs

    start = time.process_time()
    rewarded = sum(rollout.reward is not None for rollout in logs.read(folder))
    seconds = time.process_time() - start
    return {"rows": rewarded, "rows_per_second": rewarded / seconds, "peak_gib": peak_gib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="rollouts of each log (default: %(default)s)")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read)))
        return
    found = {}
    for name, make in (("verl", write_verl), ("ids", write_ids)):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), args.rows)
            found[name] = alone(__file__, "--read", folder)
        print(name, found[name])
    worst = {
        "rows_per_second": min(each["rows_per_second"] for each in found.values()),
        "peak_gib": max(each["peak_gib"] for each in found.values()),
    }
    if args.rows == ROWS:
        finish("inspect_log", worst | found)


if __name__ == "__main__":
    main()
