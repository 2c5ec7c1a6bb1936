"""Who caused it: the change of entropy and reward that the next step makes, by token and rollout; what other methods
would have done with the same rollouts; what the step would be without some tokens; and whether the tokens that decide
the outcome are the ones that do it.

A killed question goes on where it was and ends with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.durable import write_parquet
from tokencredit.dynamics.ablation import token_sets, without
from tokencredit.dynamics.attribution import GOALS, PARTS, Attribution, Goals, attribute, draw_goals
from tokencredit.dynamics.batch import Batch, draw, prompts_of, roles
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.counterfactual import Coefficients, acting_parts, consequences, named_method, own_consequences
from tokencredit.dynamics.diagnostics import diagnostics
from tokencredit.dynamics.pivotal import batch_of_run, from_trees
from tokencredit.dynamics.update import Update, update_vector
from tokencredit.dynamics.vectors import FINE
from tokencredit.lm.sampling import Progress
from tokencredit.lm.text import pieces
from tokencredit.method import Method
from tokencredit.runs import Run
from tokencredit.studies import forecast
from tokencredit.studies.arguments import check_prompts, open_from, parameters_of, prompts_there
from tokencredit.studies.attribution import figures as blocks
from tokencredit.studies.attribution.findings import findings
from tokencredit.studies.attribution.question import AttributeConfig
from tokencredit.studies.forecast import ALONG, BACKWARD
from tokencredit.studies.options import identity
from tokencredit.studies.stages import Stages
from tokencredit.studies.study import Work
from tokencredit.tasks.task import Walkable


def run(config: AttributeConfig, work: Work) -> dict[str, Any]:
    """The whole question: its blocks; tokens/ and sequences.parquet."""
    c, say, book = open_from(config), work.say, work.book
    methods = [
        named_method(name).within(c.max_new_tokens) for name in dict.fromkeys((config.baseline, *config.methods))
    ]
    about = {"checkpoint": str(c.path), "temperature": c.temperature, "optimizer": _optimizer(c)}
    config = config.fitted(parameters_of(c), prompts_there(c))
    prompts = {} if config.pivotality else {"--prompts": config.prompts}
    check_prompts(c, prompts | {"--entropy": config.entropy[0], "--reward": config.reward[0]})
    work.begin(task=c.config.task, model=str(c.path), config=identity(config), **about)
    stages = work.stages
    _foretell(c, config, len(methods), work)
    needs = {name for method in (c.method, *methods) for name in method.needs}
    heard = work.counting("sampling the step", "rollouts", config.prompts * config.group)
    batch, stored = _rollouts(c, config, needs, heard)
    goals = cache(lambda: _goals(c, config, work))
    update = update_vector(c, batch)
    say("every token's part")
    attribution = _attribution(update, goals, stages)
    columns = _tensors(stages.arrays("diagnostics", lambda: _arrays(diagnostics(update))))
    found = _methods(c, batch, methods, attribution, goals, stages, say)
    sets = token_sets(attribution)
    ablated = _without(c, attribution, sets, goals, stages, say)
    known = _trees(c, update.batch, config, stages, say) if stored is None else stored

    say("figures")
    view = blocks.View.of(attribution, columns, roles(c, update.batch), config.bootstraps, config.seed)
    result: dict[str, Any] = {
        "about": _about(c, config, update, batch),
        **blocks.attribution_blocks(view, book),
        "methods": blocks.methods_block(found, book),
        "without": blocks.without_block(view, sets, ablated, book),
        "pivotal": blocks.pivotal_block(view, known, stored is not None, book) if known else None,
    }
    _write_tables(work.record, c, view, known)
    return result | {"findings": findings(result, book.figures)}


def _foretell(c: Checkpoint, config: AttributeConfig, methods: int, work: Work) -> None:
    """The forecast: passes of the step's rollouts, of which the others' are fewer where groups agree, and of the
    goals'.
    """
    steps, sets = 1 + methods, 7
    directions = 3 + 2 * methods + sets
    large = parameters_of(c) > FINE
    times = -(-directions // 5) * BACKWARD if large else directions * ALONG
    parts = (
        forecast.Drawn(config.prompts, config.group, 2 + (steps + sets) * BACKWARD + 2 * steps * ALONG),
        forecast.Drawn(*config.entropy, 1 + 2 * BACKWARD + times),
        forecast.Drawn(*config.reward, 1 + BACKWARD + times),
    )
    first = c.policy.encode_rows(prompts_of(c, 1, config.seed))[0]
    work.tell(forecast.forecast(c, parts, 6 if large else 8, first))


def _rollouts(
    c: Checkpoint, config: AttributeConfig, needs: set[str], progress: Progress | None = None
) -> tuple[Batch, dict[str, Tensor] | None]:
    """The rollouts of the step and, from a pivotality run, the effects of the tokens of those that the run's own method
    keeps.
    """
    if config.pivotality is None:
        options = {"needs": sorted(needs), "progress": progress}
        return draw(c, config.prompts, config.group, config.seed, **options), None
    batch, known = batch_of_run(c, config.pivotality, config.group, config.seed, needs=sorted(needs))
    keep = Coefficients.of(c.method, batch).keep
    return batch, {name: values[keep] for name, values in known.items()}


def _optimizer(c: Checkpoint) -> dict[str, Any]:
    state = c.needs_optimizer()
    return {
        "kind": next(iter(state.rules.values())).kind,
        "lr": state.lr,
        "steps": max(each.step for each in state.moments.values()),
    }


def _goals(c: Checkpoint, config: AttributeConfig, work: Work) -> Goals:
    total = math.prod(config.entropy) + math.prod(config.reward)
    heard = work.counting("sampling what the gradients of entropy and reward are estimated on", "rollouts", total)
    return draw_goals(c, config.seed, entropy=config.entropy, reward=config.reward, progress=heard)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in tensors.items()}


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


def _attribution(update: Update, goals: Callable[[], Goals], stages: Stages) -> Attribution:
    def make() -> dict[str, np.ndarray]:
        found = attribute(update, goals())
        parts = {f"{part}/{goal}": found.parts[part][goal] for part in PARTS for goal in GOALS}
        return {f"shares/{goal}": share.numpy() for goal, share in found.shares.items()} | parts

    arrays = stages.arrays("attribution", make)
    shares = {goal: torch.from_numpy(arrays[f"shares/{goal}"]) for goal in GOALS}
    return Attribution(update, shares, {part: {goal: arrays[f"{part}/{goal}"] for goal in GOALS} for part in PARTS})


def _methods(
    c: Checkpoint,
    batch: Batch,
    methods: Sequence[Method],
    attribution: Attribution,
    goals: Callable[[], Goals],
    stages: Stages,
    say: Callable[[str], None],
) -> list[blocks.Counterfactual]:
    """The baseline first. A method whose coefficients are those of an earlier one, or of the step that is looked at,
    is not computed again.
    """
    found: list[blocks.Counterfactual] = []
    earlier: list[Coefficients] = []
    own = Coefficients.of(c.method, batch)
    for k, method in enumerate(methods):
        mine = Coefficients.of(method, batch)
        twin = next(
            ((place, factor) for place, other in enumerate(earlier) if (factor := mine.factor(other)) is not None), None
        )
        if twin and mine.same(earlier[twin[0]]):
            arrays = found[twin[0]].arrays
        elif mine.same(own):
            arrays = own_consequences(attribution, mine, batch)
        else:
            say(f"the step of {method.name}, method {k + 1} of {len(methods)}")
            arrays = stages.arrays(f"method_{k}", lambda m=mine: consequences(c, m, batch, goals()))
        named = None if twin is None else (methods[twin[0]].name, twin[1])
        found.append(
            blocks.Counterfactual(method, arrays, len(mine.batch), acting_parts(mine, methods[0], batch), named)
        )
        earlier.append(mine)
    return found


def _without(
    c: Checkpoint,
    attribution: Attribution,
    sets: Mapping[str, Tensor],
    goals: Callable[[], Goals],
    stages: Stages,
    say: Callable[[str], None],
) -> dict[str, dict[str, np.ndarray]]:
    """The step without each set of tokens, stored a few sets at a time: as many as a large model has room for at
    once.
    """
    names, passes = list(sets), attribution.update.passes
    num = passes.at_once if passes.large else 1
    found = {}
    for k in range(0, len(names), num):
        some = names[k : k + num]

        def make(some: list[str] = some) -> dict[str, np.ndarray]:
            say(f"the step without some tokens: set {k + 1} of {len(names)}")  # noqa: B023
            made = without(c, attribution, [sets[name] for name in some], goals())
            return {f"{i}/{name}": x for i, each in enumerate(made) for name, x in each.items()}

        arrays = stages.arrays(f"without_{k}", make)
        for i, name in enumerate(some):
            found[name] = {key.removeprefix(f"{i}/"): x for key, x in arrays.items() if key.startswith(f"{i}/")}
    return found


def _trees(
    c: Checkpoint, batch: Batch, config: AttributeConfig, stages: Stages, say: Callable[[str], None]
) -> dict[str, Tensor] | None:
    """Exact pivotality where the task is the embedded world and trees are asked for."""
    if not config.trees or not isinstance(c.task, Walkable) or not batch.rollouts.mixed.any():
        return None

    def make() -> dict[str, np.ndarray]:
        say(f"growing the prefix trees of at most {config.trees} prompts")
        return _arrays(from_trees(c, batch, config.trees))

    return _tensors(stages.arrays("trees", make))


def _about(c: Checkpoint, config: AttributeConfig, update: Update, batch: Batch) -> dict[str, Any]:
    rollouts = update.batch.rollouts
    return {
        "checkpoint": str(c.path),
        "step": c.step,
        "task": c.config.task,
        "temperature": c.temperature,
        "method": c.method.name,
        "lr": update.lr,
        "clip": update.clip,
        "rollouts": len(update.batch),
        "drawn": len(batch),
        "prompts": batch.num_prompts,
        "tokens": int(rollouts.mask.sum()),
        "credited": int((update.coefficient != 0).sum()),
        "success": float(batch.rollouts.success.double().mean()),
        "baseline": config.baseline,
        "entropy": float(rollouts.score("entropy")[rollouts.mask].mean()),
    }


def _write_tables(record: Run, c: Checkpoint, view: blocks.View, known: Mapping[str, Tensor] | None) -> None:
    """tokens/step_N.parquet, a row per rollout with lists over its tokens; sequences.parquet, a row per rollout."""
    batch = view.attribution.update.batch
    rollouts, role = batch.rollouts, roles(c, batch)
    columns = {
        "logprob": rollouts.score("logprob"),
        "entropy": rollouts.score("entropy"),
        **view.columns,
        **{f"change of {goal}": share for goal, share in view.attribution.shares.items()},
    }
    columns |= {} if known is None else {f"pivotality {name}": x for name, x in known.items()}
    rows, sequences = [], []
    for i, ids in enumerate(batch.completions):
        scores = {name: x[i, : len(ids)] for name, x in columns.items()}
        about = {
            "group": int(rollouts.group[i]),
            "reward": float(rollouts.reward[i]),
            "success": bool(rollouts.success[i]),
            "reason": batch.reasons[i],
        }
        rows.append(
            {
                **about,
                "prompt": _text(batch.rows[i]["prompt"]),
                "token_ids": list(ids),
                "role": role[i] if role else None,
                "completion": c.tokenizer.decode(list(ids), skip_special_tokens=True),
                "tokens": pieces(c.tokenizer, ids),
                **scores,
            }
        )
        sequences.append(
            {
                "rollout": i,
                **about,
                "length": len(ids),
                "truncated": batch.truncated[i],
                **{f"change of {goal}": float(share[i].sum()) for goal, share in view.attribution.shares.items()},
                **{f"mean {name}": float(x[i, : len(ids)].mean()) for name, x in view.columns.items() if len(ids)},
            }
        )
    record.write_tokens(c.step, rows)
    write_parquet(record.path / "sequences.parquet", sequences)


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
