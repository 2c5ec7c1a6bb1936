"""The `--quick` comparison of methods: how many, over how many seeds, how many of its verdicts are resolved, and its
seconds.
"""

import argparse
import tempfile
import time
from pathlib import Path

from _result import finish
from tokencredit.cli import main as command
from tokencredit.durable import read_json


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, help="runs side by side (default: one per core)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start, workers = time.perf_counter(), ["--workers", str(options.workers)] if options.workers else []
        code = command(["study", "compare", "--quick", "--out", folder, *workers])
        seconds, result = time.perf_counter() - start, read_json(Path(folder) / "result.json")
    resolved = [row for row in result["verdicts"] if row["verdict"] in ("better", "worse")]
    finish(
        "compare_quick",
        {
            "methods": len(result["methods"]),
            "seeds": len(result["seeds"]),
            "verdicts": len(result["verdicts"]),
            "resolved": len(resolved),
            "seconds": round(seconds, 1),
            "workers": result["workers"],
            "failed": len(result["failed"]),
            "found": {f"{row['method']} {row['measure']}": row["verdict"] for row in resolved},
            "exit": code,
        },
    )


if __name__ == "__main__":
    main()
