"""How fast continuations of every prefix are sampled: the prefix-sharing sampler against transformers' `generate`.

    python benchmarks/sampler_speed.py [--prompts 24] [--samples 16] [--runs 3] [--threads 2]

The requests are those of a pivotality study on the shipped model: `samples` alternatives at every token of one
completion of each prompt. `prefix by prefix` calls `generate` once per prefix, all its alternatives in one batch;
`batched` calls it on full batches of requests, sorted by the length of their prefix. Tokens are counted up to the end
token. Times are medians of wall time, the three taken in turn.
"""

import argparse
import statistics
import time

import torch
from transformers import GenerationConfig

from _result import finish
from tokencredit.lm.completions import sample
from tokencredit.lm.distribution import seed_of
from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.sampling import Request, Trace, end_tokens
from tokencredit.tasks import load

BATCH = 512


def requests_of(traces, sampler, num, limit):
    """`num` alternatives at every token, drawn from the model with the token itself left out."""
    requests = []
    for k, (trace, log_p) in enumerate(zip(traces, sampler.distributions(traces))):
        p = log_p.exp()
        p[torch.arange(len(p)), torch.tensor(trace.completion)] = 0
        for i, tokens in enumerate(torch.multinomial(p, num, replacement=True).tolist()):
            requests += [Request(k, i, limit - i - 1, seed_of(k, i, n), token) for n, token in enumerate(tokens)]
    return requests


def generate(model, tokenizer, traces, requests, settings, ends):
    """Number of tokens that one call wrote after the requests' own tokens, up to each row's end."""
    ids = [[*traces[r.trace].prompt, *traces[r.trace].completion[: r.prefix], r.token] for r in requests]
    encoded = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    settings.max_new_tokens = max(r.budget for r in requests)
    out = model.generate(**encoded, generation_config=settings)[:, encoded["input_ids"].shape[1] :].tolist()
    return sum(next((n + 1 for n, t in enumerate(row) if t in ends), len(row)) for row in out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path, task = resolve_model("reckon"), load("reckon")
    model, tokenizer = load_model(path).eval(), load_tokenizer(path)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in task.rows("test", options.prompts, 0)]
    ends, limit = end_tokens(model, tokenizer), task.max_new_tokens
    completions = sample(model, tokenizer, prompts, 1, max_new_tokens=limit)
    traces = [Trace(tuple(p), c[0].ids) for p, c in zip(prompts, completions)]
    sampler = PrefixSampler(model, ends=ends, batch=BATCH)
    requests = [r for r in requests_of(traces, sampler, options.samples, limit) if r.token not in ends and r.budget]
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=list(ends),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )

    def shared():
        return sum(len(rollout.ids) for _, rollout in sampler.continue_(traces, requests))

    def batched():
        ordered = sorted(requests, key=lambda r: len(traces[r.trace].prompt) + r.prefix)
        return sum(
            generate(model, tokenizer, traces, ordered[i : i + BATCH], settings, ends)
            for i in range(0, len(ordered), BATCH)
        )

    def prefix_by_prefix():
        groups = {}
        for r in requests:
            groups.setdefault((r.trace, r.prefix), []).append(r)
        return sum(generate(model, tokenizer, traces, group, settings, ends) for group in groups.values())

    arms = {"shared": shared, "batched": batched, "prefix_by_prefix": prefix_by_prefix}
    speed = {name: [] for name in arms}
    for _ in range(options.runs):
        for name, arm in arms.items():
            start = time.perf_counter()
            speed[name].append(arm() / (time.perf_counter() - start))
    found = {name: statistics.median(values) for name, values in speed.items()}
    finish(
        "sampler_speed",
        {
            "vs_prefix_by_prefix": found["shared"] / found["prefix_by_prefix"],
            "vs_batched": found["shared"] / found["batched"],
            "tokens_per_second": found,
            "requests": len(requests),
            "samples_per_prefix": options.samples,
            "batch": BATCH,
            "runs": options.runs,
        },
    )


if __name__ == "__main__":
    main()
