"""The data of the token view: some completions with every token's effects, intervals, alternatives and the value along
the way.

Intervals are central 95 % of the posterior, which has a width where all rollouts agree; `certainty` is the posterior
probability that the effect has the sign that is shown and is at least NEGLIGIBLE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokencredit.agreement.posterior import Posterior
from tokencredit.agreement.rollouts import AlternativeRollouts

SHOWN = 16
NEGLIGIBLE = 0.02


def token_view(
    policy: Any,
    rows: Sequence[dict],
    drawn: Sequence[Sequence[dict]],
    rollouts: AlternativeRollouts,
    posterior: Posterior,
    exact: dict[str, np.ndarray] | None,
    proxies: dict[str, np.ndarray],
    shown: int = SHOWN,
) -> list[dict]:
    """At most `shown` completions, correct and incorrect in turn, those first whose effects are largest in sum of
    squares.
    """
    flat = [(row, each) for row, group in zip(rows, drawn) for each in group]
    weight = np.bincount(rollouts.trace, np.nan_to_num(rollouts.effects().before_after) ** 2, minlength=len(flat))
    order = np.argsort(-weight, kind="stable").tolist()
    ranked = [[b for b in order if flat[b][1]["correct"] is right] for right in (True, False)]
    turns = [b for pair in zip(*ranked) for b in pair]
    chosen = (turns + [b for some in ranked for b in some if b not in turns])[:shown]
    return [_completion(policy, *flat[b], rollouts.trace == b, rollouts, posterior, exact, proxies) for b in chosen]


def _completion(policy, row, each, here, rollouts, posterior, exact, proxies) -> dict[str, Any]:
    tokens, effects = np.flatnonzero(here), rollouts.effects()
    value = posterior.value[:, tokens] + posterior.replace[:, tokens]
    # Where a token has no alternative the posterior is silent and the estimate, which passes through, stands.
    band = np.where(np.isfinite(value), value, effects.after[tokens])
    low, high = np.quantile(band, [0.025, 0.975], axis=0)
    start = posterior.value[:, tokens[0]] * (1 - rollouts.pi[tokens[0]]) + band[:, 0] * rollouts.pi[tokens[0]]
    start = np.where(np.isfinite(start), start, band[:, 0])
    prompt = (
        row["prompt"]
        if isinstance(row["prompt"], str)
        else "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
    )
    found = {
        "prompt": prompt,
        "correct": each["correct"],
        "reason": each["reason"],
        "tokens": each["tokens"],
        "role": each["role"],
        "value": [float(effects.before[tokens[0]]), *effects.after[tokens]],
        "low": [float(np.quantile(start, 0.025)), *low],
        "high": [float(np.quantile(start, 0.975)), *high],
        "pi": rollouts.pi[tokens],
        "alternatives": [_alternatives(policy, rollouts, token) for token in tokens],
        "proxies": {name: proxies[name][tokens] for name in ("entropy", "gradient_norm") if name in proxies},
    }
    for name in ("replace", "before_after"):
        found[name] = _effect(getattr(effects, name)[tokens], getattr(posterior, name)[:, tokens])
        if exact is not None:
            found[name]["exact"] = exact[name][tokens]
    return found


def _effect(estimate: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
    undefined = np.isnan(estimate)
    low, high = np.quantile(np.where(undefined, 0.0, draws), [0.025, 0.975], axis=0)
    sign = np.sign(np.nan_to_num(estimate))
    return {
        "value": estimate,
        "low": np.where(undefined, np.nan, low),
        "high": np.where(undefined, np.nan, high),
        "certainty": np.where(undefined, 0.0, (draws * sign >= NEGLIGIBLE).mean(0)),
    }


def _alternatives(policy: Any, rollouts: AlternativeRollouts, token: int) -> list[dict[str, Any]]:
    """What else could have been said, most often sampled first: text, share of the other tokens' mass, rollouts and
    successes.
    """
    found: dict[int, dict[str, Any]] = {}
    for reward, other, share in zip(rollouts.rewards[token], rollouts.alternative[token], rollouts.share[token]):
        if np.isfinite(reward):
            entry = found.setdefault(int(other), {"share": float(share), "num": 0, "correct": 0})
            entry["num"] += 1
            entry["correct"] += int(reward)
    order = sorted(found, key=lambda other: -found[other]["num"])[:6]
    return [{"text": policy.tokenizer.decode([other]), **found[other]} for other in order]
