"""Worlds small enough to enumerate: every completion, its probability, and so the exact value, entropy and gradients of
a policy.

    J = Σₛ P(s) r(s)        V(x) = Σₐ π(a|x) Q(x, a)        H = E[Σᵢ H(π(·|y<i))] / E[number of tokens]

A completion ends with `eos` or at the horizon. The prefixes still open at depth t are all words of length t over the
other tokens, so they are numbered by reading the word as a number; a whole depth is one tensor, and going up a depth is
one reshape. Everything is float64 and differentiable in the policy's parameters, which makes an estimator's expectation
a number to compare with instead of a hope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Policy = Callable[[Tensor], Tensor]
"""Prefixes [N,t] of completion tokens -> next-token logits [N, vocab]."""


@dataclass(frozen=True)
class ExactWorld:
    """The rules: tokens 0..vocab-1, at most `horizon` of them, and a reward for complete sequences.

    reward   completions [N,t] of one length t, all ended (by eos, or t = horizon) -> rewards [N]
    eos      the absorbing token, or None: every completion has full length
    """

    vocab: int
    horizon: int
    reward: Callable[[Tensor], Tensor]
    eos: int | None = None

    @property
    def live(self) -> Tensor:
        """The tokens that do not end a completion."""
        return torch.tensor([token for token in range(self.vocab) if token != self.eos])

    def num_prefixes(self, depth: int) -> int:
        """How many prefixes are open at a depth."""
        return len(self.live) ** depth

    def prefixes(self, depth: int) -> Tensor:
        """All open prefixes of a depth, in order: [num_prefixes(depth), depth]."""
        index, base = torch.arange(self.num_prefixes(depth)), len(self.live)
        digits = [index // base**power % base for power in range(depth - 1, -1, -1)]
        return self.live[torch.stack(digits, -1)] if depth else torch.zeros(1, 0, dtype=torch.long)

    def index(self, prefixes: Tensor) -> Tensor:
        """Position of open prefixes [N,t] among the prefixes of their depth [N]."""
        rank = torch.full((self.vocab,), -1)
        rank[self.live] = torch.arange(len(self.live))
        digits = rank[prefixes]
        if bool((digits < 0).any()):
            raise ValueError("a prefix that contains eos is complete: nothing follows it")
        place = len(self.live) ** torch.arange(prefixes.shape[1] - 1, -1, -1)
        return (digits * place).sum(-1)

    def verify(self, completion: Sequence[int], truncated: bool = False) -> float:
        """Reward of one completion: what a prefix tree asks for."""
        return float(self.reward(torch.tensor([list(completion)])))

    def enumerate(self, policy: Policy, *, batch: int = 8192) -> Enumeration:
        """Everything about a policy. Differentiable unless gradients are off; the policy is evaluated `batch` prefixes
        at a time and, for a gradient, once more, so memory stays that of one batch."""
        levels = []
        for depth in range(self.horizon):
            pieces = self.prefixes(depth).split(batch)
            whole = len(pieces) == 1 or not torch.is_grad_enabled()
            logits = [policy(piece) if whole else checkpoint(policy, piece, use_reentrant=False) for piece in pieces]
            levels.append(torch.log_softmax(torch.cat(logits).double(), -1))
        return Enumeration(self, tuple(levels))


@dataclass(frozen=True)
class Enumeration:
    """A world under one policy. `log_probs[t]` [num_prefixes(t), vocab] are the next-token log-probabilities at depth
    t.
    """

    world: ExactWorld
    log_probs: tuple[Tensor, ...]

    @cached_property
    def reach(self) -> tuple[Tensor, ...]:
        """Probability of every open prefix, by depth."""
        reach = [torch.ones(1, dtype=torch.float64)]
        for log_p in self.log_probs[:-1]:
            reach.append((reach[-1][:, None] * log_p.exp()[:, self.world.live]).reshape(-1))
        return tuple(reach)

    @cached_property
    def action_values(self) -> tuple[Tensor, ...]:
        """Q(x, a) [num_prefixes(t), vocab] by depth: the reward where the completion ends, else V of the longer
        prefix.
        """
        world, levels = self.world, []
        for depth in range(world.horizon - 1, -1, -1):
            prefixes, q = world.prefixes(depth), torch.empty(self.log_probs[depth].shape, dtype=torch.float64)
            ending = range(world.vocab) if depth == world.horizon - 1 else [] if world.eos is None else [world.eos]
            for token in ending:
                complete = torch.cat([prefixes, torch.full((len(prefixes), 1), token)], 1)
                q[:, token] = world.reward(complete).double()
            if levels:
                q[:, world.live] = (self.log_probs[depth + 1].exp() * levels[-1]).sum(-1).view(len(prefixes), -1)
            levels.append(q)
        return tuple(reversed(levels))

    @cached_property
    def values(self) -> tuple[Tensor, ...]:
        """V of every open prefix [num_prefixes(t)], by depth."""
        return tuple((log_p.exp() * q).sum(-1) for log_p, q in zip(self.log_probs, self.action_values))

    @property
    def success(self) -> Tensor:
        """J, the expected reward: V of the empty prefix (a scalar, differentiable)."""
        return self.values[0][0]

    @cached_property
    def expected_length(self) -> Tensor:
        """E[number of tokens], eos included."""
        return torch.stack([reach.sum() for reach in self.reach]).sum()

    @property
    def entropy(self) -> Tensor:
        """H, the mean token entropy: a ratio of expectations, so every token weighs the same (a scalar,
        differentiable).
        """
        total = [reach @ _entropy(log_p) for reach, log_p in zip(self.reach, self.log_probs)]
        return torch.stack(total).sum() / self.expected_length

    def value(self, prefix: Sequence[int]) -> float:
        """V of one prefix; the reward if it is complete."""
        if len(prefix) == self.world.horizon or (len(prefix) and prefix[-1] == self.world.eos):
            return self.world.verify(prefix)
        return self.values[len(prefix)][self.world.index(torch.tensor([list(prefix)], dtype=torch.long))].item()

    def policy_gradient(self, parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """∇J = Σₛ r(s) ∇P(s), through the enumeration itself: the number that every policy-gradient estimator
        estimates.
        """
        return torch.autograd.grad(
            self.success, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True
        )

    def entropy_gradient(self, parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """∇H, the change of the prefix distribution included."""
        return torch.autograd.grad(
            self.entropy, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True
        )

    @cached_property
    def completions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All of them: sequences [N,horizon] (0 after the end), mask [N,horizon], probability [N] (differentiable),
        reward [N].
        """
        world, parts = self.world, []
        for depth, (reach, log_p, q) in enumerate(zip(self.reach, self.log_probs, self.action_values)):
            last = depth == world.horizon - 1
            tokens = (
                torch.arange(world.vocab)
                if last
                else torch.tensor([] if world.eos is None else [world.eos], dtype=torch.long)
            )
            head = world.prefixes(depth).repeat_interleave(len(tokens), 0)
            tail = torch.zeros(len(head), world.horizon - depth - 1, dtype=torch.long)
            sequences = torch.cat([head, tokens.repeat(len(reach))[:, None], tail], 1)
            mask = (torch.arange(world.horizon) <= depth).expand(len(head), -1)
            parts.append(
                (
                    sequences,
                    mask,
                    (reach[:, None] * log_p.exp()[:, tokens]).reshape(-1),
                    q[:, tokens].detach().reshape(-1),
                )
            )
        sequences, mask, probability, reward = (torch.cat(part) for part in zip(*parts))
        return sequences, mask, probability, reward

    def draw(self, num: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`num` independent rollouts: sequences [num,horizon], mask, reward [num]."""
        sequences, mask, probability, reward = self.completions
        chosen = torch.multinomial(probability.detach(), num, replacement=True, generator=generator)
        return sequences[chosen], mask[chosen], reward[chosen]

    def scores(self, sequences: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Exact per-token scores [N,T], zero off the mask: logprob, entropy, value (before the token), exact_value (Q −
        V), spread.
        """
        names = ("logprob", "entropy", "value", "exact_value", "spread")
        out = {name: torch.zeros(mask.shape, dtype=torch.float64) for name in names}
        for depth in range(mask.shape[1]):
            rows = mask[:, depth].nonzero()[:, 0]
            at, token = self.world.index(sequences[rows, :depth]), sequences[rows, depth]
            log_p, q, v = (level[depth].detach()[at] for level in (self.log_probs, self.action_values, self.values))
            picked = torch.arange(len(rows)), token
            variance = (log_p.exp() * (q - v[:, None]) ** 2).sum(-1)
            found = (log_p[picked], _entropy(log_p), v, q[picked] - v, variance.sqrt())
            for name, score in zip(names, found):
                out[name][rows, depth] = score
        return out

    def q_minus_v(self, sequences: Tensor, mask: Tensor) -> Tensor:
        """Q − V of every token [N,T], zero off the mask."""
        return self.scores(sequences, mask)["exact_value"]


def _entropy(log_p: Tensor) -> Tensor:
    """−Σ p log p over the last axis; a token of probability 0 adds 0."""
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


class TabularPolicy(nn.Module):
    """A softmax table: one row of logits for every open prefix of a world. Its numbers can be checked by hand."""

    def __init__(self, world: ExactWorld, *, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.world = world
        generator = torch.Generator().manual_seed(seed)
        sizes = [(world.num_prefixes(depth), world.vocab) for depth in range(world.horizon)]
        self.tables = nn.ParameterList(
            [scale * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        )

    def forward(self, prefixes: Tensor) -> Tensor:
        return self.tables[prefixes.shape[1]][self.world.index(prefixes)]


@dataclass(frozen=True)
class PromptedPolicy:
    """A causal language model after one prompt, as the policy of a world whose tokens are the model's."""

    model: Any
    prompt_ids: Sequence[int]

    def __call__(self, prefixes: Tensor) -> Tensor:
        prompt = torch.tensor(list(self.prompt_ids)).expand(len(prefixes), -1)
        return self.model(input_ids=torch.cat([prompt, prefixes], 1), use_cache=False).logits[:, -1]


TOKENS = ("0", "1", "2", "+", "*", "=", "L", "R", "u", "E")
"""Vocabulary of the modular world: digits, signs, do the left or the right operation first, undo, end."""

PROMPTS = tuple(f"{a} {p} {b} {q} {c} =" for a, p, b, q, c in product("012", "+*", "012", "+*", "012"))
"""All 108 prompts of the modular world, such as `2 + 1 * 2 =`."""


def encode(text: str) -> list[int]:
    """Token ids of a text in the modular world."""
    return [TOKENS.index(word) for word in text.split()]


def modular_world(prompt: str, horizon: int = 6) -> ExactWorld:
    """`a op b op c =` modulo 3: reward 1 for a completion that ends with the value and E, whatever was written before
    it.

    `R 2 1 E` does the right operation first. There is no grammar, so all 9⁰ + … + 9⁵ = 66,430 open prefixes of horizon
    6 can be reached.
    """
    a, first, b, second, c, _ = encode(prompt)
    times = TOKENS.index("*")
    left = a * b if first == times else a + b
    answer = (a + b * c if second == times and first != times else left * c if second == times else left + c) % 3
    end = TOKENS.index("E")

    def reward(completions: Tensor) -> Tensor:
        if completions.shape[1] < 2:
            return torch.zeros(len(completions))
        return ((completions[:, -1] == end) & (completions[:, -2] == answer)).double()

    return ExactWorld(len(TOKENS), horizon, reward, end)


def tiny_model(
    seed: int = 0, *, vocab: int = len(TOKENS), hidden: int = 32, layers: int = 2, scale: float = 0.3
) -> Any:
    """An untrained Qwen2 for a world this small; `scale` is the spread of its weights, hence how decided it is."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True, initializer_range=scale)).eval()
