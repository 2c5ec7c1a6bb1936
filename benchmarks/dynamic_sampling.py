"""What dynamic sampling alone does at an equal number of rollouts: DAPO with it and without it, and GRPO, by the rules
of `tokencredit study compare` (its budget, prompts, seeds, learning rates checked on validation prompts).

DAPO less GRPO differs in dynamic sampling and in the clip, the mean over tokens, the penalty on overlong completions
and the learning rate besides. DAPO less DAPO over every group differs in dynamic sampling and, where the checks choose
so, in the rate.

--out of a finished comparison reuses its runs: the jobs are the same.
"""

import argparse
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

from _result import finish
from tokencredit.runs import Run
from tokencredit.stats import OverSeedsAndPrompts
from tokencredit.studies.compare.curves import Curves, Prompts, area, budget_to
from tokencredit.studies.compare.question import Comparison
from tokencredit.studies.compare.rates import choose
from tokencredit.studies.compare.study import plan
from tokencredit.studies.jobs import Tell, run_jobs

VARIANTS = {
    "dapo": ("dapo", {}),
    "dapo_every_group": ("dapo", {"mixed_groups_only": False}),
    "grpo": ("grpo", {}),
}
REACH = 0.8


def job(config, variant, factor, seed, *, final):
    """The comparison's own run; for a variant that it does not know, the same with other options and another name."""
    method, options = VARIANTS[variant]
    plain = config.job(method, factor, seed, final=final)
    changed = replace(plain.config, method_options=options)
    return replace(plain, name=plain.name.replace(method, variant, 1), config=changed) if options else plain


def train(config, out, seeds, workers):
    """{variant: (chosen multiple of the rate, its curves)}."""
    checks = {
        variant: [job(config, variant, factor, seed, final=False) for factor in config.rates for seed in range(1)]
        for variant in VARIANTS
    }
    failed = run_jobs(out, [each for jobs in checks.values() for each in jobs], workers, "learning rates", Tell())
    factors = {v: choose(config, out, [VARIANTS[v][0]], checks[v])[VARIANTS[v][0]]["factor"] for v in VARIANTS}
    runs = {v: {s: job(config, v, factors[v], s, final=True) for s in range(seeds)} for v in VARIANTS}
    failed |= run_jobs(out, [each for jobs in runs.values() for each in jobs.values()], workers, "runs", Tell())
    if failed:
        raise SystemExit(f"runs failed: {failed}")
    return {
        v: (factors[v], Curves.read({s: Run.open(out / each.name) for s, each in jobs.items()}, config.budget))
        for v, jobs in runs.items()
    }


def measures(curves, target, amount):
    """{measure: ([1 + draws, seeds], prompts)}."""
    marks, final = (
        Prompts(x.shape[-1], 400, i) for i, x in enumerate((curves.marks["pass@1"], curves.final["pass@1"]))
    )
    lines = marks.means(curves.marks["pass@1"])
    return {
        "mean pass@1 over the budget": (area(lines), marks.num_prompts),
        "rollouts to 80 %": (budget_to(lines, target) * amount, marks.num_prompts),
        "final pass@1": (final.means(curves.final["pass@1"]), final.num_prompts),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/dynamic_sampling"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    config, _, seeds = plan(Comparison())
    trained = train(config, options.out, seeds, options.workers)
    target = REACH * float(trained["grpo"][1].final["pass@1"].mean())
    found = {v: measures(curves, target, config.budget.amount) for v, (_, curves) in trained.items()}
    estimates = {
        f"{v}/{name}": asdict(OverSeedsAndPrompts(draws, num).estimate())
        for v, each in found.items()
        for name, (draws, num) in each.items()
    }
    for one, other in combinations(VARIANTS, 2):
        for name, (draws, num) in found[one].items():
            difference = OverSeedsAndPrompts(draws - found[other][name][0], num)
            estimates[f"{one} less {other}/{name}"] = asdict(difference.estimate()) | {"p": difference.p_value()}
    rates = {v: factor * config.base.learning_rate for v, (factor, _) in trained.items()}
    finish(
        "dynamic_sampling",
        {"figures": estimates, "learning_rates": rates, "rollouts": config.budget.amount, "seeds": list(range(seeds))},
    )


if __name__ == "__main__":
    main()
