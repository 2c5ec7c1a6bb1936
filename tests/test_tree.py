"""Prefix trees against enumeration, brute force and sampling."""

import math
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokencredit.pivotality.tree import PrefixTree, exact_value, exact_value_scores, grow_forest, on_text
from tokencredit.tasks import reckon
from tokencredit.tasks.exact import (
    PROMPTS,
    ExactWorld,
    PromptedPolicy,
    TabularPolicy,
    encode,
    modular_world,
    tiny_model,
)

torch.set_num_threads(1)

END = 9  # E of the modular world


class TableModel(nn.Module):
    """A softmax table behind the call protocol of a language model, without a cache; the prompt is one token."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.policy(input_ids[:, 1:])[:, None])


def parity(completions):
    return (completions.sum(1) % 2).double()


TABLE_WORLD = ExactWorld(4, 3, parity, eos=3)


def table_tree(world=TABLE_WORLD, *, seed=0, scale=1.5, verify=None, **options):
    model = TableModel(TabularPolicy(world, seed=seed, scale=scale))
    settings = {"eos_token_id": world.eos, "max_new_tokens": world.horizon, "eps": 0.0, "use_cache": False} | options
    return PrefixTree.grow(model, [0], verify or world.verify, **settings)


@cache
def modular(horizon, prompt=PROMPTS[40]):
    """World, model and enumeration; the enumeration knows nothing of trees."""
    world, model = modular_world(prompt, horizon), tiny_model(1)
    with torch.no_grad():
        return world, model, world.enumerate(PromptedPolicy(model, encode(prompt)))


def modular_tree(horizon, prompt=PROMPTS[40], **options):
    world, model, _ = modular(horizon, prompt)
    return PrefixTree.grow(model, encode(prompt), world.verify, eos_token_id=END, max_new_tokens=horizon, **options)


def all_prefixes(world):
    return [tuple(prefix) for depth in range(world.horizon) for prefix in world.prefixes(depth).tolist()]


def test_table_is_brute_force():
    """Value, reach and Q − V of every completion by loops over Python floats."""
    policy = TabularPolicy(TABLE_WORLD, seed=0, scale=1.5)
    rows = {word: policy.tables[n][k].tolist() for n in range(3) for k, word in enumerate(product(range(3), repeat=n))}

    def probability(word, token):
        return math.exp(rows[word][token]) / sum(map(math.exp, rows[word]))

    def value(word):
        if len(word) == 3 or word[-1:] == (3,):
            return float(sum(word) % 2)
        return sum(probability(word, token) * value((*word, token)) for token in range(4))

    tree, reached = table_tree(), 0.0
    assert tree.num_prefixes == 1 + 3 + 9
    for word in [(3,), *product(range(3), range(4), range(4))]:
        if 3 in word[:-1]:
            continue
        path, reach = tree.path(word), 1.0
        for i, token in enumerate(word):
            reach *= probability(word[:i], token)
            assert path.before[i].tolist() == pytest.approx([value(word[:i])] * 2, abs=1e-12)
            assert path.credit[i].item() == pytest.approx(value(word[: i + 1]) - value(word[:i]), abs=1e-12)
            assert path.reach[i].item() == pytest.approx(reach, abs=1e-12)
        if len(word) == 3 or word[-1] == 3:
            reached += reach
    assert reached == pytest.approx(1 - sum(probability((), t) * probability((t,), 3) for t in range(3)), abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"batch": 7}, {"batch": 7, "use_cache": False}])
def test_without_pruning_it_is_the_enumeration(options):
    world, _, exact = modular(3)
    tree = modular_tree(3, eps=0, **options)
    assert tree.num_prefixes == len(all_prefixes(world)) == 91
    for prefix in all_prefixes(world):
        assert tree.value(prefix) == pytest.approx((exact.value(prefix),) * 2, abs=1e-6)
    assert tree.entropy() == pytest.approx((exact.entropy.item(),) * 2, abs=1e-6)
    sequences, mask, probability, _ = exact.completions
    scores = exact.scores(sequences, mask)
    for row in range(0, len(sequences), 9):
        n = int(mask[row].sum())
        path = tree.path(sequences[row, :n].tolist())
        for name, found in [("exact_value", path.credit), ("entropy", path.entropy), ("spread", path.spread)]:
            torch.testing.assert_close(found, scores[name][row, :n], atol=2e-6, rtol=0)
        torch.testing.assert_close(path.reach[-1], probability[row], atol=1e-6, rtol=0)


def test_temperature_is_that_of_the_sampler():
    world, model, _ = modular(3)
    policy = PromptedPolicy(model, encode(PROMPTS[40]))
    with torch.no_grad():
        warm = world.enumerate(lambda prefixes: policy(prefixes) / 0.7)
    tree = modular_tree(3, eps=0, temperature=0.7)
    assert tree.root == pytest.approx((warm.success.item(),) * 2, abs=1e-6)
    assert tree.entropy() == pytest.approx((warm.entropy.item(),) * 2, abs=1e-6)


def test_brackets_hold_and_only_tighten():
    """At every prefix that a tree knows, coarse or fine: low ≤ V ≤ high, and the finer bracket lies inside the
    coarser.
    """
    world, _, exact = modular(4)
    trees = [modular_tree(4, eps=eps) for eps in (0.03, 3e-3, 3e-4, 3e-5)]
    assert [tree.num_prefixes for tree in trees] == sorted({tree.num_prefixes for tree in trees})
    assert trees[0].unresolved > 0.2 > 0.05 > trees[-1].unresolved
    for tree in trees:
        low, high = tree.entropy()
        assert low < exact.entropy.item() < high
    known = 0
    for prefix in all_prefixes(world):
        value, (low, high) = exact.value(prefix), (-math.inf, math.inf)
        for tree in trees:
            bracket = tree.value(prefix)
            if math.isnan(bracket[0]):
                assert (low, high) == (-math.inf, math.inf), "a finer tree has lost a prefix"
                continue
            assert bracket[0] - 1e-6 <= value <= bracket[1] + 1e-6
            assert low - 1e-6 <= bracket[0] and bracket[1] <= high + 1e-6
            low, high = bracket
            known += 1
    assert known > 300


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_next_values_average_to_the_value(eps):
    """V = Σ π Q + pruned · [0, 1] at every expanded prefix, and the probabilities add up."""
    world, _, _ = modular(4)
    tree, expanded = modular_tree(4, eps=eps), 0
    for prefix in all_prefixes(world):
        try:
            next_tokens = tree.alternatives(prefix)
        except KeyError:
            continue
        expanded += 1
        mean = next_tokens.probability @ next_tokens.value + next_tokens.pruned * torch.tensor([0.0, 1.0]).double()
        assert mean.tolist() == pytest.approx(list(tree.value(prefix)), abs=1e-12)
        assert float(next_tokens.probability.sum()) + next_tokens.pruned == pytest.approx(1, abs=1e-12)
        assert next_tokens.token.tolist() == sorted(set(next_tokens.token.tolist()))
    assert expanded == tree.num_prefixes


def test_included_completions_are_known_to_the_end():
    """Eight rare completions: the coarse tree alone loses them; included, each token has a bracket that holds, and
    credit telescopes.
    """
    _, _, exact = modular(4)
    sequences, mask, probability, reward = exact.completions
    rare = probability.argsort()[:4000:500].tolist()
    completions = [sequences[row][mask[row]].tolist() for row in rare]
    alone, tree = modular_tree(4, eps=1e-2), modular_tree(4, eps=1e-2, include=completions)
    wide = modular_tree(4, eps=1e-2, include=completions, include_eps=1.0)
    truth = exact.q_minus_v(sequences[rare], mask[rare])
    for row, ids, credit in zip(rare, completions, truth):
        path = tree.path(ids)
        assert bool(alone.credit(ids).isnan().any())
        assert bool(((path.credit_bracket[:, 0] - 1e-6 <= credit) & (credit <= path.credit_bracket[:, 1] + 1e-6)).all())
        torch.testing.assert_close(path.credit_bracket.mean(-1), path.credit)
        torch.testing.assert_close(path.credit.sum(), reward[row] - sum(tree.root) / 2)
        for i in range(len(ids)):
            low, high = tree.value(ids[:i])
            assert low - 1e-6 <= exact.value(ids[:i]) <= high + 1e-6
            assert high - low <= wide.value(ids[:i])[1] - wide.value(ids[:i])[0] + 1e-9
            assert i == 0 or high - low < 0.1
    assert tree.num_prefixes > wide.num_prefixes > alone.num_prefixes


def test_replacement_excludes_the_token():
    """`replace` is V_i minus the value when the token is drawn from the others: here by hand, from the alternatives."""
    tree = table_tree()
    for i, token in enumerate(ids := [1, 0, 2]):
        others = tree.alternatives(ids[:i])
        rest = others.token != token
        without = (others.probability[rest] @ others.value[rest, 0]) / others.probability[rest].sum()
        assert tree.path(ids).replace[i].item() == pytest.approx(
            tree.value(ids[: i + 1])[0] - float(without), abs=1e-12
        )


def test_a_token_without_an_alternative_is_undefined_not_zero():
    world = ExactWorld(2, 2, parity)
    policy = TabularPolicy(world)
    with torch.no_grad():
        policy.tables[0][0] = torch.tensor([-math.inf, 0.0])
    path = PrefixTree.grow(
        TableModel(policy), [0], world.verify, eos_token_id=(), max_new_tokens=2, eps=0.0, use_cache=False
    ).path([1, 0])
    assert math.isnan(path.replace[0]) and not math.isnan(path.replace[1])
    assert path.credit[0].item() == 0


def test_the_verifier_sees_complete_completions_once():
    """All that end with eos, untruncated; and those of full length without it, truncated."""
    seen = []

    def verify(ids, truncated):
        seen.append((*ids, truncated))
        return 0.0

    table_tree(verify=verify)
    ended = [(*word, 3, False) for n in range(3) for word in product(range(3), repeat=n)]
    assert sorted(seen) == sorted(ended + [(*word, True) for word in product(range(3), repeat=3)])


def test_length_limit_and_eos_end_the_path():
    tree = table_tree(max_new_tokens=2)
    assert tree.value([3]) == (1.0, 1.0) and tree.value([0, 1]) == (1.0, 1.0) and tree.value([0, 2]) == (0.0, 0.0)
    assert all(map(math.isnan, tree.value([0, 1, 2]) + tree.value([3, 0])))
    cut, ended = tree.path([0, 1, 2]), tree.path([3, 0, 0])
    assert cut.credit.isnan().tolist() == [False, False, True] and ended.credit.isnan().tolist() == [False, True, True]
    assert ended.before[:, 0].isnan().tolist() == [False, True, True], "nothing is decided after the end"
    assert tree.path([]).credit.shape == (0,)
    one = table_tree(max_new_tokens=1)
    assert one.num_prefixes == 1 and one.root == pytest.approx(
        (one.alternatives([]).probability[[1, 3]].sum().item(),) * 2
    )
    several = table_tree(eos_token_id=[2, 3])
    assert several.value([2]) == (0.0, 0.0) and several.num_prefixes == 1 + 2 + 4


def test_rewards_of_any_range_are_bracketed():
    """Rewards −1 and 2; what is pruned may be worth either."""
    world = ExactWorld(4, 3, lambda completions: 3 * parity(completions) - 1, eos=3)
    value = world.enumerate(TabularPolicy(world, scale=1.5)).success.item()
    low, high = table_tree(world, eps=0.05, reward_range=(-1.0, 2.0)).root
    assert low < value < high
    with pytest.raises(ValueError, match="reward_range"):
        table_tree(world)


def test_a_forest_is_its_trees():
    """Prompts of two lengths, grown together, in small pieces, and alone: the same numbers; each answers to its own
    verifier.
    """
    prompts = [encode(PROMPTS[k]) for k in (3, 40, 77)] + [encode("0 + 1 =")]
    worlds = [modular_world(PROMPTS[k], 4) for k in (3, 40, 77, 77)]
    model, options = tiny_model(1), {"eos_token_id": END, "max_new_tokens": 4, "eps": 1e-3}
    include = [[[0, 1, END]], [], [[7, 2, 8, 8], [END]], [[1]]]
    together = grow_forest(model, prompts, [w.verify for w in worlds], include=include, **options)
    pieces = grow_forest(model, prompts, [w.verify for w in worlds], include=include, batch=5, at_once=2, **options)
    for k, (prompt, world, some) in enumerate(zip(prompts, worlds, include)):
        alone = PrefixTree.grow(model, prompt, world.verify, include=some, **options)
        for tree in (together[k], pieces[k]):
            assert tree.num_prefixes == alone.num_prefixes
            assert tree.root == pytest.approx(alone.root, abs=1e-6) and tree.entropy() == pytest.approx(
                alone.entropy(), abs=1e-6
            )
            for ids in some:
                torch.testing.assert_close(tree.path(ids).after, alone.path(ids).after, atol=1e-6, rtol=0)


def test_scores_of_a_batch():
    """Groups out of order; each row gets the credit of its own prompt's tree, zero off the mask."""
    world, model, exact = modular(3)
    other_world, _, other = modular(3, PROMPTS[70])
    group = torch.tensor([5, 2, 5, 5, 2])
    completions, mask, _ = exact.draw(5, torch.Generator().manual_seed(0))
    prompts = [encode(PROMPTS[40 if k == 5 else 70]) for k in group.tolist()]
    verify = [world.verify if k == 5 else other_world.verify for k in group.tolist()]
    options = {"eos_token_id": END, "max_new_tokens": 3, "eps": 0}
    scores = exact_value_scores(model, prompts, completions, mask, group, verify, **options)
    expected = torch.where(group[:, None] == 5, exact.q_minus_v(completions, mask), other.q_minus_v(completions, mask))
    torch.testing.assert_close(scores, expected.float(), atol=2e-6, rtol=0)
    assert bool((scores[~mask] == 0).all())
    lists = exact_value(
        model,
        prompts[:2],
        [[completions[0][mask[0]].tolist()], [completions[1][mask[1]].tolist()]],
        verify[:2],
        **options,
    )
    assert [len(rows[0]) for rows in lists] == mask[:2].sum(1).tolist()
    torch.testing.assert_close(lists[1][0].float(), scores[1][mask[1]])
    with pytest.raises(ValueError, match="row 1 goes on at token 1"):
        late = torch.tensor([[0, 1, 2], [END, 1, 2]])
        exact_value_scores(
            model, prompts[:2], late, torch.ones(2, 3).bool(), torch.tensor([0, 0]), world.verify, **options
        )


def test_growing_leaves_the_model_as_it_was():
    model = tiny_model(1).train()
    PrefixTree.grow(model, [0], lambda ids, cut: 1.0, eos_token_id=END, max_new_tokens=2)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"include": [[4]]}, "outside the vocabulary of 4"),
    ],
)
def test_errors_name_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        table_tree(**options)


def test_lookups_outside_the_tree_say_so():
    tree = table_tree(eps=0.5)
    with pytest.raises(KeyError, match="not expanded"):
        tree.alternatives([0, 0])
    with pytest.raises(ValueError, match="vocabulary"):
        tree.value([17])
    with pytest.raises(ValueError, match="at least one token"):
        grow_forest(tiny_model(0), [[]], lambda ids, cut: 0.0, eos_token_id=END, max_new_tokens=1)
    with pytest.raises(ValueError, match="one of each per prompt"):
        grow_forest(tiny_model(0), [[0], [1]], [lambda ids, cut: 0.0], eos_token_id=END, max_new_tokens=1)


def test_reckon_samples_lie_in_the_bracket():
    """4,096 completions of three held-out prompts by transformers' own generate: success within 4 standard errors of
    the bracket.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(reckon.model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(reckon.model_path())
    end = tokenizer.eos_token_id
    for row in reckon.Reckon().rows("test", 3, 1):
        prompt, verify = (
            tokenizer(row["prompt"], add_special_tokens=False)["input_ids"],
            on_text(reckon.verify, tokenizer, row),
        )
        low, high = PrefixTree.grow(
            model, prompt, verify, eos_token_id=end, max_new_tokens=reckon.MAX_NEW_TOKENS, eps=5e-6
        ).root
        assert 0 <= high - low <= 0.05
        ids = torch.tensor([prompt]).expand(4096, -1)
        settings = {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": reckon.MAX_NEW_TOKENS,
        }
        drawn = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, len(prompt) :].tolist()
        cut = [end not in word for word in drawn]
        rate = sum(verify(word, short) for word, short in zip(drawn, cut)) / 4096
        nearest = min(max(rate, low), high)
        assert abs(rate - nearest) <= 4 * math.sqrt(nearest * (1 - nearest) / 4096)
