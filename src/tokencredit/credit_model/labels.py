"""Measured effects as labels: a directory of `tokencredit pivotality run`, and the features of its tokens.

size    effect̂² − se²         unbiased for effect²; negative where a token is within its noise
weight  1 / (τ² + se²)         τ the standard deviation of the sizes: a noisy label counts less, an exact one not alone
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokencredit.credit_model.features import TokenFeatures, features
from tokencredit.durable import read_mapping
from tokencredit.lm.policy import Policy, PolicyConfig
from tokencredit.pivotality import record

ESTIMAND = "before_after"


@dataclass(frozen=True)
class Labels:
    """Of N tokens: effect and error [N], float64; prompt [N], numbered; `prompts`, their digests; the tokens that were
    sampled to measure them."""

    effect: Tensor
    error: Tensor
    prompt: Tensor
    prompts: tuple[str, ...]
    spent: int

    @property
    def size(self) -> Tensor:
        return self.effect.square() - self.error.square()

    @property
    def weight(self) -> Tensor:
        return 1 / (self.size.var() + self.error.square()).clamp(min=1e-12)


def read_labels(directory: Path, policy: Policy | None = None) -> tuple[Policy, TokenFeatures, Labels]:
    """The policy that the run measured, or the one that is given, with features and labels of the run's tokens.

    ValueError where no token has a measured effect.
    """
    traces, tokens = record.read(directory, "traces"), record.read(directory, "tokens")
    result = read_mapping(directory / "result.json", "policy", "figures")
    policy = policy or PolicyConfig(**result["policy"]).open()
    prompts, completions = ([row[name] for row in traces] for name in ("prompt_ids", "completion_ids"))
    found = features(
        policy.model, prompts, completions, [row["reward"] for row in traces], temperature=policy.temperature
    )
    effect, error = (
        torch.tensor([np.nan if row[name] is None else row[name] for row in tokens], dtype=torch.float64)
        for name in (ESTIMAND, f"{ESTIMAND}_standard_error")
    )
    names = [json.dumps(ids) for ids in prompts]
    number = {name: k for k, name in enumerate(dict.fromkeys(names))}
    prompt = torch.tensor([number[names[row["trace"]]] for row in tokens])
    spent = int(result["figures"]["generated"]["value"])
    some, labels = measured_tokens(found, Labels(effect, error, prompt, tuple(number), spent))
    if not len(labels.effect):
        raise ValueError(f"{directory}: no token has a measured {ESTIMAND}")
    return policy, some, labels


def measured_tokens(found: TokenFeatures, labels: Labels) -> tuple[TokenFeatures, Labels]:
    """Features and labels of the tokens whose effect was measured."""
    keep = labels.effect.isfinite() & labels.error.isfinite()
    some = TokenFeatures(found.states[keep], found.scores[keep], found.outcome[keep])
    return some, replace(labels, effect=labels.effect[keep], error=labels.error[keep], prompt=labels.prompt[keep])
