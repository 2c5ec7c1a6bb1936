"""Does weighting the tokens of preference pairs help, at an equal number of rollouts?

Every arm spends the same number of rollouts on pairs, learns from them for the same number of steps at the rate that
served it best on validation prompts, and is sampled on held-out prompts. Pairs and runs are stored when they are made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokencredit.lm.fingerprint import model_hash
from tokencredit.studies.preference.figures import blocks
from tokencredit.studies.preference.lots import buy
from tokencredit.studies.preference.question import ARMS, Arm, PreferenceConfig
from tokencredit.studies.preference.training import judged, learned
from tokencredit.studies.study import Work

EVALUATION = 1
"""Seed of the samples on held-out prompts, the same for every run."""


def run(config: PreferenceConfig, work: Work) -> dict[str, Any]:
    """The whole study: its blocks."""
    config = replace(config, policy=config.policy.settled())
    start = config.policy.open()
    rows = start.task.rows("test", config.prompts + config.prompts // 2, 0)
    if len(rows) < 6:
        raise ValueError(f"{start.task.name} has {len(rows)} held-out prompts: the study needs at least 6")
    held, validation = rows[: -len(rows) // 3], rows[-len(rows) // 3 :]
    seeds = range(config.seed, config.seed + config.seeds)
    about = {"task": config.policy.task, "model": config.policy.model, "judge": start.task}
    work.begin(**about, weights=model_hash(start.model), policy=config.policy.as_dict())
    stages, say = work.stages, work.say

    def pairs_of(arm: Arm, seed: int) -> dict[str, Any]:
        say(f"seed {seed}: pairs of {arm.pairs}")
        return stages.value(f"{arm.pairs}-{seed}", lambda: buy(arm.pairs, start, config, seed))

    def outcome(arm: Arm, rate: float, seed: int, prompts: list, part: str) -> dict[str, Any]:
        bought = pairs_of(arm, seed)["pairs"]
        say(f"{arm.name} at {rate:g}, seed {seed}")

        def make() -> dict[str, Any]:
            return judged(learned(config, bought, arm.method, rate, seed), prompts, config, EVALUATION)

        return stages.value(f"{part}-{arm.name}-{rate:g}-{seed}", make)

    base = stages.value("base", lambda: judged(start, held, config, EVALUATION))
    checks, chosen = {}, {arm.name: config.rates[0] for arm in ARMS}
    for arm in ARMS if len(config.rates) > 1 else ():
        checks[arm.name] = [outcome(arm, rate, config.seed, validation, "check") for rate in config.rates]
        right = [sum(check["correct"]) for check in checks[arm.name]]
        chosen[arm.name] = config.rates[right.index(max(right))]
    runs = [{arm.name: outcome(arm, chosen[arm.name], seed, held, "run") for arm in ARMS} for seed in seeds]
    bought = [{arm.name: pairs_of(arm, seed) for arm in ARMS} for seed in seeds]
    by_arm = [{arm.name: [some[arm.name] for some in each] for arm in ARMS} for each in (runs, bought)]
    return blocks(config, base, *by_arm, chosen, checks, work.book)
