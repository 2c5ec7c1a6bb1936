"""How far our own estimators of tokens are from the known truth of the embedded world, at the tokens they spent.

    python benchmarks/known_truth.py [--prompts 24] [--samples 2] [--truth DIR]

Fixed budgets of re-sampling, budgets in two stages, and the proxies, which sample nothing, on the same completions;
judged by `tokencredit world judge`. Intervals are by prompt.
"""

import argparse
import tempfile
from pathlib import Path

from _result import finish
from tokencredit.cli import main as tokencredit
from tokencredit.truth.judge import judge_file

PROXIES = ("entropy", "surprisal", "head_norm", "gradient_norm", "fisher_trace", "attention", "uniform")
RUNS = {
    "fixed, 2 rollouts": ("--rollouts", "2"),
    "fixed, 4 rollouts": ("--rollouts", "4"),
    "fixed, 8 rollouts": ("--rollouts", "8"),
    "fixed, 32 rollouts": ("--rollouts", "32"),
    "two stages, 2 then 16 for a fifth": (
        *("--budget", "two-stage", "--rollouts", "2", "--confirm", "16", "--select", "0.2"),
        *("--estimand", "before_after"),
    ),
}


def call(*words):
    if tokencredit([str(word) for word in words]):
        raise SystemExit(f"tokencredit {' '.join(map(str, words))} failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--truth", type=Path, help="directory of a truth that is there already, or is written there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        truth = options.truth or here / "truth"
        if not (truth / "truth.json").exists():
            call("world", "truth", "--out", truth, "--prompts", options.prompts, "--samples", options.samples)
        scores = here / "scores.parquet"
        call("score", "--data", truth / "traces.parquet", "--scores", *PROXIES, "--method", "exact", "--out", scores)
        found = [each for each in judge_file(truth, scores, spent=0) if each.column in PROXIES]
        for number, words in enumerate(RUNS.values()):
            call("pivotality", "run", "--traces", truth, *words, "--out", here / f"run{number}")
        judged = {name: judge_file(truth, here / f"run{number}") for number, name in enumerate(RUNS)}
    figures = {f"{each.column}: {name}": figure.as_json() for each in found for name, figure in each.figures.items()}
    spent = {}
    for run, columns in judged.items():
        for each in columns:
            if each.column in ("before_after", "replace", "spread"):
                spent[run] = each.spent
                figures |= {f"{run}, {each.column}: {name}": f.as_json() for name, f in each.figures.items()}
    finish("known_truth", {"figures": figures, "spent": spent, "prompts": options.prompts, "samples": options.samples})


if __name__ == "__main__":
    main()
