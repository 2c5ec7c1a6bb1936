"""Who caused it: the change of entropy and reward that the next step makes, by token and rollout; what other methods
would have done with the same rollouts; what the step would be without some tokens; and whether the tokens that decide
the outcome are the ones that do it.

A killed question goes on where it was and ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.durable import digest_of, write_parquet
from tokencredit.dynamics.ablation import token_sets, without
from tokencredit.dynamics.attribution import (
    GOALS,
    PARTS,
    Attribution,
    Goals,
    Question,
    asked,
    attributing,
    draw_goals,
)
from tokencredit.dynamics.batch import Batch, prompts_of, roles
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.counterfactual import Coefficients, acting_parts, consequences, named_method, own_consequences
from tokencredit.dynamics.diagnostics import diagnostics
from tokencredit.dynamics.pivotal import batch_of_run, from_trees
from tokencredit.dynamics.sweep import Sweep
from tokencredit.dynamics.update import Update, update_vector
from tokencredit.dynamics.vectors import forget, large, trained
from tokencredit.lm.text import pieces
from tokencredit.runs import Run
from tokencredit.stages import Stages
from tokencredit.studies import forecast
from tokencredit.studies.arguments import check_prompts, of_checkpoint, open_from, parameters_of, prompts_there
from tokencredit.studies.attribution import figures as blocks
from tokencredit.studies.attribution.findings import findings
from tokencredit.studies.attribution.question import FEWEST, AttributeConfig
from tokencredit.studies.drawn import drawn
from tokencredit.studies.forecast import ALONG, BACKWARD
from tokencredit.studies.options import identity
from tokencredit.studies.study import Work
from tokencredit.tasks.task import Walkable

DIRECTIONS = 3
"""That a question asks for, at the most."""
SWEEP, STEP = "sweep_", "step"


def run(config: AttributeConfig, work: Work) -> dict[str, Any]:
    """The whole question: its blocks; tokens/ and sequences.parquet."""
    wanted = {} if config.pivotality else {"--prompts": config.prompts}
    wanted |= {
        f"--{name}": sizes and sizes[0] for name, sizes in (("entropy", config.entropy), ("reward", config.reward))
    }
    check_prompts(config.policy, wanted, least=FEWEST)
    c, say, book = open_from(config), work.say, work.book
    methods = [
        named_method(name).within(c.max_new_tokens) for name in dict.fromkeys((config.baseline, *config.methods))
    ]
    about = {"checkpoint": str(c.path), "temperature": c.temperature, "optimizer": _optimizer(c)}
    config = config.fitted(parameters_of(c), prompts_there(c))
    work.begin(**of_checkpoint(c), config=identity(config), **about)
    if config.pivotality is not None:
        files = [Path(config.pivotality) / f"{name}.parquet" for name in ("traces", "tokens")]
        found = digest_of(files) if all(path.is_file() for path in files) else None
        work.record.rest_on({f"the pivots in {config.pivotality}": found})
    stages, c = work.stages, c.filed(work.record.path)
    _foretell(c, config, len(methods), work)
    needs = {name for method in (c.method, *methods) for name in method.needs}
    batch, stored = _rollouts(c, config, needs, work)
    goals = cache(lambda: _goals(c, config, work))
    say("the step")
    update = update_vector(c, batch, name=STEP)
    columns = _tensors(stages.arrays("diagnostics", lambda: _arrays(diagnostics(update))))
    coefficients = [Coefficients.of(method, batch) for method in methods]
    own, sets = Coefficients.of(c.method, batch), token_sets(update)
    attribution, arrays = _asked(c, update, batch, own, coefficients, sets, goals, work)
    found = _methods(batch, coefficients, attribution, arrays)
    ablated = {name: arrays[f"fewer_{k}"] for k, name in enumerate(sets)}
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
    sets = 7
    directions = 3 + 2 * methods + sets
    is_large = large(trained(c.model))
    if is_large:
        step = 2 + (1 + 2 * methods + sets) * BACKWARD + 2 * ALONG
        sums = 3
        filed = (1 + methods) * (1 + c.needs_optimizer().decays) + sets + len(GOALS) + sums + directions / 2
        times = 0
    else:
        step, times, filed = 2 + (1 + methods + sets) * BACKWARD + 2 * (1 + methods) * ALONG, directions * ALONG, 0
    parts = (
        forecast.Drawn(config.prompts, config.group, step),
        forecast.Drawn(*config.entropy, 1 + (2 * BACKWARD - 1 if is_large else BACKWARD) + times),
        forecast.Drawn(*config.reward, 1 + BACKWARD + times),
    )
    first = c.policy.encode_rows(prompts_of(c, 1, config.seed))[0]
    vectors = 2 if c.scratch else 4 + methods if is_large else 8
    work.tell(forecast.forecast(c, parts, vectors, first, filed))


def _rollouts(
    c: Checkpoint, config: AttributeConfig, needs: set[str], work: Work
) -> tuple[Batch, dict[str, Tensor] | None]:
    """The rollouts of the step and, from a pivotality run, the effects of the tokens of those that the run's own method
    keeps.
    """
    if config.pivotality is None:
        options = {"needs": sorted(needs), "progress": work.counting("sampling the step", "rollouts")}
        return drawn(work.stages, STEP, c, config.prompts, config.group, config.seed, **options), None
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
    def found(goal: str, prompts: int, group: int, seed: int) -> Batch:
        heard = work.counting(f"sampling what the gradient of {goal} is estimated on", "rollouts")
        return drawn(work.stages, f"goal_{goal}", c, prompts, group, seed, progress=heard)

    return draw_goals(c, config.seed, entropy=config.entropy, reward=config.reward, drawn=found)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in tensors.items()}


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


def _asked(
    c: Checkpoint,
    update: Update,
    batch: Batch,
    own: Coefficients,
    coefficients: Sequence[Coefficients],
    sets: Mapping[str, Tensor],
    goals: Callable[[], Goals],
    work: Work,
) -> tuple[Attribution, dict[str, dict[str, np.ndarray]]]:
    """The attribution of the step, and what "method_k" and "fewer_k" would do: the questions that are not stored yet,
    of a large model as many together as there is room for.

    A method whose coefficients are those of an earlier one, or of the step that is looked at, is not asked for.
    """
    what = "every token's part, other methods, fewer tokens"

    def sweep(name: str, keys: Sequence[str]) -> Sweep:
        return Sweep(work.stages.path(SWEEP + name), keys, work.counting(f"{what}: {name}", "prompts"))

    def method(name: str, mine: Coefficients) -> Question:
        return consequences(c, mine, batch, goals(), name, sweep(name, list(GOALS)))

    questions: dict[str, Callable[[], Question]] = {"attribution": lambda: _stored(update, goals())}
    for k, mine in enumerate(coefficients):
        if not any(mine.same(other) for other in (own, *coefficients[:k])):
            questions[f"method_{k}"] = partial(method, f"method_{k}", mine)
    for k, tokens in enumerate(sets.values()):
        questions[f"fewer_{k}"] = partial(without, c, update, tokens, f"fewer_{k}")
    names, num = list(questions), max(update.passes.at_once // DIRECTIONS, 1) if update.passes.large else 1

    def opened(name: str) -> tuple[str, Question]:
        work.say(f"{what}: step {names.index(name) + 1} of {len(names)}")
        return name, questions[name]()

    def made(absent: list[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for some in (absent[first : first + num] for first in range(0, len(absent), num)):
            pending = asked((opened(names[place]) for place in some), goals(), sweep)
            for k, (place, question) in enumerate(zip(some, pending)):
                work.say(f"{what}: answer {k + 1} of {len(some)}")
                yield place, question.answer()
                _done(c, work.stages, names[place])

    found = dict(zip(names, work.stages.pieces(names, made)))
    for name in (STEP, *GOALS, *names):
        _done(c, work.stages, name)
    arrays = found["attribution"]
    shares = {goal: torch.from_numpy(arrays[f"shares/{goal}"]) for goal in GOALS}
    parts = {part: {goal: arrays[f"{part}/{goal}"] for goal in GOALS} for part in PARTS}
    return Attribution(update, shares, parts), found


def _done(c: Checkpoint, stages: Stages, name: str) -> None:
    """Removes what was kept for the case of a kill."""
    stages.drop(SWEEP + name)
    if c.scratch is not None:
        forget(c.scratch, name)


def _stored(update: Update, goals: Goals) -> Question:
    """`attributing`, as arrays."""
    found = yield from attributing(update, goals)
    parts = {f"{part}/{goal}": found.parts[part][goal] for part in PARTS for goal in GOALS}
    return {f"shares/{goal}": share.numpy() for goal, share in found.shares.items()} | parts


def _methods(
    batch: Batch,
    coefficients: Sequence[Coefficients],
    attribution: Attribution,
    arrays: Mapping[str, Mapping[str, np.ndarray]],
) -> list[blocks.Counterfactual]:
    """The baseline first."""
    found: list[blocks.Counterfactual] = []
    for k, mine in enumerate(coefficients):
        earlier = coefficients[:k]
        twin = next(
            ((other.method.name, factor) for other in earlier if (factor := mine.factor(other)) is not None),
            None,
        )
        does = arrays.get(f"method_{k}")
        if does is None:
            same = next((j for j, other in enumerate(earlier) if mine.same(other)), None)
            does = own_consequences(attribution, mine, batch) if same is None else found[same].arrays
        acting = acting_parts(mine, coefficients[0].method, batch)
        found.append(blocks.Counterfactual(mine.method, does, len(mine.batch), acting, twin))
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
