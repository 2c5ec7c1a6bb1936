"""The enumerated worlds against brute force in plain Python, finite differences, and identities that hold for any
policy.
"""

import math
from itertools import product

import pytest
import torch

from tokencredit.rollouts import Rollouts
from tokencredit.tasks.exact import (
    PROMPTS,
    TOKENS,
    ExactWorld,
    PromptedPolicy,
    TabularPolicy,
    encode,
    modular_world,
    tiny_model,
)

torch.set_num_threads(1)


def lucky(completions):
    """1 for completions whose tokens sum to an odd number, a quarter for those that start with token 2."""
    return torch.where(completions[:, 0] == 2, 0.25, (completions.sum(1) % 2).double())


WORLDS = [
    ExactWorld(4, 3, lucky, eos=3),
    ExactWorld(4, 3, lucky, eos=0),
    ExactWorld(3, 3, lucky),
    ExactWorld(2, 1, lucky, eos=1),
]


def plain_softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def brute_force(world, policy):
    """{completion: (probability, reward)} and {prefix: next-token probabilities}, one word at a time, in Python
    floats.
    """
    tables = {}
    for depth in range(world.horizon):
        live = [t for t in range(world.vocab) if t != world.eos]
        for row, word in enumerate(product(live, repeat=depth)):
            tables[word] = plain_softmax(policy.tables[depth][row].tolist())
    completions, stack = {}, [((), 1.0)]
    while stack:
        word, probability = stack.pop()
        if len(word) == world.horizon or (word and word[-1] == world.eos):
            completions[word] = (probability, float(world.reward(torch.tensor([word]))))
        else:
            stack += [((*word, t), probability * p) for t, p in enumerate(tables[word])]
    return completions, tables


def brute_value(completions, prefix):
    """E[reward | prefix] as a plain ratio of sums over completions."""
    below = [(p, r) for word, (p, r) in completions.items() if word[: len(prefix)] == prefix]
    return sum(p * r for p, r in below) / sum(p for p, _ in below)


@pytest.mark.parametrize("world", WORLDS)
def test_enumeration_is_brute_force(world):
    policy = TabularPolicy(world, seed=1, scale=1.5)
    exact, (completions, tables) = world.enumerate(policy), brute_force(world, policy)
    sequences, mask, probability, reward = exact.completions
    assert {tuple(s[m].tolist()) for s, m in zip(sequences, mask)} == set(completions) and len(sequences) == len(
        completions
    )
    for s, m, p, r in zip(sequences, mask, probability.tolist(), reward.tolist()):
        assert (p, r) == pytest.approx(completions[tuple(s[m].tolist())], abs=1e-12)
    assert exact.success.item() == pytest.approx(sum(p * r for p, r in completions.values()), abs=1e-12)
    for prefix in [*tables, *completions]:
        assert exact.value(prefix) == pytest.approx(brute_value(completions, prefix), abs=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_entropy_is_a_ratio_of_expectations(world):
    policy = TabularPolicy(world, seed=2)
    completions, tables = brute_force(world, policy)
    surprise = {word: -sum(p * math.log(p) for p in row) for word, row in tables.items()}
    total = sum(p * sum(surprise[word[:i]] for i in range(len(word))) for word, (p, _) in completions.items())
    length = sum(p * len(word) for word, (p, _) in completions.items())
    exact = world.enumerate(policy)
    assert exact.entropy.item() == pytest.approx(total / length, abs=1e-12)
    assert exact.expected_length.item() == pytest.approx(length, abs=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_scores_are_brute_force(world):
    policy = TabularPolicy(world, seed=3)
    exact, (completions, tables) = world.enumerate(policy), brute_force(world, policy)
    sequences, mask, _, _ = exact.completions
    scores = exact.scores(sequences, mask)
    for row, (s, m) in enumerate(zip(sequences.tolist(), mask.sum(1).tolist())):
        for i in range(m):
            before, after = brute_value(completions, tuple(s[:i])), brute_value(completions, tuple(s[: i + 1]))
            each = [brute_value(completions, (*s[:i], t)) for t in range(world.vocab)]
            spread = math.sqrt(sum(p * (q - before) ** 2 for p, q in zip(tables[tuple(s[:i])], each)))
            got = [float(scores[name][row, i]) for name in ("logprob", "value", "exact_value", "spread")]
            assert got == pytest.approx(
                [math.log(tables[tuple(s[:i])][s[i]]), before, after - before, spread], abs=1e-9
            )
    assert all(bool((score[~mask] == 0).all()) for score in scores.values())
    assert torch.equal(exact.q_minus_v(sequences, mask), scores["exact_value"])


def numeric_gradient(function, table, step=1e-5):
    gradient = torch.zeros_like(table)
    for i in range(table.numel()):
        for sign in (1, -1):
            with torch.no_grad():
                table.view(-1)[i] += sign * step
                gradient.view(-1)[i] += sign * function().item() / (2 * step)
                table.view(-1)[i] -= sign * step
    return gradient


@pytest.mark.parametrize("world", WORLDS[:3])
@pytest.mark.parametrize("batch", [8192, 2])  # 2: many pieces per depth, each recomputed for the gradient
def test_gradients_are_finite_differences(world, batch):
    policy = TabularPolicy(world, seed=4)
    exact = world.enumerate(policy, batch=batch)
    policy_gradient, entropy_gradient = (
        exact.policy_gradient(policy.parameters()),
        exact.entropy_gradient(policy.parameters()),
    )
    for table, by_success, by_entropy in zip(policy.tables, policy_gradient, entropy_gradient):
        success = numeric_gradient(lambda: world.enumerate(policy).success, table)
        entropy = numeric_gradient(lambda: world.enumerate(policy).entropy, table)
        torch.testing.assert_close(by_success, success, atol=1e-8, rtol=0)
        torch.testing.assert_close(by_entropy, entropy, atol=1e-8, rtol=0)


def test_policy_gradient_theorem():
    """∇J = E[Σᵢ (Q − V)ᵢ ∇log π(yᵢ)]: for a softmax table the gradient at (x, a) is reach(x) π(a|x) (Q − V)(x, a)."""
    world = WORLDS[0]
    policy = TabularPolicy(world, seed=5)
    exact = world.enumerate(policy)
    for depth, gradient in enumerate(exact.policy_gradient(policy.parameters())):
        advantage = exact.action_values[depth] - exact.values[depth][:, None]
        torch.testing.assert_close(gradient, exact.reach[depth][:, None] * exact.log_probs[depth].exp() * advantage)


@pytest.mark.parametrize("horizon", [3, 6])
def test_squared_increments_sum_to_the_variance_of_the_outcome(horizon):
    """E Σᵢ (Q − V)ᵢ² = Var(reward) = V₀ (1 − V₀) for a 0/1 reward: increments of a martingale are uncorrelated."""
    world = modular_world(PROMPTS[17], horizon)
    with torch.no_grad():
        exact = world.enumerate(PromptedPolicy(tiny_model(3), encode(PROMPTS[17])))
    squares = [
        reach @ (log_p.exp() * (q - v[:, None]) ** 2).sum(-1)
        for reach, log_p, q, v in zip(exact.reach, exact.log_probs, exact.action_values, exact.values)
    ]
    assert float(sum(squares)) == pytest.approx((exact.success * (1 - exact.success)).item(), abs=1e-10)
    if horizon == 6:
        assert sum(len(level) for level in exact.log_probs) == 66_430


def test_increments_telescope_to_the_reward():
    world = WORLDS[0]
    exact = world.enumerate(TabularPolicy(world, seed=6))
    sequences, mask, _, reward = exact.completions
    torch.testing.assert_close(exact.q_minus_v(sequences, mask).sum(1), reward - exact.success.detach())


def test_language_model_gradient_is_a_finite_difference():
    """Along a random direction of all parameters; the model runs in float64."""
    world, model = modular_world(PROMPTS[5], 3), tiny_model(2).double()
    policy, parameters = PromptedPolicy(model, encode(PROMPTS[5])), list(model.parameters())
    gradient = world.enumerate(policy, batch=30).policy_gradient(parameters)
    direction = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for p in parameters
    ]

    @torch.no_grad()
    def success(step):
        for p, d in zip(parameters, direction):
            p += step * d
        value = float(world.enumerate(policy).success)
        for p, d in zip(parameters, direction):
            p -= step * d
        return value

    slope = (success(1e-4) - success(-1e-4)) / 2e-4
    assert float(sum((g * d).sum() for g, d in zip(gradient, direction))) == pytest.approx(slope, rel=1e-3)


def test_draws_follow_the_distribution():
    """65,536 draws: success rate, length and mean squared increments within 4 standard errors; the arrays make
    Rollouts.
    """
    world = WORLDS[0]
    exact = world.enumerate(TabularPolicy(world, seed=7))
    sequences, mask, reward = exact.draw(65_536, torch.Generator().manual_seed(0))
    scores = exact.scores(sequences, mask)
    zero = torch.zeros(())
    for sample, truth in [
        (reward, exact.success),
        (mask.sum(1).double(), exact.expected_length),
        (scores["exact_value"].sum(1), zero),
    ]:
        assert abs((sample.mean() - truth).item()) < 4 * float(sample.std()) / 256
    rollouts = Rollouts(reward, torch.zeros(len(reward), dtype=torch.long), mask, scores)
    assert torch.equal(rollouts.length, mask.sum(1))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_modular_reward(prompt):
    """A sum of products, followed by E; any other digit, a missing E, or E alone earn nothing."""
    terms = prompt.rstrip("= ").split("+")
    world, answer = modular_world(prompt), sum(math.prod(map(int, term.split("*"))) for term in terms) % 3
    cases = [
        (f"{answer} E", 1),
        (f"R u L {answer} E", 1),
        (f"{(answer + 1) % 3} E", 0),
        ("E", 0),
        (f"L R L R 0 {answer}", 0),
    ]
    for text, expected in cases:
        assert world.verify(encode(text)) == expected


def test_prefixes_and_index_are_inverse():
    world = modular_world(PROMPTS[0], 4)
    for depth in range(4):
        assert torch.equal(world.index(world.prefixes(depth)), torch.arange(9**depth))
    with pytest.raises(ValueError, match="complete"):
        world.index(torch.tensor([[TOKENS.index("E"), 0]]))


def test_an_impossible_token_adds_no_entropy():
    world = ExactWorld(3, 2, lucky, eos=2)
    exact = world.enumerate(lambda prefixes: torch.tensor([[0.0, 0.0, -math.inf]]).expand(len(prefixes), -1))
    assert exact.entropy.item() == pytest.approx(math.log(2), abs=1e-12)
    assert exact.expected_length.item() == 2
