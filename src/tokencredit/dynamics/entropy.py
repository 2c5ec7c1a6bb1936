"""The gradient of mean token entropy, as a weighting of every token's log-prob and entropy.

    H = E[Σₜ Hₜ] / E[T]          Hₜ the full-vocabulary entropy at token t, T the number of tokens, prompts and rollouts
                                 drawn anew

    ∇H = E[ Σₜ ∇Hₜ + Σₜ (Gₜ − bₜ) ∇log πₜ − H Σₜ (Rₜ − rₜ) ∇log πₜ ] / E[T]

Gₜ = Σ_{k>t} Hₖ is the entropy still to come and Rₜ = T − t the tokens still to come after token t; Hₜ itself is decided
by the prefix, so token t has no part in it. The baselines bₜ, rₜ are any numbers that the prefix y<t, the prompt and
other rollouts decide: they leave the expectation as it is. The first term holds the prefixes fixed, the second moves
them, the third keeps the mean per token. Derived from the likelihood ratio; the same three terms, with Gₜ from t on, in
P. Saad, "Entropy Dynamics in Reinforcement Learning" (2025).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.dynamics.batch import Batch
from tokencredit.dynamics.to_go import Baseline, after, baseline_of
from tokencredit.masked import zero_off


class Weights(NamedTuple):
    """One term of ∇H: Σ (logprob · ∇log π + entropy · ∇H) over tokens, [B, T] each; what `Passes.reverse` takes."""

    logprob: Tensor
    entropy: Tensor


def entropy_weights(batch: Batch, baseline: str | Baseline = "position", *, features: Tensor | None = None) -> Weights:
    """(weight of log π, weight of H) [B, T] with ∇H = passes.reverse(*weights), the batch's own mean entropy and length
    in H and E[T].

    baseline  a name in `to_go.BASELINES`, or two [B, T] tensors: of the entropy to go and of the length to go, both
              after the token
    features  [B, T, F] known before the token is drawn, for "ridge": hidden states
    """
    terms = entropy_terms(batch, baseline, features=features)
    return Weights(sum(term.logprob for term in terms.values()), terms["direct"].entropy)


def entropy_terms(
    batch: Batch, baseline: str | Baseline = "position", *, features: Tensor | None = None
) -> dict[str, Weights]:
    """{"direct", "path", "length"}: the three terms of ∇H, each with its own weights; they add up to
    `entropy_weights`.
    """
    rollouts = batch.rollouts
    found = baseline_of(rollouts, baseline, features) if isinstance(baseline, str) else baseline
    entropy, mask = rollouts.score("entropy").double(), rollouts.mask
    return terms_of(entropy, mask, found, torch.ones(len(rollouts), dtype=torch.float64, device=mask.device))


def terms_of(entropy: Tensor, mask: Tensor, baseline: Baseline, row_weight: Tensor) -> dict[str, Weights]:
    """The terms where rollouts count `row_weight` [B]: 1 each for a sample, their probabilities for an enumeration."""
    tokens = mask.double()
    share = row_weight[:, None] * tokens / (row_weight @ tokens.sum(1))
    mean = (share * entropy).sum()
    none = torch.zeros_like(entropy)
    path = share * zero_off(after(entropy, mask) - baseline.entropy, mask)
    length = -mean * share * zero_off(after(tokens, mask) - baseline.length, mask)
    return {"direct": Weights(none, share), "path": Weights(path, none), "length": Weights(length, none)}
