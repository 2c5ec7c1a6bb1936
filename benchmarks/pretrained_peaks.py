"""Peak memory of every command on SmolLM2-135M, fp32 on a CPU, at its default memory: each alone in a process.

    python benchmarks/pretrained_peaks.py [--only attribute ...] [--run DIR]

Numbers of prompts and rollouts are small, for time: a command puts no more rows through the model at once than its
budget of memory allows, however many there are. Of `train` the one batch is of the default size, 64 prompts × 8.
peak_gib: the largest resident set of the command, libraries and weights included; seconds: of processor. `highest` is
the largest of all. Those that need a checkpoint read the run that `train` made, or the one that --run names. With
--only, the other commands keep the figures that the result file has.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _pretrained import model_path
from _result import finish

CHAT = ("--chat", "--temperature", "0.6")
SMALL = "--prompts 4 --group 4"
COMMANDS = {
    "train": "train --method gtpo --steps 1 --quiet --set updates=1 --set learning_rate=2e-5",
    "evaluate": "evaluate --prompts 16 --samples 4",
    "score": "score --prompts 16",
    "pivotality": "pivotality run --prompts 2 --samples 2 --rollouts 8",
    "correlation": "study correlation --prompts 4 --completions 1 --rollouts 8 --bootstraps 50 --temperatures",
    "variance": "study variance --prompts 8 --group 4 --batch 2 --methods gtpo ptw_entropy",
    "noise_scale": f"dynamics noise-scale {SMALL}",
    "entropy": f"dynamics entropy {SMALL} --updates 1 --rates 4 --eval-prompts 16",
    "attribute": "dynamics attribute --prompts 8 --group 4 --entropy 24 2 --reward 24 2 --trees 0"
    " --methods grpo gtpo ptw_entropy",
    "kernel": "dynamics kernel",
}
ON_RUN = ("noise_scale", "entropy", "attribute", "kernel")


def measure(name: str, folder: Path, run: Path) -> dict[str, float]:
    """Peak and seconds of one command; its own words go to the terminal, and one that fails ends the benchmark."""
    out = () if name == "evaluate" else ("--out", str(folder / ("scores.parquet" if name == "score" else name)))
    model = ("--model", str(run)) if name in ON_RUN else ("--model", model_path(), "--task", "stories", *CHAT)
    words = [sys.executable, str(Path(__file__).parent / "_peak.py"), *COMMANDS[name].split(), *model, *out]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    used = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"code": 1}
    if used["code"]:
        raise SystemExit(f"{name} failed:\n{done.stdout}")
    return {"peak_gib": round(used["peak_gib"], 3), "seconds": round(used["seconds"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--run", type=Path, help="a training run of that model, with a checkpoint")
    options = parser.parse_args()
    former = Path(__file__).parent / "results" / "pretrained_peaks.json"
    found = json.loads(former.read_text())["commands"] if former.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        needed = {"train"} if set(options.only) & set(ON_RUN) and not options.run else set()
        run = options.run or Path(folder) / "train"
        for name in [name for name in COMMANDS if name in needed | set(options.only)]:
            found[name] = measure(name, Path(folder), run)
            print(name, found[name], file=sys.stderr, flush=True)
    finish("pretrained_peaks", {"highest": max(each["peak_gib"] for each in found.values()), "commands": found})


if __name__ == "__main__":
    main()
