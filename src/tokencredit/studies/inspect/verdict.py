"""What the parts found, in plain words: each sentence with the figures that it rests on and the lines behind it, and
none that is not resolved: what tells a figure from 0 is said where it holds after Holm, over all that its part may say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy import stats

from tokencredit.figure import Figure
from tokencredit.stats import holm

Figures = Mapping[str, Figure]
SOME = 0.05
"""The share from which on something is worth a sentence, at its lower limit."""
FEW = 8
"""Prompts or groups below which an interval over them carries no sentence."""


def finding(
    said: str, part: str, figures: Sequence[str], lines: Sequence[str] = (), *, tests: str | None = None
) -> dict[str, Any]:
    """One finding: its sentence, the part it is of, its figures by name, and where it stands in the log. It may be said
    where the figure that it `tests` is told from 0.
    """
    return {"said": said, "part": part, "figures": list(figures), "lines": list(lines), "tests": tests}


def verdict(blocks: Mapping[str, Any], figures: Figures) -> list[dict[str, Any]]:
    """The findings of every part that there is."""
    found = []
    for name, of in OF_PARTS.items():
        enough = name in blocks and units(blocks[name]) >= FEW
        some = list(of(blocks[name], figures)) if enough else []
        tested = [each for each in some if each["tests"]]
        adjusted = holm([p_value(figures[each["tests"]]) for each in tested]) if tested else []
        dropped = [each for each, p in zip(tested, adjusted) if not p < SOME]
        found += [each for each in some if each not in dropped]
    return found


def units(block: Mapping[str, Any]) -> int:
    """How many prompts or groups the intervals of a part are over."""
    if "evaluation" in block:
        return int(block["evaluation"]["prompts"])
    return int(block["groups"] if "groups" in block else block["prompts"])


def p_value(figure: Figure) -> float:
    """Two-sided, of the figure being 0: small exactly where its interval leaves out 0."""
    toward = figure.value - figure.low if figure.value > 0 else figure.high - figure.value
    if not math.isfinite(toward):
        return 1.0
    if toward <= 0:
        return float(figure.value == 0)
    return float(2 * stats.norm.sf(stats.norm.ppf(0.975) * abs(figure.value) / toward))


def percent(figure: Figure) -> str:
    """A share in percent with its interval."""
    return " ".join(filter(None, (f"{figure.numbers('.0f', 100)[0]} %", figure.numbers(".0f", 100)[1])))


def _of_log(block: Mapping[str, Any], figures: Figures) -> Iterator[dict[str, Any]]:
    totals, trends = block["totals"], block["trends"]
    for name, sentence in (
        ("groups without signal", "of the groups have no signal: all their rollouts earn the same"),
        ("truncated", "of the rollouts were cut off at the length limit"),
        ("repeated completions", "of the rollouts repeat another one of their group"),
    ):
        if name in totals and figures[totals[name]].low > SOME:
            yield finding(f"{percent(figures[totals[name]])} {sentence}.", "log", [totals[name]])
    early, late = block["quarters"]
    for name, key in trends.items():
        change = figures[key]
        by = f"{_size(change)} {change.unit}"
        verb = "rose" if change.value > 0 else "fell"
        said = f"{name[0].upper()}{name[1:]} {verb} from steps {_steps(early)} to {_steps(late)} by {by}."
        yield finding(said, "log", [key], tests=key)
    for each in block["words"][:3]:
        change = figures[each["figure"]]
        verb = "appears" if change.value > 0 else "vanishes"
        yield finding(
            f"The token {each['token']!r} {verb}: {each['early']:.0%} of the early rollouts have it, {each['late']:.0%}"
            f" of the late ones, {change.text('+.2f')}.",
            "log",
            [each["figure"]],
        )


def _steps(span: Sequence[int]) -> str:
    return str(span[0]) if span[0] == span[1] else f"{span[0]}–{span[1]}"


def _of_credit(block: Mapping[str, Any], figures: Figures) -> Iterator[dict[str, Any]]:
    known = block["methods"].get("logged")
    if known is None:
        return
    none, against = figures[known["tokens with credit"]], figures[known["against the outcome"]]
    if none.high < 1 - SOME:
        yield finding(f"{percent(none)} of the tokens have any credit.", "credit", [known["tokens with credit"]])
    if against.low > 0.01:
        lines = [each["place"] for each in block["disagreements"]["rollouts"]]
        yield finding(
            f"{percent(against)} of the logged credit goes against the outcome of its rollout.",
            "credit",
            [known["against the outcome"]],
            lines,
        )


def _of_audit(block: Mapping[str, Any], figures: Figures) -> Iterator[dict[str, Any]]:
    if not block["resolved"]:
        return
    name = block["of"]
    whose = "logged credit" if name == "logged" else f"credit of {name}"
    reached, gap = figures[block["reached"][name]], figures[block["chance"][name]]
    sign = gap.sign if gap.more.get("holm", 1.0) < SOME else 0
    verb = {1: "more than", -1: "less than", 0: "not told from"}[sign]
    yield finding(
        f"The 20 % of tokens with the most {whose} hold {percent(reached)} of the squared effect Q − V, {verb} chance"
        f" ({gap.text('+.2f')}).",
        "audit",
        [block["reached"][name], block["chance"][name]],
    )
    better = [
        (proxy, figures[key])
        for proxy, key in block["over"].items()
        if figures[key].sign > 0 and figures[key].more.get("holm", 1.0) < SOME
    ]
    if better:
        told = ", ".join(f"{proxy} {gap.text('+.2f')}" for proxy, gap in better)
        yield finding(f"More of it is reached by {told}.", "audit", [block["over"][proxy] for proxy, _ in better])
    wrong = block["signs"].get(name)
    if wrong and figures[wrong].low > 0:
        lines = [each["place"] for each in block["mistakes"]]
        yield finding(
            f"Of the {block['sure']} tokens whose effect is sure, the {whose} has the wrong sign at"
            f" {percent(figures[wrong])}.",
            "audit",
            [wrong],
            lines,
        )


def _of_autopsy(block: Mapping[str, Any], figures: Figures) -> Iterator[dict[str, Any]]:
    caution = " (optimistic: on the update's own prompts)" if block["optimistic"] else ""
    for name, goal in block["goals"].items():
        total, tokens = figures[goal["parts"]["total"]], figures[goal["parts"]["tokens"]]
        said = (
            f"The update of step {block['step']} {'raises' if total.value > 0 else 'lowers'} {name} by"
            f" {_size(total)}{'' if total.unit == name else f' {total.unit}'}{caution}"
        )
        if tokens.sign:
            kinds = f"{goal['half']} kinds" if goal["half"] > 1 else "one kind"
            said += f"; its rollouts make {tokens.text('+.2g')} of it, and {kinds} of token half of what they do"
        names = [goal["parts"]["total"], goal["parts"]["tokens"]]
        yield finding(f"{said}.", "autopsy", names, tests=names[0])
    for each in block["methods"]:
        if key := each["differences"].get("entropy"):
            change = "more" if figures[key].value > 0 else "less"
            yield finding(
                f"{each['name']} on the same rollouts would leave {change} entropy: {figures[key].text('+.2g')} nats"
                " per token at the same length of step.",
                "autopsy",
                [key],
                tests=key,
            )


def _size(figure: Figure) -> str:
    """How large a change is, its sign said elsewhere."""
    if figure.value > 0:
        return figure.text(".2g")
    return Figure(-figure.value, -figure.high, -figure.low, num=figure.num).text(".2g")


def _of_mismatch(block: Mapping[str, Any], figures: Figures) -> Iterator[dict[str, Any]]:
    kl, apart = figures[block["kl"]], figures[block["beyond"]["2"]]
    whose = "trainer" if block["trainer"] == "log" else "checkpoint"
    if kl.low > 0.001:
        yield finding(f"Sampler and {whose} are {kl.text('.2g')} nats per token apart (KL).", "mismatch", [block["kl"]])
    if apart.low > 0.001:
        yield finding(
            f"{percent(apart)} of the tokens have probabilities that are twofold apart.",
            "mismatch",
            [block["beyond"]["2"]],
        )


def _of_pair(block: Mapping[str, Any], figures: Figures) -> Iterator[dict[str, Any]]:
    for name, key in block["changes"].items():
        change = figures[key]
        verb = "rose" if change.value > 0 else "fell"
        said = f"On the {block['prompts']} prompts of both logs {name} {verb} by {_size(change)} {change.unit}."
        yield finding(said, "pair", [key], tests=key)


OF_PARTS = {
    "log": _of_log,
    "credit": _of_credit,
    "audit": _of_audit,
    "autopsy": _of_autopsy,
    "mismatch": _of_mismatch,
    "pair": _of_pair,
}
