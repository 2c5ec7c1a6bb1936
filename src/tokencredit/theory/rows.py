"""The exact policy gradient, prefix by prefix, of a world whose policy has a row of logits for every prefix.

    g = e_a − p(x)   in row x, 0 elsewhere        ∇_x J = reach(x) p∘(Q − V)
                                                                  E‖(R − b) g‖² = Σ_a p_a E[(R − b)² | x, a] ‖e_a − p‖²

Gradients of different prefixes are orthogonal, so signal, variance and error of any estimator are sums over prefixes.
Rewards are 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokencredit.tasks.exact import Enumeration, ExactWorld, TabularPolicy


@dataclass(frozen=True, eq=False)
class Rows:
    """Every open prefix x: reach [P], p and Q [P, V]."""

    reach: Tensor
    p: Tensor
    q: Tensor

    @cached_property
    def value(self) -> Tensor:
        """[P]: V."""
        return (self.p * self.q).sum(1)

    @cached_property
    def norms2(self) -> Tensor:
        """[P, V]: ‖e_a − p‖²."""
        return 1 - 2 * self.p + self.p.square().sum(1, keepdim=True)

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """What a weight could be made of, known before the token is drawn [P]: entropy, tr F and its root, spread =
        √Var_p Q.
        """
        trace = (self.p * self.norms2).sum(1)
        spread = (self.p * (self.q - self.value[:, None]).square()).sum(1).sqrt()
        return {
            "one": torch.ones_like(trace),
            "entropy": torch.special.entr(self.p).sum(1),
            "fisher": trace,
            "root_fisher": trace.sqrt(),
            "spread": spread,
        }

    @cached_property
    def gradient(self) -> Tensor:
        """[P, V]: ∇J."""
        return self.reach[:, None] * self.p * (self.q - self.value[:, None])

    def squares(self, baseline: Tensor | float) -> Tensor:
        """[P, V]: E[(R − b)² | x, a] ‖e_a − p‖²; b a number or [P]."""
        b = torch.as_tensor(baseline, dtype=torch.float64).expand_as(self.reach)[:, None]
        return (self.q * (1 - b).square() + (1 - self.q) * b.square()) * self.norms2

    def energy(self, baseline: Tensor | float) -> Tensor:
        """[P]: E‖(R − b) g‖² of one rollout's part in row x, 0 where it does not pass."""
        return self.reach * (self.p * self.squares(baseline)).sum(1)

    @property
    def success(self) -> float:
        """J."""
        return float(self.value[0])


def third(completions: Tensor) -> Tensor:
    """Reward 1 where the tokens sum to 1 modulo 3."""
    return (completions.sum(1) % 3 == 1).double()


SMALL = ExactWorld(4, 3, third, eos=0)
"""13 open prefixes, 40 completions of 1 to 3 tokens: pairs of rollouts can be enumerated."""
WIDE = ExactWorld(4, 5, third, eos=0)
"""121 open prefixes: figures."""


POLICIES = 5
"""Random policies of the wide world that figures are taken over: seeds 0 to 4."""


def enumeration_of(world: ExactWorld, seed: int = 0, scale: float = 1.5) -> Enumeration:
    """The world under a random softmax table with logits of standard deviation `scale`, without gradients."""
    with torch.no_grad():
        return world.enumerate(TabularPolicy(world, seed=seed, scale=scale))


def rows_of(exact: Enumeration) -> Rows:
    return Rows(
        *(torch.cat(parts) for parts in (exact.reach, [each.exp() for each in exact.log_probs], exact.action_values))
    )


def wide_rows() -> list[Rows]:
    """The wide world under policies about as decided as language models: a mean entropy of 0.3 to 0.8 nats."""
    return [rows_of(enumeration_of(WIDE, seed, scale=3.0)) for seed in range(POLICIES)]


def token_rows(exact: Enumeration) -> tuple[Tensor, Tensor]:
    """(row of every token's prefix [N, T], the token [N, T]) of all completions, −1 off the mask; rows are numbered as
    in `rows_of`.
    """
    sequences, mask, _, _ = exact.completions
    row, start = torch.full(sequences.shape, -1), 0
    for depth, reach in enumerate(exact.reach):
        alive = mask[:, depth]
        row[alive, depth] = start + exact.world.index(sequences[alive, :depth])
        start += len(reach)
    return row, sequences.masked_fill(~mask, -1)


def score_vectors(exact: Enumeration) -> Tensor:
    """[N, T, P, V]: ∇ log π of every token of every completion, 0 off the mask."""
    rows, (row, token) = rows_of(exact), token_rows(exact)
    found = torch.zeros(*row.shape, *rows.p.shape, dtype=torch.float64)
    n, t = (row >= 0).nonzero(as_tuple=True)
    at = row[n, t]
    found[n, t, at] = -rows.p[at]
    found[n, t, at, token[n, t]] += 1
    return found
