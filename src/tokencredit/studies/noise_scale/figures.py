"""What a noise scale answers: figures with intervals, the best batch, predicted variance over a grid, findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from tokencredit.dynamics.batch_shape import Choice, best_split
from tokencredit.dynamics.noise_scale import NoiseScale
from tokencredit.dynamics.variance_split import VarianceSplit, loads
from tokencredit.figure import Figure
from tokencredit.stats import Estimate, jackknife_ratio
from tokencredit.studies.book import Book
from tokencredit.studies.noise_scale.measurement import PAIRS, NoiseMeasurement
from tokencredit.studies.noise_scale.question import NoiseScaleConfig

GROUPS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
SPLIT = {
    "between": "noise between prompts, τ",
    "rollout": "of single rollouts, α",
    "pair": "of pairs of siblings, β",
}
PROMPTS = (8, 16, 32, 64, 128, 256, 512, 1024)


def blocks(
    found: NoiseMeasurement, config: NoiseScaleConfig, own: Mapping[str, int], reference: str, book: Book
) -> dict[str, Any]:
    """{"costs", "choice", "grid", "findings"}; figures go into the book. Others are compared with the batch `own`,
    called `reference`, and without a budget they cost as much.
    """
    costs = {"cost_prompt": config.cost_prompt, "cost_rollout": config.cost_rollout}
    budget = own["prompts"] * (config.cost_prompt + own["group"] * config.cost_rollout)
    budget = budget if config.budget is None else config.budget
    result: dict[str, Any] = {
        "costs": {"prompt": config.cost_prompt, "rollout": config.cost_rollout, "budget": budget},
        "choice": None,
        "grid": [],
    }
    _enter_scale(book, found.own, "", config.group)
    findings = [_resolved(found.own, config.prompts), *_share_of_noise(found.own, own, reference, config.group)]
    if found.split is None:
        findings.append(
            f"Where the noise comes from cannot be told from groups of {config.group}: that takes {PAIRS}"
            f" (--group {PAIRS})"
        )
        return result | {"findings": findings}
    choice = best_split(found.split, budget, **costs)
    gain = _gain(found.split, choice, own)
    _enter_scale(book, found.plain, "leave-one-out ", config.group)
    for name, label in SPLIT.items():
        book.enter(f"split/{name}", getattr(found.split, name), "gradient²", label=label)
    book.enter("choice/gain", gain, "ratio", label=f"variance of the best batch over that of {reference}")
    findings += [_origin(found.split), *_advice(choice, gain, own, budget)]
    told = asdict(choice) | {"resolved": _better(choice, gain, own) is not None}
    return result | {"choice": told, "grid": grid(found.split, own, **costs), "findings": findings}


def grid(split: VarianceSplit, own: Mapping[str, int], cost_prompt: float, cost_rollout: float) -> list[dict[str, Any]]:
    """Rows of predicted variance with its interval; `relative` to the batch `own`."""
    reference = split.variance(own["prompts"], own["group"]).value
    rows = []
    for k in sorted({*GROUPS, split.group, own["group"]}):
        for p in sorted({*PROMPTS, own["prompts"]}):
            found, cost = split.variance(p, k), p * (cost_prompt + k * cost_rollout)
            rows.append(
                {
                    "prompts": p,
                    "group": k,
                    "variance": found.value,
                    "low": found.low,
                    "high": found.high,
                    "cost": cost,
                    "relative": found.value / reference if reference > 0 else None,
                }
            )
    return rows


def _enter_scale(book: Book, found: NoiseScale, which: str, group: int) -> None:
    rollouts = replace(
        found.scale, value=found.scale.value * group, low=found.scale.low * group, high=found.scale.high * group
    )
    prefix = "plain/" if which else ""
    book.enter(f"{prefix}signal", found.signal, "gradient²", label=f"{which}|G|²")
    book.enter(f"{prefix}noise", found.noise, "gradient²", label=f"{which}tr Σ of a prompt")
    book.enter(f"{prefix}scale", found.scale, "prompts", label=f"{which}noise scale")
    book.enter(f"{prefix}scale_rollouts", rollouts, "rollouts", label=f"{which}noise scale")


def _gain(split: VarianceSplit, choice: Choice, own: Mapping[str, int]) -> Estimate:
    shapes = [loads(choice.group) / choice.prompts, loads(own["group"]) / own["prompts"]]
    values, left = ([shape @ parts for shape in shapes] for parts in (split.parts, split.left_out))
    return jackknife_ratio(*values, tuple(left), split.between.level)


def _resolved(found: NoiseScale, prompts: int) -> str:
    chance = f"noise alone would give as much with probability {found.p_noise:.2g}"
    if found.resolved:
        return f"|G|² is resolved: {chance}"
    return f"|G|² is not resolved: {chance}. Ask for more prompts (--prompts {4 * prompts})"


def _share_of_noise(found: NoiseScale, own: Mapping[str, int], reference: str, group: int) -> list[str]:
    if own["group"] != group or found.signal.value <= 0:
        return []
    # B / (B + P), which grows with B: the ends of one are the ends of the other.
    share, low, high = (
        1 / (1 + own["prompts"] / b) if b else 0.0 for b in (found.scale.value, found.scale.low, found.scale.high)
    )
    return [
        f"In {reference}, {own['prompts']} prompts x {group}, noise makes {share:.0%} of the squared gradient "
        f"(95 %: {low:.0%} to {high:.0%})"
    ]


def _origin(split: VarianceSplit) -> str:
    parts = loads(split.group) * split.parts
    names = ("between prompts", "of single rollouts", "of pairs of siblings")
    shares = ", ".join(f"{part / parts.sum():.0%} {name}" for part, name in zip(parts, names))
    return f"The noise of leave-one-out credit at {split.group} rollouts: {shares}"


def _better(choice: Choice, gain: Estimate, own: Mapping[str, int]) -> str | None:
    """What is best, where it is resolved: the batch `own` as it is, or one whose variance is below that of it."""
    if (choice.prompts, choice.group) == (own["prompts"], own["group"]):
        return f"as it is, on {_shape(choice.prompts, choice.group)}"
    return f"on {_shape(choice.prompts, choice.group)}" if gain.high < 1 else None


def _shape(prompts: int, group: int) -> str:
    return f"{prompts} prompt{'s' * (prompts != 1)} x {group} rollouts"


def _advice(choice: Choice, gain: Estimate, own: Mapping[str, int], budget: float) -> list[str]:
    few, many = choice.near
    near = (
        f"groups of {few} to {many} are within 5 % of it" if few < many else "no other group size is within 5 % of it"
    )
    best, share = _better(choice, gain, own), Figure.of(gain, "ratio").text(".2f")
    other = f"{own['prompts']} x {own['group']}"
    said = [
        f"A budget of {budget:g} is spent best {best}: {share} of the variance of {other}; {near}"
        if best
        else f"No batch for a budget of {budget:g} is resolved to be less noisy than {other}. By the estimate the least"
        f" noisy is {_shape(choice.prompts, choice.group)}, with {share} of its variance; {near}"
    ]
    if choice.ignored:
        said.append(
            f"Estimated below 0, and counted as 0 in this advice: the part {', '.join(choice.ignored)}. More prompts"
            " would tell"
        )
    return said
