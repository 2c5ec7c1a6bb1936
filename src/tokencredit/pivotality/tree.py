"""The pruned prefix tree: the exact value of every prefix of a small policy, between two rigorous bounds.

    V(x) = Σₐ π(a|x) Q(x, a),    Q(x, a) = V(xa),  or the verified reward where xa ends (eos, or the length limit)

The tree walks the policy's own distribution breadth first and stops at prefixes that are reached too rarely. A prefix
that is not expanded could be worth anything in the reward range, so its mass is carried upwards as [worst, best] and
every V gets a bracket [low, high] that holds the exact value whatever was pruned. Keeping more prefixes can only
tighten it.

A child of an expanded prefix is kept when one of these holds:
  reach(child) ≥ eps                            it matters for the prompt;
  P(child | x) ≥ include_eps, x included        it matters for a prefix that was asked about, however rare that prefix
                                                is;
  it lies on an included completion.
So one tree answers all completions of a prompt, and the bracket of a rare prefix is not much wider than that of a
common one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.lm.models import CausalModel, Tokenizer
from tokencredit.pivotality.frontier import Frontier
from tokencredit.pivotality.growth import Nodes, Pruning, Verify, grow_block


@dataclass(frozen=True)
class Alternatives:
    """The next tokens kept at one prefix, by id: `token` [K], `probability` [K], bracket of Q `value` [K,2], and the
    mass `pruned`.
    """

    token: Tensor
    probability: Tensor
    value: Tensor
    pruned: float


@dataclass(frozen=True)
class Prefixes:
    """All kept prefixes of a tree, [N] each, float64: `parent` (−1 for the root, which is first), the last `token`,
    `depth`, `reach`, `entropy` of the next token in nats (NaN unless `expanded`), `bracket` [N,2] of V.
    """

    parent: np.ndarray
    token: np.ndarray
    depth: np.ndarray
    reach: np.ndarray
    entropy: np.ndarray
    bracket: np.ndarray
    expanded: np.ndarray


@dataclass(frozen=True)
class PathValues:
    """What the tree knows along one completion, float64. A token outside the tree (pruned, past the end) has NaN.

    before [T,2]    bracket of V(y<i)          after [T,2]
                                                             bracket of Q = V(y≤i); the reward itself at the last token
    probability [T] π(yᵢ | y<i)                reach [T]       P(y≤i)
    entropy [T]     of π(· | y<i), nats        spread [T]      standard deviation of Q over the next token, at midpoints
    """

    before: Tensor
    after: Tensor
    probability: Tensor
    reach: Tensor
    entropy: Tensor
    spread: Tensor

    @property
    def credit(self) -> Tensor:
        """Qᵢ − Vᵢ at the midpoints [T] (`before_after`). Over a finished completion it sums to reward − V₀."""
        return self.after.mean(-1) - self.before.mean(-1)

    @property
    def credit_bracket(self) -> Tensor:
        """Bounds of Q − V [T,2], with `credit` in the middle.

        Q − V = (1 − π) (Q − V₋),   (1 − π) V₋ = V − π Q
                                                            V₋: the value of the other tokens, known independently of Q
        """
        low, high, pi = self.after[:, 0], self.after[:, 1], self.probability
        others_low, others_high = self.before[:, 0] - pi * low, self.before[:, 1] - pi * high
        return torch.stack([(1 - pi) * low - others_high, (1 - pi) * high - others_low], -1)

    @property
    def replace(self) -> Tensor:
        """Vᵢ − V₋ᵢ = (Q − V) / (1 − π) at the midpoints [T]; NaN for a token without an alternative."""
        rest = 1 - self.probability
        return torch.where(rest > 0, self.credit / rest, torch.nan)


class PrefixTree:
    """The tree of one prompt. `PrefixTree.grow` makes it; `grow_forest` makes several at once, which is faster."""

    def __init__(self, nodes: Nodes, root: int) -> None:
        self._nodes, self._root = nodes, root
        self._mine = nodes.tree == root

    @classmethod
    def grow(
        cls,
        model: CausalModel,
        prompt_ids: Sequence[int],
        verify: Verify,
        *,
        eos_token_id: int | Sequence[int],
        max_new_tokens: int,
        include: Sequence[Sequence[int]] = (),
        **options: Any,
    ) -> PrefixTree:
        """The tree of one prompt; the options are those of `grow_forest`."""
        ends = {"eos_token_id": eos_token_id, "max_new_tokens": max_new_tokens}
        return grow_forest(model, [prompt_ids], verify, include=[include], **ends, **options)[0]

    @property
    def root(self) -> tuple[float, float]:
        """Bracket of V₀, the success probability of the prompt."""
        low, high = self._nodes.bracket[self._root]
        return float(low), float(high)

    @property
    def unresolved(self) -> float:
        """Width of the root's bracket."""
        return self.root[1] - self.root[0]

    @property
    def num_prefixes(self) -> int:
        """How many prefixes were expanded (had their next-token distribution computed)."""
        return int((self._nodes.expanded & self._mine).sum())

    def prefixes(self) -> Prefixes:
        """Every kept prefix of this tree, the root first and every other after its parent."""
        n, own = self._nodes, np.flatnonzero(self._mine)
        place = np.full(len(n.tree), -1)
        place[own] = np.arange(len(own))
        parent = np.where(n.key[own] < 0, -1, place[np.maximum(n.key[own] // n.vocab, 0)])
        return Prefixes(
            parent, n.key[own] % n.vocab, n.depth[own], n.reach[own], n.entropy[own], n.bracket[own], n.expanded[own]
        )

    def value(self, prefix: Sequence[int]) -> tuple[float, float]:
        """Bracket of V(prefix): completion tokens only, () is the root. (nan, nan) outside the tree."""
        node = self._find(prefix)[-1]
        low, high = self._nodes.bracket[node] if node >= 0 else (math.nan, math.nan)
        return float(low), float(high)

    def path(self, completion: Sequence[int]) -> PathValues:
        """V before and Q after each token of a completion, with its probability, reach, entropy and spread."""
        found = self._find(completion)
        before, after = found[:-1], found[1:]
        before = np.where(self._nodes.expanded[before], before, -1)

        def take(values: np.ndarray, node: np.ndarray) -> Tensor:
            known = (node >= 0).reshape(-1, *[1] * (values.ndim - 1))
            return torch.from_numpy(np.where(known, values[node], np.nan))

        n = self._nodes
        return PathValues(
            take(n.bracket, before),
            take(n.bracket, after),
            take(n.probability, after),
            take(n.reach, after),
            take(n.entropy, before),
            take(n.spread, before),
        )

    def credit(self, completion: Sequence[int]) -> Tensor:
        """Q − V at every token [T], float64, at the midpoints; NaN outside the tree (include the completion when
        growing).
        """
        return self.path(completion).credit

    def alternatives(self, prefix: Sequence[int]) -> Alternatives:
        """The kept next tokens of an expanded prefix: Σ probability + pruned = 1, and V = Σ probability · Q + pruned ·
        [worst, best].
        """
        n, node = self._nodes, int(self._find(prefix)[-1])
        if node < 0 or not n.expanded[node]:
            raise KeyError(
                f"prefix {list(prefix)} is not expanded in this tree: it was pruned (grow with include=[...]) or it is"
                " complete"
            )
        kids = slice(*np.searchsorted(n.key, [node * n.vocab, (node + 1) * n.vocab]))
        token = torch.from_numpy(n.key[kids] - node * n.vocab)
        return Alternatives(
            token, torch.from_numpy(n.probability[kids]), torch.from_numpy(n.bracket[kids]), float(n.pruned[node])
        )

    def entropy(self) -> tuple[float, float]:
        """Bracket of the mean token entropy  E[Σᵢ H(π(·|y<i))] / E[number of tokens]  of this prompt.

        A pruned continuation may add between 0 and the remaining number of tokens, each of entropy between 0 and log V.
        """
        n, mine = self._nodes, self._mine & self._nodes.expanded
        reach = n.reach[mine]
        total, length = float(reach @ n.entropy[mine]), float(reach.sum())
        beyond = float((reach * n.pruned[mine]) @ (n.max_new_tokens - n.depth[mine] - 1))
        return total / (length + beyond), (total + beyond * math.log(n.vocab)) / (length + beyond)

    def _find(self, completion: Sequence[int]) -> np.ndarray:
        """Node of every prefix of a completion [T+1], the root first; −1 from where it leaves the tree."""
        n, node = self._nodes, self._root
        found = np.full(len(completion) + 1, -1)
        found[0] = node
        for i, token in enumerate(completion):
            if not 0 <= token < n.vocab:
                raise ValueError(f"token id {token} at position {i} is outside the vocabulary of {n.vocab}")
            key = node * n.vocab + int(token)
            node = int(np.searchsorted(n.key, key))
            if node == len(n.key) or n.key[node] != key:
                break
            found[i + 1] = node
        return found


def grow_forest(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    verify: Verify | Sequence[Verify],
    *,
    eos_token_id: int | Sequence[int],
    max_new_tokens: int,
    eps: float = 5e-6,
    temperature: float = 1.0,
    include: Sequence[Sequence[Sequence[int]]] | None = None,
    include_eps: float = 1e-3,
    reward_range: tuple[float, float] = (0.0, 1.0),
    batch: int = 1024,
    at_once: int = 4,
    use_cache: bool = True,
) -> list[PrefixTree]:
    """One tree per prompt, prompts of equal length grown together (no padding, so the numbers are those of a tree grown
    alone).

    verify        one for all prompts, or one per prompt; called once per kept leaf with the completion's ids and
                  `truncated`
    eps           expand prefixes with reach ≥ eps; 0 expands everything that has any probability (vocab **
                  max_new_tokens!)
    include       per prompt, completions (or prefixes of them) whose every token must be in the tree
    include_eps   how far to look around an included prefix, relative to that prefix
    reward_range  what an unseen completion may earn; a verified reward outside it is an error
    batch         rows per forward pass; at_once: prompts grown together, which bounds the memory of the caches
    use_cache     False recomputes every prefix: for models without a key-value cache
    """
    verifiers = [verify] * len(prompts) if callable(verify) else list(verify)
    include = [()] * len(prompts) if include is None else include
    if not len(prompts) == len(verifiers) == len(include):
        counts = f"{len(prompts)} prompts, {len(verifiers)} verifiers, {len(include)} lists of completions to include"
        raise ValueError(f"{counts}: give one of each per prompt")
    ends = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    rule = Pruning(eps, include_eps, ends, max_new_tokens, temperature, reward_range)
    trees: dict[int, PrefixTree] = {}
    for block in _blocks([len(prompt) for prompt in prompts], at_once):
        frontier = Frontier(model, torch.tensor([list(prompts[k]) for k in block]), batch, use_cache)
        nodes = grow_block(frontier, [verifiers[k] for k in block], [include[k] for k in block], rule)
        trees |= {k: PrefixTree(nodes, root) for root, k in enumerate(block)}
    return [trees[k] for k in range(len(prompts))]


def _blocks(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Positions of equal length together, at most `size` at a time."""
    for _, same in groupby(sorted(range(len(lengths)), key=lengths.__getitem__), key=lengths.__getitem__):
        while block := list(islice(same, size)):
            yield block


def on_text(verify: Callable[..., Any], tokenizer: Tokenizer, row: dict) -> Verify:
    """A task's verifier of text, `verify(text, row, truncated)` answering a verdict or a bool, as a verifier of token
    ids: 1 if correct.
    """

    def verify_ids(ids: list[int], truncated: bool) -> float:
        verdict = verify(tokenizer.decode(ids, skip_special_tokens=True), row, truncated)
        return float(getattr(verdict, "correct", verdict))

    return verify_ids


def exact_value(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    verify: Verify | Sequence[Verify],
    **options: Any,
) -> list[list[Tensor]]:
    """Q − V of every token of every completion of every prompt (float64 [T], bracket midpoints): one tree per prompt,
    as `grow_forest`.
    """
    trees = grow_forest(model, prompts, verify, include=completions, **options)
    return [[tree.credit(completion) for completion in rows] for tree, rows in zip(trees, completions)]


def exact_value_scores(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    completions: Tensor,
    mask: Tensor,
    group: Tensor,
    verify: Verify | Sequence[Verify],
    **options: Any,
) -> Tensor:
    """The score `exact_value`: Q − V of every sampled token [B,T], float32, zero off the mask.

    prompts, verify   one per row (or one verifier for all); rows of a group share prompt, verifier and tree
    completions       [B,T] token ids, each row's first mask.sum() of them its own, eos included
    """
    order: dict[int, list[int]] = {}
    for row, label in enumerate(group.tolist()):
        order.setdefault(label, []).append(row)
    heads = [rows[0] for rows in order.values()]
    rows_ids = [row[:length] for row, length in zip(completions.tolist(), mask.sum(-1).tolist())]
    verifiers = verify if callable(verify) else [verify[row] for row in heads]
    wanted = [[rows_ids[row] for row in rows] for rows in order.values()]
    credits = exact_value(model, [prompts[row] for row in heads], wanted, verifiers, **options)
    out = torch.zeros(mask.shape, dtype=torch.float32)
    for row, credit in (
        (row, credit) for rows, some in zip(order.values(), credits) for row, credit in zip(rows, some)
    ):
        if bool(credit.isnan().any()):
            where = int(credit.isnan().nonzero()[0])
            raise ValueError(
                f"row {row} goes on at token {where}, after its eos or past max_new_tokens: "
                "the mask, eos_token_id or max_new_tokens is not the sampler's"
            )
        out[row, : len(credit)] = credit
    return out.to(completions.device)
