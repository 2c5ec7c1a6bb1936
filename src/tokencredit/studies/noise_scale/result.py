"""What `tokencredit dynamics noise-scale` answers: figures with intervals, the best batch, predicted variance over a
grid, findings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokencredit.dynamics.batch import draw
from tokencredit.dynamics.batch_shape import Choice, best_split
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.noise_scale import NoiseScale
from tokencredit.dynamics.variance_split import VarianceSplit, loads
from tokencredit.stats import Estimate, jackknife_ratio
from tokencredit.studies.noise_scale.measurement import PAIRS, measure

QUESTION = "noise-scale"
GROUPS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
PROMPTS = (8, 16, 32, 64, 128, 256, 512, 1024)


def ask(
    checkpoint: Checkpoint,
    prompts: int,
    group: int,
    seed: int,
    *,
    cost_prompt: float = 0.0,
    cost_rollout: float = 1.0,
    budget: float | None = None,
) -> dict[str, Any]:
    """The whole result as plain values, but for the command. `budget` None: what the run's own batch costs."""
    c, method = checkpoint, checkpoint.method
    batch = draw(c, prompts, group, seed, needs=sorted(method.needs))
    found = measure(c, method, batch, seed=seed)
    own = {"prompts": c.config.prompts, "group": c.config.group}
    budget = own["prompts"] * (cost_prompt + own["group"] * cost_rollout) if budget is None else budget
    result: dict[str, Any] = {
        "question": QUESTION,
        "checkpoint": str(c.path),
        "step": c.step,
        "task": c.config.task,
        "temperature": c.temperature,
        "method": method.name,
        "seed": seed,
        "prompts": prompts,
        "group": group,
        "prompts_counted": found.prompts,
        "own_batch": own,
        "success": float(batch.rollouts.success.double().mean()),
        "p_noise": found.own.p_noise,
        "resolved": found.own.resolved,
        "sketched": found.sketched,
        "costs": {"prompt": cost_prompt, "rollout": cost_rollout, "budget": budget},
        "choice": None,
        "grid": [],
    }
    figures = _scale_figures(found.own, "", group)
    findings = [_resolved(found.own, prompts), *_share_of_noise(found.own, own, group)]
    if found.split is None:
        findings.append(
            f"Where the noise comes from cannot be told from groups of {group}: that takes {PAIRS} (--group {PAIRS})"
        )
    else:
        choice = best_split(found.split, budget, cost_prompt=cost_prompt, cost_rollout=cost_rollout)
        gain = _gain(found.split, choice, own)
        figures |= _scale_figures(found.plain, "leave-one-out ", group) | _split_figures(found.split)
        figures["choice/gain"] = _figure(gain, "variance of the best batch over that of the run's own", "ratio")
        findings += [_origin(found.split), *_advice(choice, gain, own, budget)]
        result |= {"choice": asdict(choice), "grid": grid(found.split, own, cost_prompt, cost_rollout)}
    return result | {"figures": figures, "findings": findings}


def grid(split: VarianceSplit, own: Mapping[str, int], cost_prompt: float, cost_rollout: float) -> list[dict[str, Any]]:
    """Rows of predicted variance with its interval; `relative` to the run's own batch."""
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


def write_grid(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The grid as Parquet, replaced whole."""
    import pyarrow
    import pyarrow.parquet

    from tokencredit.durable import replace_file

    table = pyarrow.Table.from_pylist(list(rows))
    replace_file(path, lambda file: pyarrow.parquet.write_table(table, file))


def _figure(estimate: Estimate, label: str, unit: str) -> dict[str, Any]:
    return estimate.as_dict() | {"label": label, "unit": unit}


def _scale_figures(found: NoiseScale, which: str, group: int) -> dict[str, dict]:
    rollouts = replace(
        found.scale, value=found.scale.value * group, low=found.scale.low * group, high=found.scale.high * group
    )
    prefix = "plain/" if which else ""
    return {
        f"{prefix}signal": _figure(found.signal, f"{which}|G|²", "gradient²"),
        f"{prefix}noise": _figure(found.noise, f"{which}tr Σ of a prompt", "gradient²"),
        f"{prefix}scale": _figure(found.scale, f"{which}noise scale", "prompts"),
        f"{prefix}scale_rollouts": _figure(rollouts, f"{which}noise scale", "rollouts"),
    }


def _split_figures(split: VarianceSplit) -> dict[str, dict]:
    words = {
        "between": "noise between prompts, τ",
        "rollout": "of single rollouts, α",
        "pair": "of pairs of siblings, β",
    }
    return {f"split/{name}": _figure(getattr(split, name), label, "gradient²") for name, label in words.items()}


def _gain(split: VarianceSplit, choice: Choice, own: Mapping[str, int]) -> Estimate:
    shapes = [loads(choice.group) / choice.prompts, loads(own["group"]) / own["prompts"]]
    values, left = ([shape @ parts for shape in shapes] for parts in (split.parts, split.left_out))
    return jackknife_ratio(*values, tuple(left), split.between.level)


def _resolved(found: NoiseScale, prompts: int) -> str:
    chance = f"noise alone would give as much with probability {found.p_noise:.2g}"
    if found.resolved:
        return f"|G|² is resolved: {chance}"
    return f"|G|² is not resolved: {chance}. Ask for more prompts (--prompts {4 * prompts})"


def _share_of_noise(found: NoiseScale, own: Mapping[str, int], group: int) -> list[str]:
    if own["group"] != group or found.signal.value <= 0:
        return []
    # B / (B + P), which grows with B: the ends of one are the ends of the other.
    share, low, high = (
        1 / (1 + own["prompts"] / b) if b else 0.0 for b in (found.scale.value, found.scale.low, found.scale.high)
    )
    return [
        f"In the run's own batch, {own['prompts']} prompts x {group}, noise makes {share:.0%} of the squared gradient "
        f"(95 %: {low:.0%} to {high:.0%})"
    ]


def _origin(split: VarianceSplit) -> str:
    parts = loads(split.group) * split.parts
    names = ("between prompts", "of single rollouts", "of pairs of siblings")
    shares = ", ".join(f"{part / parts.sum():.0%} {name}" for part, name in zip(parts, names))
    return f"The noise of leave-one-out credit at {split.group} rollouts: {shares}"


def _advice(choice: Choice, gain: Estimate, own: Mapping[str, int], budget: float) -> list[str]:
    few, many = choice.near
    near = (
        f"groups of {few} to {many} are within 5 % of it" if few < many else "no other group size is within 5 % of it"
    )
    said = [
        f"A budget of {budget:g} is spent best on {choice.prompts} prompts x {choice.group} rollouts: {gain.value:.2f} "
        f"[{gain.low:.2f}, {gain.high:.2f}] of the variance of {own['prompts']} x {own['group']}; {near}"
    ]
    if choice.ignored:
        said.append(
            f"Estimated below 0, and counted as 0 in this advice: the part {', '.join(choice.ignored)}. More prompts"
            " would tell"
        )
    return said
