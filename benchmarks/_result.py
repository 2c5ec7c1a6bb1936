"""Prints a benchmark's figures as one JSON line, the last one, and keeps it in benchmarks/results/."""

import json
import os
import platform
from pathlib import Path

import torch


def finish(name: str, figures: dict) -> None:
    machine = {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    line = json.dumps({**figures, "machine": machine})
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    print(line)
