"""What the attribution found, in sentences: nothing is claimed that its interval does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencredit.dynamics.exchange import THIS
from tokencredit.figure import Figure

Figures = Mapping[str, Figure]
MILLI = 1e3
HEAVY = 0.2


def findings(result: Mapping[str, Any], figures: Figures) -> list[str]:
    """One sentence or two for every block."""
    return [
        *_parts(result, figures),
        *_concentration(result, figures),
        *_covariance(result, figures),
        *_predictors(result, figures),
        *_methods(result, figures),
        *_pivotal(result, figures),
    ]


def shown(figure: Figure, scale: float = 1.0) -> str:
    """Value and interval; `scale` 1000 for thousandths."""
    return figure.text(".3g", scale)


def _parts(result: Mapping[str, Any], figures: Figures) -> list[str]:
    about, total = result["about"], {goal: figures[parts["total"]] for goal, parts in result["parts"].items()}
    said = [
        f"The next step of {about['method']} is predicted to change mean token entropy by"
        f" {shown(total['entropy'], MILLI)} thousandths of a nat and expected reward by {shown(total['reward'], MILLI)}"
        " thousandths."
    ]
    known = [goal for goal in total if total[goal].sign]
    shares = [
        f"{100 * figures[result['parts'][goal]['tokens']].value / total[goal].value:.0f} % of the change of {goal}"
        for goal in known
    ]
    if shares:
        said.append(
            f"The rollouts of this step make {' and '.join(shares)}; momentum of earlier steps and weight decay make"
            " the rest."
        )
    heavy = [
        f"{100 * part:.0f} % of the variance for {goal}"
        for goal, part in result["tails"].items()
        if part and part > HEAVY
    ]
    if heavy:
        said.append(
            f"A single evaluation prompt makes {' and '.join(heavy)}: that interval may be too narrow, evaluate on more"
            " prompts."
        )
    return said


def _concentration(result: Mapping[str, Any], figures: Figures) -> list[str]:
    shares = [
        f"{shown(figures[name])} of all that tokens do to {goal}" for goal, name in result["concentration"].items()
    ]
    return [f"The 2 % of tokens that do most make {' and '.join(shares)} (sum of sizes)."]


def _covariance(result: Mapping[str, Any], figures: Figures) -> list[str]:
    """Nothing where fewer than 50 tokens have a gradient."""
    groups, signs = result["covariance"]["groups"], result["covariance"]["signs"]
    if "top 2 %" not in groups:
        return []
    top, rank = figures[groups["top 2 %"]["sum"]], figures[result["diagnostics"]["tokens"]["entropy"]["covariance"]]
    does = {
        -1: "lower entropy, as the tabular picture says",
        0: "are not shown to move entropy",
        1: "raise entropy, against the tabular picture",
    }
    ranks = {-1: "ranked as the picture says", 0: "not ranked by it", 1: "ranked against it"}
    return [
        (
            f"The 2 % of tokens with the highest covariance {does[top.sign]}: {shown(top, MILLI)} thousandths of a"
            f" nat. Over all tokens, what they do to entropy is {ranks[rank.sign]}: rank correlation {shown(rank)}."
        ),
        "The sign of what a token does to entropy is predicted by "
        + " and by ".join(
            f"{name} for {shown(figures[found['tokens']])} of the tokens ({shown(figures[found['weighted']])} weighted"
            " by size)"
            for name, found in signs.items()
        )
        + ".",
    ]


def _predictors(result: Mapping[str, Any], figures: Figures) -> list[str]:
    said = []
    for level, targets in result["diagnostics"].items():
        best = {}
        for target in ("entropy", "reward"):
            tested = {
                name: figures[figure] for name, figure in targets[target].items() if figures[figure].more["holm"] < 0.05
            }
            if tested:
                name = max(tested, key=lambda each: abs(tested[each].value))
                best[target] = f"{target}: {name} ({shown(tested[name])})"
        if best:
            said.append(
                f"Between {level}, the diagnostic that ranks the contributions best, to {'; to '.join(best.values())}."
            )
    return said


def _methods(result: Mapping[str, Any], figures: Figures) -> list[str]:
    others, baseline = result["methods"][1:], result["about"]["baseline"]
    verdicts: dict[str, list[str]] = {}
    for each in others:
        found = each["steps"]["equal"][THIS]
        rate = (
            f" at {shown(figures[found['rate']])} nats per unit of reward"
            if found["rate"] and "given up" in found["verdict"]
            else ""
        )
        verdicts.setdefault(found["verdict"], []).append(each["name"] + rate)
    said = ["; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items())]
    acts = [
        f"{each['name']}: {', '.join(part for part, does in each['acting'].items() if does) or 'nothing'}"
        for each in others
        if not all(each["acting"].values())
    ]
    found = [f"Against {baseline} on these rollouts, at equal length of step: {said[0]}."] if others else []
    if acts:
        found.append(
            f"Of what sets these apart from {baseline}, only this acts at the first step on rollouts:"
            f" {'; '.join(acts)}."
        )
    return found


def _pivotal(result: Mapping[str, Any], figures: Figures) -> list[str]:
    block = result["pivotal"]
    if block is None:
        return []
    said = []
    for goal, found in block["goals"].items():
        captured, gap = found["captured"], found["compared"].get("|Q − V|")
        against = f", difference {shown(figures[gap['figure']])}" if gap else ""
        sums = ", the others ".join(shown(figures[each["sum"]], MILLI) for each in found["sums"].values())
        said.append(
            f"The 20 % of tokens with the largest |Q − V| ({block['source']}) make"
            f" {shown(figures[captured['|Q − V|']])} of all that tokens do to {goal}, the 20 % with the highest entropy"
            f" {shown(figures[captured['entropy']])}{against}; rank correlation of |Q − V| with it"
            f" {shown(figures[found['spearman']['|Q − V|']])}. With their signs they add up to {sums} thousandths."
        )
    return said
