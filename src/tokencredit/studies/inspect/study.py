"""From a log to the tokens that did it: every part on its own, and a part that lacks something says what.

One pass counts all of the log, a second collects the groups that are looked at closely; memory grows with the number
of groups, not of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tokencredit.dynamics.counterfactual import named_method
from tokencredit.lm.policy import Policy
from tokencredit.studies.inspect.audit import (
    affordable,
    audit_block,
    audited,
    candidates,
    effects_grid,
    generation_speed,
    measured,
    task_rows,
    verified,
)
from tokencredit.studies.inspect.autopsy import FEW, autopsy_block, batch_of, in_groups, open_at, take_apart
from tokencredit.studies.inspect.credit import LOGGED, credit_block, credits, disagreements
from tokencredit.studies.inspect.inspection import Inspection
from tokencredit.studies.inspect.mismatch import log_ratios, mismatch_block
from tokencredit.studies.inspect.overview import overview, quarters
from tokencredit.studies.inspect.pair import moved_tokens, pair_block, partings, shared_prompts, wanted
from tokencredit.studies.inspect.question import InspectConfig
from tokencredit.studies.inspect.sample import LoggedStep, token_rows
from tokencredit.studies.inspect.source import Missing, Source, settled
from tokencredit.studies.inspect.verdict import verdict
from tokencredit.studies.inspect.words import changed_words
from tokencredit.studies.options import identity
from tokencredit.studies.study import Work

SHOWN = 48
"""Completions of a step whose tokens are kept for the token view."""


def run(config: InspectConfig, work: Work) -> dict[str, Any]:
    """The whole answer: a block for every part that could be given, and why for every other."""
    first, second = config.split
    source, other = Source.of(config, first), Source.of(config, second) if second else None
    methods = [named_method(name) for name in dict.fromkeys((config.loss, *config.methods))]
    policy = config.policy and settled(config.policy)
    files = {"log": source.identity(), "other log": other.identity() if other else []}
    own = identity(replace(config, policy=None)) | {"policy": policy and policy.as_dict()}
    about = {"task": policy.task if policy else "given", "model": policy.model if policy else "none"}
    work.begin(**about, judge=None, config=own | files)  # the store of an audit's rollouts knows its verifier
    view = Inspection(config, work, source, other, methods)
    skipped, blocks = {}, {}
    for name, part in PARTS.items():
        if name not in config.parts:
            continue
        try:
            blocks[name] = part(view)
        except Missing as error:
            skipped[name] = str(error)
    work.say("the tokens")
    _write_tokens(view, blocks)
    found = verdict(blocks, work.book.figures)
    return {
        "log": list(config.logs),
        "about": view.about(),
        "parts": blocks,
        "skipped": skipped,
        "notes": view.notes,
        "verdict": found,
        "findings": [each["said"] for each in found],
    }


def _log(view: Inspection) -> dict[str, Any]:
    early, late = (_within(view, span) for span in quarters(view.survey))
    return overview(view.survey, view.work.book) | {"words": changed_words(early, late, view.work.book)}


def _within(view: Inspection, span: Sequence[int] | None) -> list[LoggedStep]:
    """The sampled steps within a span of steps."""
    return [] if span is None else [step for step in view.steps if span[0] <= step.step <= span[1]]


def _credit(view: Inspection) -> dict[str, Any]:
    view.work.say("credit")
    steps = view.steps
    view.rewarded("credit")
    found, left_out = credits(steps, view.limited)
    if not found[0]:
        raise Missing(f"no credit could be given: {'; '.join(left_out.values())}")
    for step, own in zip(steps, found):
        columns = view.columns.setdefault(step.step, {})
        columns |= {("credit" if name == LOGGED else f"credit of {name}"): x for name, x in own.items()}
    block = credit_block(steps, found, view.work.book, view.config.bootstraps, view.config.seed)
    name = next(iter(found[0]))
    focus = steps.index(view.focus)
    return block | {
        "logged": LOGGED in found[0],
        "left_out": left_out,
        "disagreements": {"of": name, "rollouts": disagreements(view.focus, found[focus][name])},
    }


def _audit(view: Inspection) -> dict[str, Any]:
    policy = view.needs_policy("the audit")
    view.rewarded("the audit")
    view.fits("the audit")
    step, config, work = view.focus, view.config, view.work
    rows = task_rows(policy.task, step.encoded.logged)
    if not any(row is not None for row in rows):
        what = (
            "the log has no answers" if policy.task.name == "given" else f"{policy.task.name} knows none of its prompts"
        )
        raise Missing(
            f"the audit verifies what is re-sampled, and {what}: name the task of its prompts, --task gsm8k, --task"
            " train.jsonl, or --task verify.py:verify --option path=train.jsonl"
        )
    order = candidates(step, policy, rows, config.seed)
    if not order:
        raise Missing(
            f"no completion of step {step.step} is whole: an end token as its last, or cut at {policy.max_new_tokens}"
            " tokens. Say how long one could be, --max-new-tokens"
        )
    lengths = [len(step.encoded.completion_ids[i]) for i in order]
    fitting = affordable(lengths, config.rollouts, _tokens(view, policy))
    chosen = [order[k] for k in fitting]
    agreement = verified(policy, step, rows, chosen)
    work.say(f"re-sampling the tokens of {len(chosen)} completions")
    found = measured(
        step,
        policy,
        rows,
        chosen,
        rollouts=config.rollouts,
        store=work.path / "store",
        model=policy.name,
        seed=config.seed,
    )
    view.audited = audited(step, chosen, found)
    credits_of = {
        ("logged" if name == "credit" else name.removeprefix("credit of ")): x
        for name, x in view.columns.get(step.step, {}).items()
    }
    if not credits_of:
        own, _ = credits([step], view.limited)
        credits_of = own[0]
    if not credits_of:
        raise Missing("the audit needs a credit: the log has no advantages, and no method could be applied")
    proxies = {"entropy": step.scores["entropy"], "surprisal": step.scores["logprob"]}
    block = audit_block(view.audited, step, credits_of, proxies, work.book, config.bootstraps, config.seed)
    view.columns.setdefault(step.step, {})["Q − V"] = effects_grid(view.audited, step)
    return block | {"step": step.step, "agrees": agreement, "passed_over": len(order) - len(chosen)}


def _tokens(view: Inspection, policy: Policy) -> int:
    """Tokens that the audit may generate; minutes are turned into them by this machine's speed, once."""
    if view.config.minutes is None:
        return view.config.tokens
    step = view.focus
    speed = view.work.stages.value("tokens_per_second", lambda: generation_speed(policy, step))
    return max(int(60 * view.config.minutes * speed), 1)


def _autopsy(view: Inspection) -> dict[str, Any]:
    policy = view.needs_policy("the autopsy")
    view.rewarded("the autopsy")
    view.fits("the autopsy")
    config, step, work = view.config, view.focus, view.work
    own, _ = credits([step], view.limited[:1])
    if not own[0]:
        raise Missing("the autopsy needs a credit: the log has no advantages, and --loss could not be applied")
    name, credit = next(iter(own[0].items()))
    checkpoint = open_at(policy, config.parameters, config.optimizer, config.learning_rate)
    limit = policy.max_new_tokens
    batch = batch_of(step, limit)
    others = view.near
    optimistic = others is None or others.num_prompts < FEW
    evaluation = in_groups(batch if optimistic else batch_of(others, limit))
    if evaluation.num_prompts < FEW:
        raise Missing(
            f"the autopsy compares rollouts of one prompt, on {FEW} prompts at the least: the log has no groups"
        )
    loss, *_ = methods = view.limited
    work.say("taking the step apart")
    found = take_apart(checkpoint, batch, name, credit, loss, methods, evaluation, optimistic)
    columns = view.columns.setdefault(step.step, {})
    columns |= {f"change of {goal}": share for goal, share in found.attribution.shares.items()}
    return {
        "step": step.step,
        "of": name,
        "loss": loss.name,
        "optimizer": _optimizer(checkpoint),
        "evaluation": {"prompts": evaluation.num_prompts, "rollouts": len(evaluation)},
        **autopsy_block(found, step, work.book, config.bootstraps, config.seed),
    }


def _optimizer(checkpoint: Any) -> str:
    state = checkpoint.needs_optimizer()
    kind, steps = next(iter(state.rules.values())).kind, max(each.step for each in state.moments.values())
    return f"{kind} at rate {state.lr:g}, " + (f"after {steps} steps" if steps else "fresh")


def _mismatch(view: Inspection) -> dict[str, Any]:
    view.work.say("log-probs of sampler and trainer")
    found, whose = log_ratios(view.steps)
    block = mismatch_block(
        view.steps, view.focus, found, view.audited, view.work.book, view.config.bootstraps, view.config.seed
    )
    for step, d in zip(view.steps, found):
        view.columns.setdefault(step.step, {})["log π trainer − sampler"] = d
    return block | {"trainer": whose, "step": view.focus.step}


def _pair(view: Inspection) -> dict[str, Any]:
    if view.other is None:
        raise Missing("two logs are compared where two are named: tokencredit inspect BEFORE AFTER")
    before, after, work = view.survey, view.survey_of_other, view.work
    view.notes.append("Two paths are two logs; of one log in two files, name the directory")
    block = pair_block(before, after, work.book)
    rng = np.random.default_rng(view.config.seed)
    some = rng.permutation(shared_prompts(before, after))[: view.config.prompts]
    work.say("aligning the completions of shared prompts")
    sides = [view.side(source, wanted(counts, some)) for source, counts in ((view.source, before), (view.other, after))]
    return block | {"partings": partings(*sides), "tokens": moved_tokens(*sides, work.book)}


PARTS: dict[str, Callable[[Inspection], dict[str, Any]]] = {
    "log": _log,
    "credit": _credit,
    "audit": _audit,
    "autopsy": _autopsy,
    "mismatch": _mismatch,
    "pair": _pair,
}
"""The parts in their order; each may use what those before it have left in the inspection."""


def _write_tokens(view: Inspection, blocks: dict[str, Any]) -> None:
    """tokens/step_N.parquet: a row per completion, with every credit and score of its tokens; audited ones first."""
    for step in view.steps:
        columns = dict(view.columns.get(step.step, {}))
        columns |= {name: x for name, x in step.rollouts.scores.items() if name not in columns}
        first = () if view.audited is None or step is not view.focus else view.audited.row.tolist()
        if len(step):
            view.work.record.write_tokens(step.step, token_rows(step, columns, SHOWN, first))
