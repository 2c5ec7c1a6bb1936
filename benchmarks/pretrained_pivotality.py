"""Alternatives at every token of SmolLM2-135M's completions: the prefix-sharing sampler against `generate`.

    python benchmarks/pretrained_pivotality.py [--prompts 4] [--samples 8] [--threads 1] [--memory 4G]

The requests are those of a pivotality study: `samples` alternatives at every token of one completion of each prompt,
each continued to its end. tokens_per_second: of all of them, sampled here. vs_generate: over those of `generate` called
once per prefix with its alternatives as a batch, on prefixes spread evenly over the traces. Tokens are counted up to
the end token, processor seconds are compared. peak_gib: the largest resident set before `generate` was called;
`memory_gib` is the budget that was set.
"""

import argparse
import time

import torch
from transformers import GenerationConfig

from _pretrained import chat, model_path, problems
from _result import finish, peak_gib
from tokencredit.argument_types import size
from tokencredit.lm.completions import sample
from tokencredit.lm.distribution import Settings, seed_of
from tokencredit.lm.load import load_model, load_tokenizer
from tokencredit.lm.prefix_sampler import PrefixSampler
from tokencredit.lm.sampling import Request, Trace, end_tokens

LIMIT, TEMPERATURE, CALLS = 32, 0.6, 8


def requests_of(traces, sampler, num):
    """`num` alternatives at every token, drawn from the model with the token itself left out."""
    requests = []
    for k, (trace, log_p) in enumerate(zip(traces, sampler.distributions(traces))):
        p = log_p.exp()
        p[torch.arange(len(p)), torch.tensor(trace.completion)] = 0
        for i, tokens in enumerate(torch.multinomial(p.clamp_min(1e-30), num, replacement=True).tolist()):
            requests += [Request(k, i, LIMIT - i - 1, seed_of(k, i, n), token) for n, token in enumerate(tokens)]
    return requests


def generate(model, traces, requests, settings, ends) -> int:
    """Tokens that one call wrote after the requests' own tokens, up to each row's end."""
    rows = [[*traces[r.trace].prompt, *traces[r.trace].completion[: r.prefix], r.token] for r in requests]
    settings.max_new_tokens = requests[0].budget
    ids = torch.tensor(rows)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[:, ids.shape[1] :]
    return sum(next((n + 1 for n, t in enumerate(row) if t in ends), len(row)) for row in out.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=size, default=size("4G"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = model_path()
    model, tokenizer = load_model(path), load_tokenizer(path)
    ends, settings = end_tokens(model, tokenizer), Settings(TEMPERATURE)
    prompts = [chat(tokenizer, text) for text in problems(options.prompts)]
    drawn = sample(model, tokenizer, prompts, max_new_tokens=LIMIT, temperature=TEMPERATURE, memory=options.memory)
    traces = [Trace(tuple(prompt), group[0].ids) for prompt, group in zip(prompts, drawn)]
    sampler = PrefixSampler(model, ends=ends, settings=settings, memory=options.memory)
    requests = requests_of(traces, sampler, options.samples)
    began = time.process_time()
    tokens = sum(len(rollout.ids) for _, rollout in sampler.continue_(traces, requests))
    ours, peak = tokens / (time.process_time() - began), peak_gib()

    one = GenerationConfig(do_sample=True, temperature=TEMPERATURE, top_k=0, eos_token_id=list(ends), pad_token_id=2)
    prefixes = [requests[i : i + options.samples] for i in range(0, len(requests), options.samples)]
    prefixes = [some for some in prefixes if some[0].budget > 0][:: max(len(prefixes) // CALLS, 1)]
    with torch.no_grad():
        began = time.process_time()
        written = sum(generate(model, traces, some, one, ends) for some in prefixes)
        theirs = written / (time.process_time() - began)
    figures = {
        "tokens_per_second": ours,
        "vs_generate": ours / theirs,
        "peak_gib": peak,
        "memory_gib": options.memory / 2**30,
        "rows": sampler.rows(traces, requests),
        "requests": len(requests),
        "tokens": tokens,
        "generate_tokens_per_second": theirs,
        "generate_calls": len(prefixes),
    }
    finish("pretrained_pivotality", figures)


if __name__ == "__main__":
    main()
