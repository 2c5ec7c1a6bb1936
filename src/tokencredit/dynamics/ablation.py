"""What would the step do without some of its tokens? By linearity, with gain and clipping held fixed, and exactly, with
both made anew.

    linear   dF − Σ φᵢₜ over the tokens           free: the shares are known
    exact    ⟨∇F, Δθ⟩ of the step whose coefficients are 0 there, divided by what they were divided by before

The two differ because AdamW's denominators and the clipping factor depend on the whole batch: fewer tokens make a
smaller gradient, which is divided by a smaller root.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokencredit.credit import TopFraction
from tokencredit.dynamics.attribution import Attribution, Question
from tokencredit.dynamics.checkpoint import Checkpoint
from tokencredit.dynamics.update import Update, without_tokens
from tokencredit.dynamics.vectors import scaled, total
from tokencredit.methods import METHODS
from tokencredit.objective.covariance import ClipCov, covariance, portion


def token_sets(update: Update) -> dict[str, Tensor]:
    """{name: [B, T] bool}: the tokens that published methods single out, and those of either outcome; sets without a
    token are left out.
    """
    rollouts = update.batch.rollouts
    logprob, credit, mask = rollouts.score("logprob"), update.credit, rollouts.mask
    surrogate = METHODS["clip_cov"].surrogate
    assert isinstance(surrogate, ClipCov)
    cov = covariance(logprob, credit, mask)
    low, high = surrogate.band
    forking = TopFraction("entropy", 0.2).select(rollouts)
    found = {
        "Clip-Cov’s draw": surrogate.coefficient(logprob, logprob, credit, rollouts).bool(),
        f"covariance in Clip-Cov’s band ({low:g}, {high:g})": mask & (cov > low) & (cov < high),
        "KL-Cov’s tokens": METHODS["kl_cov"].surrogate.coefficient(logprob, logprob, credit, rollouts).bool(),
        "top 2 % by covariance": highest(cov, mask, 0.02),
        "top 20 % by entropy (forking tokens)": forking,
        "the other 80 %": mask & ~forking,
        "tokens of failures": mask & ~rollouts.success[:, None],
    }
    return {name: tokens for name, tokens in found.items() if (tokens & (update.coefficient != 0)).any()}


def highest(x: Tensor, mask: Tensor, share: float) -> Tensor:
    """[B, T] bool: the tokens with the largest x, as many as the share of all tokens says, at least one."""
    order = x.masked_fill(~mask, -torch.inf).flatten().sort(descending=True, stable=True).indices
    chosen = torch.zeros(mask.numel(), dtype=torch.bool)
    chosen[order[: portion(share, int(mask.sum()))]] = True
    return chosen.view_as(mask) & mask


def without(checkpoint: Checkpoint, update: Update, tokens: Tensor, name: str = "") -> Question:
    """Asks what changes in dF when some tokens [B, T] bool have no gradient, the whole step compared, and ends with
    {"exact/GOAL" [P]}; `name` keeps its gradient, as `Passes.reverse` takes it.
    """
    whole = scaled(update.vector, -1)
    (change,) = yield [total(without_tokens(checkpoint, update, tokens, name).vector, whole)]
    return {f"exact/{name}": values for name, values in change.items()}


def without_linear(attribution: Attribution, tokens: Tensor) -> dict[str, float]:
    """{goal: −Σ φᵢₜ over the tokens}."""
    return {name: -float(share[tokens].sum()) for name, share in attribution.shares.items()}
