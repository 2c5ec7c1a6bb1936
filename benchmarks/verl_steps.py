"""One step of verl's actor worker for every method against plain torch: how far credit, loss and gradient are apart.

Needs the environment of `make test-verl`:

    PYTHONPATH=tests/on_verl .venv-verl/bin/python benchmarks/verl_steps.py

Two FSDP2 processes over gloo, 32 rollouts of tests/data; differences over the largest number of the plain side, the
loss's as it is. The ratios are not 1: two steps of GRPO have moved the policy.
"""

import tempfile
from pathlib import Path

from _result import finish
from verl_cpu.run import WORKERS, prepare, steps

ROLLOUTS = Path(__file__).parents[1] / "tests" / "data" / "reckon_rollouts.json"
INVERSE = ("gtpo", "gtpo_2025_08", "gtpo_geometric")


def main():
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        prepare(out, prompts=8)
        found = steps(out, ROLLOUTS)
    methods = found.pop("methods")
    others = {name: step for name, step in methods.items() if name not in INVERSE}
    finish(
        "verl_steps",
        {
            "methods": len(methods),
            "in_channel": sum(step["loss_mode"] == "tokencredit_channel" for step in methods.values()),
            "workers": WORKERS,
            "gradient": max(step["gradient"] for step in methods.values()),
            "loss": max(step["loss"] for step in methods.values()),
            "credit": max(step["credit"] for step in others.values()),
            "credit_inverse_entropy": max(methods[name]["credit"] for name in INVERSE),
            "credit_given_scores": max(step["credit_given_scores"] for step in methods.values()),
            "difference": found,
            "per_method": methods,
        },
    )


if __name__ == "__main__":
    main()
