"""What the runs say: success on held-out prompts, differences between arms, what was bought, how rates served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokencredit.figure import Figure
from tokencredit.stats import OverSeedsAndPrompts, holm, mean_of_units, share_of_units
from tokencredit.studies.book import Book
from tokencredit.studies.preference.question import ARMS, CONTRASTS, PreferenceConfig

DRAWS, LEVEL = 400, 0.05
UNRESOLVED = "not resolved"
Outcome = Mapping[str, Any]


def blocks(
    config: PreferenceConfig,
    base: Outcome,
    runs: Mapping[str, Sequence[Outcome]],
    bought: Mapping[str, Sequence[Mapping]],
    chosen: Mapping[str, float],
    checks: Mapping[str, Sequence[Outcome]],
    book: Book,
) -> dict[str, Any]:
    """{"base", "arms", "contrasts", "rates", "findings"}; figures go into the book."""
    success = {name: _over(each, config) for name, each in runs.items()}
    share = "share of prompts"
    untrained = _over([base], config)
    arms = []
    for arm in ARMS:
        outcomes, lots = runs[arm.name], bought[arm.name]
        entered = {
            "pass@1": book.enter(f"pass@1/{arm.name}", success[arm.name].estimate().within(0, 1), share),
            "gain": book.enter(f"gain/{arm.name}", _less(success[arm.name], untrained).estimate(), share),
            **{
                what: book.enter(
                    f"{what}/{arm.name}", mean_of_units([each[what] for each in outcomes]).within(least=0), unit
                )
                for what, unit in (("entropy", "nats per token"), ("length", "tokens"))
            },
            "pairs": book.number(f"pairs/{arm.name}", float(np.mean([len(lot["pairs"]) for lot in lots])), "pairs"),
        }
        spent = [lot["rollouts"] for lot in lots]
        about = {"name": arm.name, "what": arm.what, "rate": chosen[arm.name], "spent": spent, "figures": entered}
        arms.append(about | {"prompts": [lot["prompts"] for lot in lots]})
    contrasts = _contrasts(success, book, config)
    found = {
        "base": {
            "pass@1": book.enter("pass@1/base", share_of_units(np.array(base["correct"]) / config.samples), share),
            "entropy": base["entropy"],
            "length": base["length"],
        },
        "arms": arms,
        "contrasts": contrasts,
        "rates": _rates(config, checks, book),
        "prompts": len(base["correct"]),
    }
    return found | {"findings": _findings(found, config, book.figures)}


def _over(outcomes: Sequence[Outcome], config: PreferenceConfig) -> OverSeedsAndPrompts:
    """The share of right samples of every seed, and in draws of prompts that are the same for all arms."""
    share = np.array([each["correct"] for each in outcomes]) / config.samples  # [S, P]
    place = np.random.default_rng(0).integers(share.shape[1], size=(DRAWS, share.shape[1]))
    return OverSeedsAndPrompts(np.vstack([share.mean(1), *(share[:, some].mean(1) for some in place)]), share.shape[1])


def _less(one: OverSeedsAndPrompts, other: OverSeedsAndPrompts) -> OverSeedsAndPrompts:
    """Their difference, seed by seed, or of every seed from the only one."""
    return OverSeedsAndPrompts(one.draws - other.draws, one.num_prompts)


def _contrasts(
    success: Mapping[str, OverSeedsAndPrompts], book: Book, config: PreferenceConfig
) -> list[dict[str, Any]]:
    apart = [_less(success[arm], success[other]) for arm, other in CONTRASTS]
    p_values = [each.p_value() for each in apart]
    found = []
    for (arm, other), each, p, adjusted in zip(CONTRASTS, apart, p_values, holm(p_values)):
        estimate = each.estimate()
        name = book.enter(f"difference/{arm} less {other}", estimate, "share of prompts", p=p, holm=float(adjusted))
        resolved = adjusted < LEVEL and config.seeds > 1
        verdict = ("better" if estimate.value > 0 else "worse") if resolved else UNRESOLVED
        found.append({"arm": arm, "other": other, "difference": name, "verdict": verdict})
    return found


def _rates(config: PreferenceConfig, checks: Mapping[str, Sequence[Outcome]], book: Book) -> dict[str, list[str]]:
    """{arm: names of the figures, rate by rate}; empty where there was one rate."""
    return {
        name: [
            book.enter(
                f"validation/{name}/{rate:g}",
                share_of_units(np.array(each["correct"]) / config.samples),
                "share of prompts",
            )
            for rate, each in zip(config.rates, outcomes)
        ]
        for name, outcomes in checks.items()
    }


def _findings(found: Mapping[str, Any], config: PreferenceConfig, figures: Mapping[str, Figure]) -> list[str]:
    said = []
    for each in found["contrasts"]:
        figure = figures[each["difference"]]
        tested = f"{each['verdict']} (p = {figure.more['holm']:.2g}, Holm's over {len(found['contrasts'])})"
        told = tested if config.seeds > 1 else "over prompts alone"
        said.append(f"{each['arm']} less {each['other']}: {figure.text('.3f', sign=True)} pass@1, {told}.")
    if config.seeds < 2:
        said.append("One seed: other prompts to train on may give other differences, and no verdict is given.")
    if still := [arm["name"] for arm in found["arms"] if not figures[arm["figures"]["gain"]].sign]:
        said.append(f"Not told from the untrained policy, intervals not adjusted: {', '.join(still)}.")
    for place, end, advice in ((0, "lowest", "lower"), (-1, "highest", "higher")):
        at = [arm["name"] for arm in found["arms"] if len(config.rates) > 1 and arm["rate"] == config.rates[place]]
        if at:
            said.append(
                f"The {end} rate that was checked served {', '.join(at)} best: a {advice} one may serve better."
            )
    if short := [arm["name"] for arm in found["arms"] if max(arm["spent"]) < 0.9 * config.rollouts]:
        said.append(
            f"Less than nine tenths of the rollouts were spent, prompts being used up or dear: {', '.join(short)}."
        )
    return said
