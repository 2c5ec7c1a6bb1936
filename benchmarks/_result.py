"""Prints a benchmark's figures as one JSON line, the last one, and keeps it in benchmarks/results/."""

import json
import os
import platform
import resource
import subprocess
import sys
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


def peak_gib() -> float:
    """The largest resident set of this process so far. Where Linux tells it, of its own address space: `getrusage`
    also counts what the process that started it held at that moment.
    """
    own = resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if own is None else own / 2**30


def resident(field: str) -> int | None:
    """Bytes: VmRSS, what is resident now; VmHWM, the most there was; None where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def alone(*words: str) -> dict:
    """What a script prints as its last line, JSON, run in a process of its own: so its peak of memory is its own."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
