"""How far weights after two steps in two processes are from those of one, method by method: ddp, fsdp2, zero2, zero3.

    python benchmarks/processes.py                    # ddp and fsdp2
    python benchmarks/processes.py ddp fsdp2 zero2 zero3   # with deepspeed, which compiles with g++ at its first use

The tiny model and the fixed completions of the tests (tests/trl_two_processes.py), SGD, two gloo processes on CPUs.
FSDP2 is made to shard there (tests/fsdp_on_cpu.py). `weights` and `credit` are the largest absolute differences, over
all parameters and all tokens of all rollout batches; `cases` what was trained. What is not in the file was not run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from _result import finish

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from safetensors.torch import load_file  # noqa: E402

from trl_tiny import weights  # noqa: E402
from trl_two_processes import MODES, run  # noqa: E402


def main(folder: Path, *modes: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for mode in modes:  # each in processes of its own: a mode is told in their environment
        if not all((folder / f"{mode}.{case}.1.json").exists() for case in MODES[mode]):
            subprocess.run(
                [*command, str(TESTS / "trl_two_processes.py"), str(folder), mode],
                check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
    cases = dict.fromkeys(case for mode in modes for case in MODES[mode])
    alone = {case: run(case, 1, folder) for case in cases}
    figures: dict = {mode: {"weights": {}, "credit": {}} for mode in modes}
    for mode in modes:
        for case in MODES[mode]:
            two = [load_file(folder / f"{mode}.{case}.{rank}.safetensors") for rank in range(2)]
            own = weights(alone[case])
            figures[mode]["weights"][case] = max(float((x["weights"] - own).abs().max()) for x in two)
            figures[mode]["credit"][case] = max(
                float((x[f"{turn}.advantages"] - batch["advantages"]).abs().max())
                for x in two
                for turn, batch in enumerate(alone[case].kept)
            )
        figures[mode]["largest"] = {name: max(found.values()) for name, found in figures[mode].items()}
        figures[mode]["cases"] = len(MODES[mode])
    libraries = ("accelerate", "trl", "transformers", *(["deepspeed"] if find_spec("deepspeed") else []))
    finish("processes", figures | {"versions": {name: version(name) for name in libraries}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modes", nargs="*", default=["ddp", "fsdp2"])
    parser.add_argument("--folder", type=Path, help="where processes write; a mode that is there is not run again")
    options = parser.parse_args()
    main(options.folder or Path(tempfile.mkdtemp()), *options.modes)
