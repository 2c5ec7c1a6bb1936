"""Is entropy, or any other proxy, a good guess of a token's effect on correctness?

Held-out prompts are answered, every token gets its proxies, alternatives to every token are rolled out and verified,
and where the world is small enough the same effects are computed from prefix trees. Then: each proxy against each
effect (`replace`, `before_after`, `spread`), with intervals over prompts, beside what noise alone would show, corrected
for the rollouts' noise, and checked against the exact effects. Last: does the agreement of entropy follow the
calibration of the policy?

A killed study goes on where it was and ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.agreement.controls import noise_only
from tokencredit.agreement.moments import budget_law
from tokencredit.agreement.posterior import Posterior
from tokencredit.agreement.rollouts import ESTIMANDS, AlternativeRollouts
from tokencredit.checkpoints import listed
from tokencredit.distribute.pool import Alone, Pool
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.load import load_config, resolve_model
from tokencredit.lm.proxies import check_kinds
from tokencredit.scores.portions import cut, passes_of
from tokencredit.studies.book import Book
from tokencredit.studies.correlation import conditions, measurement, pieces
from tokencredit.studies.correlation.figures import (
    conditions_block,
    estimand_block,
    law_block,
    splits_block,
    validation_block,
)
from tokencredit.studies.correlation.findings import findings, scatter
from tokencredit.studies.correlation.proxy_figures import Tokens, everywhere_else_zero, exact_figures, sampled_figures
from tokencredit.studies.correlation.question import CorrelationConfig
from tokencredit.studies.correlation.token_view import token_view
from tokencredit.studies.study import Work

CHUNK, LARGE = 8, 1 << 24  # prompts per stored piece of the rollouts and trees, but for a model over so many parameters
BATCH = 32  # completions whose proxies are computed together, at most
FEWEST = 50  # tokens with an alternative, without which there are no figures
COLUMNS = ("pi", "rewards", "alternative", "share")


def run(config: CorrelationConfig, work: Work) -> dict[str, Any]:
    """The whole study: its blocks."""
    config = replace(config, policy=config.policy.settled())
    with config.workers.open(config.policy) as pool:
        return _run(config, work, pool)


def _run(config: CorrelationConfig, work: Work, pool: Pool | Alone) -> dict[str, Any]:
    policy, others = pool.policy, _policies(config)
    trees = config.with_trees(policy.task)
    check_kinds(config.proxies)
    for path in others.values():
        load_config(resolve_model(path))
    rows = measurement.held_out(policy.task, config.prompts, config.seed)
    policy.encode_rows(rows)
    about = {"task": config.policy.task, "model": config.policy.model, "judge": policy.task}
    work.begin(**about, weights=pool.facts.model_hash, policy=config.policy.as_dict())
    stages, say, book = work.stages, work.say, work.book

    heard = work.counting("sampling completions", "completions", config.completions * len(rows))
    drawn = stages.value("completions", lambda: pieces.draw(pool, rows, config.completions, config.seed, heard))
    _check_tokens(sum(len(each["ids"]) for group in drawn for each in group), "were sampled")
    proxies = stages.arrays("proxies", lambda: _proxies(config, pool, rows, drawn, work))
    rollouts, cost = _rollouts(config, pool, rows, drawn, work)
    exact = _exact(config, pool, rows, drawn, work) if trees else None

    say("figures")
    posterior = Posterior.fit(rollouts, seed=config.seed)
    tokens = _tokens(drawn, proxies, rollouts, seed=config.seed)
    study = _study(config, tokens, rollouts, posterior, exact, book)
    prompt = np.repeat(np.arange(len(rows)), config.completions)
    law, expected = budget_law(rollouts, np.ones(len(tokens.trace)), prompt)
    study["law"] = law_block(book, law, expected, prompt, config.bootstraps)
    study["conditions"] = conditions_block(_conditions(config, others, pool, work), book)
    study["view"] = token_view(policy, rows, drawn, rollouts, posterior, exact, proxies)
    study["findings"] = findings(study, book.figures, config)
    flat = [each for group in drawn for each in group]
    study["num"] = {
        "prompts": len(rows),
        "completions": len(flat),
        "correct": sum(each["correct"] for each in flat),
        "tokens": len(tokens.trace),
    }
    return study | {"cost": cost | {"seconds": stages.seconds}}


def _proxies(config, pool, rows, drawn, work: Work) -> dict[str, np.ndarray]:
    """The proxies of all tokens, stored a few completions at a time."""
    pairs = [(row, each) for row, group in zip(rows, drawn) for each in group]
    ids = [(pool.policy.encode(row["prompt"]), each["ids"]) for row, each in pairs]
    where = cut(ids, BATCH, pool.facts.together // passes_of(config.proxies, None))
    heard = work.counting("computing proxies", "completions")

    def make(absent: list[int]) -> Iterator[tuple[int, Any]]:
        wanted = [where[n] for n in absent]
        heard(0, total=sum(map(len, wanted)))
        calls = [(pairs[own.start : own.stop], config.seed, config.proxies) for own in wanted]
        for n, found in pool.run(pieces.proxies, calls):
            heard(len(wanted[n]))
            yield absent[n], found

    found = work.stages.pieces([f"proxies_{own.start}_{own.stop}" for own in where], make)
    return {kind: np.concatenate([piece[kind] for piece in found]) for kind in config.proxies}


@dataclass(frozen=True)
class Portion:
    """Completions that are rolled out together: of some prompts; or of one prompt one, and of its tokens some."""

    prompts: range
    completion: int | None = None
    places: range | None = None

    @property
    def name(self) -> str:
        if self.places is None:
            return f"rollouts_{self.prompts.start:05d}"
        return f"rollouts_{self.prompts.start:05d}_{self.completion}_{self.places.start}_{self.places.stop}"


def _portions(config, pool, drawn) -> list[Portion]:
    """`CHUNK` prompts each, of a large model so many tokens as go together."""
    if pool.facts.parameters <= LARGE:
        starts = range(0, len(drawn), CHUNK)
        return [Portion(range(start, min(start + CHUNK, len(drawn)))) for start in starts]
    limit, together = pool.policy.max_new_tokens, pool.facts.together
    return [
        Portion(range(i, i + 1), k, places)
        for i, group in enumerate(drawn)
        for k, each in enumerate(group)
        for places in pieces.spans(len(each["ids"]), config.rollouts, limit, together)
    ]


def _rollouts(config, pool, rows, drawn, work: Work) -> tuple[AlternativeRollouts, dict[str, int]]:
    """Rollouts of all completions, stored a portion at a time."""
    portions = _portions(config, pool, drawn)
    heard = work.counting("rolling out alternatives", "rollouts")

    def groups(own: Portion) -> list[list[dict]]:
        some = drawn[own.prompts.start : own.prompts.stop]
        return some if own.completion is None else [[some[0][own.completion]]]

    def length(own: Portion) -> int:
        return len(own.places) if own.places else sum(len(each["ids"]) for group in groups(own) for each in group)

    def make(absent: list[int]) -> Iterator[tuple[int, Any]]:
        wanted = [portions[n] for n in absent]
        heard(0, total=config.rollouts * sum(map(length, wanted)))
        calls = [
            (
                *(rows[own.prompts.start : own.prompts.stop], groups(own), config.rollouts),
                *(seed_of(config.seed, own.prompts.start), own.completion or 0, own.places),
            )
            for own in wanted
        ]
        for n, found in pool.run(pieces.rolled_out, calls, heard, pieces.rollouts_and_tokens):
            yield absent[n], found

    found = work.stages.pieces([own.name for own in portions], make)
    columns = {name: np.concatenate([piece[name] for piece in found]) for name in COLUMNS}
    first = [own.prompts.start * config.completions + (own.completion or 0) for own in portions]
    trace = np.concatenate([start + piece["trace"] for start, piece in zip(first, found)])
    reward = np.array([each["correct"] for group in drawn for each in group], float)
    cost = {name: int(sum(piece[name] for piece in found)) for name in ("rollouts", "tokens")}
    return AlternativeRollouts(trace=trace, reward=reward, **columns), cost


def _exact(config, pool, rows, drawn, work: Work) -> dict[str, np.ndarray]:
    """Effects from prefix trees, stored a few prompts at a time."""
    starts = range(0, len(rows), CHUNK)
    heard = work.counting("growing prefix trees", "prompts", len(rows))

    def make(absent: list[int]) -> Iterator[tuple[int, Any]]:
        wanted = [slice(starts[n], starts[n] + CHUNK) for n in absent]
        heard.total = sum(len(rows[some]) for some in wanted)
        calls = [(rows[some], drawn[some]) for some in wanted]
        for n, found in pool.run(pieces.exact, calls):
            heard(len(rows[wanted[n]]))
            yield absent[n], found

    found = work.stages.pieces([f"exact_{start:05d}" for start in starts], make)
    return {name: np.concatenate([piece[name] for piece in found]) for name in found[0]}


def _tokens(drawn: list, proxies: dict[str, np.ndarray], rollouts: AlternativeRollouts, seed: int) -> Tokens:
    """The table of tokens, with the groups that figures are split by and a proxy that knows nothing."""
    flat = [(prompt, each) for prompt, group in enumerate(drawn) for each in group]
    lengths = [len(each["ids"]) for _, each in flat]
    place = np.concatenate([np.arange(length) for length in lengths])
    relative = place / np.repeat(lengths, lengths)
    correct = np.repeat([each["correct"] for _, each in flat], lengths)
    groups = {
        "correct completions": correct,
        "incorrect completions": ~correct,
        "first third": relative < 1 / 3,
        "middle third": (relative >= 1 / 3) & (relative < 2 / 3),
        "last third": relative >= 2 / 3,
    }
    if all(each["role"] for _, each in flat):
        role = np.array([name for _, each in flat for name in each["role"]])
        groups |= {f"role {name}": role == name for name in sorted(set(role.tolist()))}
    if "entropy" in proxies:
        groups["entropy above 0.3 nats"] = proxies["entropy"] > 0.3
    chance = {"(chance)": np.random.default_rng(seed).random(len(place))}
    value = rollouts.effects().before
    controls = np.stack([place, -np.log(np.maximum(rollouts.pi, 1e-30)), value * (1 - value)])
    return Tokens(
        proxies | chance, controls, np.repeat([prompt for prompt, _ in flat], lengths), rollouts.trace, groups
    )


def _study(
    config: CorrelationConfig, tokens: Tokens, rollouts: AlternativeRollouts, posterior: Posterior, exact, book: Book
) -> dict[str, Any]:
    """Every estimand from both sources, over the same tokens and the same draws of prompts."""
    defined = rollouts.defined
    if exact is not None:
        defined = defined & np.all([np.isfinite(exact[name]) for name in ESTIMANDS], axis=0)
    _check_tokens(int(defined.sum()), "have an alternative under this sampler")
    here = tokens.at(defined)
    boot = here.bootstrap(config.bootstraps, config.seed)
    options = {"threshold": config.threshold, "top": config.top, "few": config.few}
    blocks: dict[str, Any] = {
        "sampled": {},
        "exact": {},
        "splits": {},
        "validation": {},
        "undefined_tokens": int((~defined).sum()),
    }
    nulls = noise_only(rollouts, everywhere_else_zero(here, defined), ESTIMANDS, defined, seed=config.seed)
    for estimand in ESTIMANDS:
        sampled = sampled_figures(
            here, rollouts, posterior, estimand, defined, boot, nulls=nulls[estimand], seed=config.seed, **options
        )
        blocks["sampled"][estimand] = estimand_block(book, "sampled", estimand, sampled.figures, boot, sampled)
        effect = rollouts.effects().size(estimand)[defined]
        if exact is not None:
            effect = exact[estimand][defined]
            truth = Tokens(
                here.proxies,
                np.stack([*here.controls[:2], (exact["value"] * (1 - exact["value"]))[defined]]),
                here.prompt,
                here.trace,
                here.groups,
            )
            known = exact_figures(truth, effect, boot, **options)
            blocks["exact"][estimand] = estimand_block(book, "exact", estimand, known, boot)
            blocks["validation"][estimand] = validation_block(book, estimand, sampled, known, boot)
        blocks["splits"][estimand] = splits_block(book, estimand, here, effect, config)
    blocks["scatter"] = scatter(here, rollouts, exact, defined, config.seed)
    return blocks


def _check_tokens(num: int, which: str) -> None:
    if num < FEWEST:
        raise ValueError(f"{num} tokens {which}, fewer than {FEWEST}: take more --prompts, or more --completions")


def _conditions(config, others: Mapping[str, str], pool, work: Work) -> list[dict[str, Any]]:
    """Figures of entropy and calibration for every policy, temperature and bin of difficulty."""
    task, num = pool.policy.task, min(config.condition_prompts, config.prompts)
    rows = measurement.held_out(task, num, seed_of(config.seed, "conditions"))
    model, own = config.policy.model, config.policy.temperature
    main = conditions.Condition(f"{model}, temperature {own:g}", "temperature", model, own)
    wanted = [conditions.Condition(f"{model}, temperature {t:g}", "temperature", model, t) for t in config.temperatures]
    wanted += [conditions.Condition(label, "policy", path, own) for label, path in others.items()]
    wanted = list(dict.fromkeys([main, *wanted]))
    size = {"samples": config.condition_samples, "rollouts": config.rollouts, "seed": config.seed}
    size["exact"] = config.with_trees(task)
    each = conditions.tokens_of(config.condition_samples, config.rollouts, pool.policy.max_new_tokens)
    step = max(pool.facts.together // each, 1)
    where = [range(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]
    parts = [(condition, own) for condition in wanted for own in where]
    heard = work.counting("when is entropy a good proxy", "prompts of all conditions")

    def make(absent: list[int]) -> Iterator[tuple[int, Any]]:
        some = [parts[n] for n in absent]
        heard(0, total=sum(len(own) for _, own in some))
        calls = [
            (config.policy, condition, rows[own.start : own.stop], size | {"first": own.start})
            for condition, own in some
        ]
        for n, found in pool.run(pieces.condition, calls):
            heard(len(some[n][1]))
            yield absent[n], found

    names = [
        f"condition_{seed_of(condition.model, condition.temperature):016x}_{own.start}_{own.stop}"
        for condition, own in parts
    ]
    stored = work.stages.pieces(names, make)
    found, whole = [], np.ones(len(rows), bool)
    options = {"num": config.bootstraps, "seed": config.seed, "top": config.top}
    for n, condition in enumerate(wanted):
        own = stored[n * len(where) : (n + 1) * len(where)]
        arrays = {name: np.concatenate([piece[name] for piece in own]) for name in own[0]}
        found.append({"label": condition.label, "kind": condition.kind, **conditions.figures(arrays, whole, **options)})
        if condition == main:
            for label, member in conditions.difficulty_bins(arrays["correct"].mean(1)):
                found.append({"label": label, "kind": "difficulty", **conditions.figures(arrays, member, **options)})
    return found


def _policies(config: CorrelationConfig) -> dict[str, str]:
    """Label -> path, of the policies named and of every whole checkpoint of the runs named."""
    found = dict(config.policies)
    for name in config.runs:
        whole = listed(Path(name) / "checkpoints")
        if not whole:
            raise ValueError(f"{name} has no finished checkpoint; name a run directory of `tokencredit train`")
        found |= {f"{Path(name).name}, step {step}": str(path) for step, path in whole.items()}
    return found
