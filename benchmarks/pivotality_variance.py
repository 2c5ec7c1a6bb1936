"""Variance of `replace` at equal numbers of rollouts: alternatives only with the backward recursion, against with and
without the token.

    python benchmarks/pivotality_variance.py [--prompts 16] [--samples 2] [--rollouts 16] [--repetitions 2000]

Values of all prefixes come from the prefix tree of the shipped model, so rollouts are drawn as coin tosses and nothing
is sampled. At every token one estimator spends all its rollouts on alternatives, the other half of them on the trace
itself. `ratio` is that of the variances summed over tokens; tokens whose alternatives are not resolved by the tree
(bracket wider than .05) are left out of both sums.
"""

import argparse
from types import SimpleNamespace

import numpy as np
import torch

from _result import finish
from tokencredit.lm.completions import sample
from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.sampling import Trace, end_tokens
from tokencredit.pivotality.allocation import REST, make_design, trace_probabilities
from tokencredit.pivotality.estimator import estimate, with_without
from tokencredit.pivotality.tree import grow_forest, on_text
from tokencredit.tasks import load


def truth(tree, completion, vocab):
    """(Q [T,V] at bracket midpoints, 0 where pruned; width [T] of the bracket of V−)."""
    values, width = np.zeros((len(completion), vocab)), np.zeros(len(completion))
    for i, token in enumerate(completion):
        known = tree.alternatives(completion[:i])
        values[i, known.token.numpy()] = known.value.mean(-1).numpy()
        others = (known.token != token).numpy()
        gap = (known.probability * (known.value[:, 1] - known.value[:, 0])).numpy()[others].sum() + known.pruned
        width[i] = gap / max(1e-300, 1 - float(known.probability[~torch.from_numpy(others)].sum()))
    return values, width


def expected(design, values, p):
    """Success probability of every stratum [H]."""
    found = []
    for i, token in zip(design.position, design.token):
        tokens = design.others[i][0] if token == REST else [token]
        found.append(p[i, tokens] @ values[i, tokens] / p[i, tokens].sum())
    return np.clip(found, 0, 1)


def variances(log_p, completion, values, reward, options, rng):
    """Variances over the repetitions [2,T]: recursion, with and without."""
    num = len(completion)
    _, _, p = trace_probabilities(log_p, completion)
    full, half = (make_design(log_p, completion, np.full(num, n)) for n in (options.rollouts, options.rollouts // 2))
    draws = [rng.binomial(d.num, expected(d, values, p), size=(options.repetitions, len(d.num))) for d in (full, half)]
    after = np.array([values[i, token] for i, token in enumerate(completion)])
    on_path = rng.binomial(options.rollouts // 2, np.clip(after, 0, 1), size=(options.repetitions, num))
    recursion = estimate(full, draws[0], reward).replace.value
    direct = with_without(half, draws[1], on_path, np.full(num, options.rollouts // 2)).value
    return np.stack([recursion.var(0), direct.var(0)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 16), ("samples", 2), ("rollouts", 16), ("repetitions", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, task = resolve_model("reckon"), load("reckon")
    model, tokenizer = load_model(path).eval(), load_tokenizer(path)
    rows = task.rows("test", options.prompts, 0)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    drawn = sample(model, tokenizer, prompts, options.samples, max_new_tokens=task.max_new_tokens)
    ends = end_tokens(model, tokenizer)
    written = [[c.ids for c in some] for some in drawn]
    trees = grow_forest(
        model,
        prompts,
        [on_text(task.verify, tokenizer, row) for row in rows],
        eos_token_id=ends,
        eps=1e-5,
        max_new_tokens=task.max_new_tokens,
        include=written,
        include_eps=1e-5,
    )
    traces = [
        SimpleNamespace(tree=tree, row=row, prompt=prompt, completion=completion)
        for tree, row, prompt, some in zip(trees, rows, prompts, drawn)
        for completion in some
    ]
    sampler, rng, total, counted = PrefixSampler(model, ends=ends), np.random.default_rng(0), np.zeros(2), [0, 0]
    for t, log_p in zip(traces, sampler.distributions([Trace(tuple(t.prompt), t.completion.ids) for t in traces])):
        values, width = truth(t.tree, t.completion.ids, log_p.shape[1])
        reward = on_text(task.verify, tokenizer, t.row)(list(t.completion.ids), t.completion.truncated)
        found = variances(log_p, t.completion.ids, values, reward, options, rng)
        total += found[:, width < 0.05].sum(1)
        counted = [counted[0] + int((width < 0.05).sum()), counted[1] + len(width)]
    finish(
        "pivotality_variance",
        {
            "ratio": total[0] / total[1],
            "variance_recursion": total[0] / counted[0],
            "variance_with_without": total[1] / counted[0],
            "tokens": counted[0],
            "tokens_in_all": counted[1],
            "rollouts_per_token": options.rollouts,
            "repetitions": options.repetitions,
        },
    )


if __name__ == "__main__":
    main()
