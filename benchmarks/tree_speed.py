"""How long one prefix tree of the embedded world takes, how wide its root bracket is, and whether sampling agrees with
it.

    python benchmarks/tree_speed.py [--prompts 12] [--runs 3] [--threads 2] [--model FOLDER]

The trees are grown at eps 5e-6 (the default), and once more finer, over held-out prompts of the base model. The check
draws 4,096 completions per prompt with transformers' own `generate`, verifies them, and counts the prompts whose
success rate lies within 4 standard errors of the bracket. The last line printed, also written to
benchmarks/results/tree_speed.json, is one JSON object; times are medians of wall time.
"""

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokencredit.pivotality.tree import exact_value, grow_forest, on_text
from tokencredit.tasks import reckon

EPS, FINER_EPS, SAMPLES, BATCH, GROUP = 5e-6, 2e-6, 4096, 1024, 8


def sample(model, tokenizer, prompt_ids, num):
    """`num` completions as token ids, each with whether it was cut off."""
    prompt = torch.tensor([prompt_ids]).expand(BATCH, -1)
    settings = {
        "max_new_tokens": reckon.MAX_NEW_TOKENS,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    completions = []
    while len(completions) < num:
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        for ids in output[:, len(prompt_ids) :].tolist():
            ended = tokenizer.eos_token_id in ids
            completions.append((ids[: ids.index(tokenizer.eos_token_id) + 1] if ended else ids, not ended))
    return completions[:num]


def inside(tree, rewards):
    """Is the sampled success rate within 4 standard errors of the bracket? The error is that of the bracket's nearest
    value.
    """
    rate, (low, high) = statistics.fmean(rewards), tree.root
    nearest = min(max(rate, low), high)
    return abs(rate - nearest) <= 4 * math.sqrt(nearest * (1 - nearest) / len(rewards))


def timed(function, num, runs):
    """Median seconds per prompt, wall and processor, of several runs over `num` prompts; and the last answer."""
    wall, cpu = [], []
    for _ in range(runs):
        start, busy = time.perf_counter(), time.process_time()
        answer = function()
        wall.append((time.perf_counter() - start) / num)
        cpu.append((time.process_time() - busy) / num)
    return {"seconds_per_prompt": statistics.median(wall), "cpu_seconds_per_prompt": statistics.median(cpu)}, answer


def shape(trees):
    """Width of the root brackets and number of expanded prefixes."""
    widths = [tree.unresolved for tree in trees]
    prefixes = statistics.median(tree.num_prefixes for tree in trees)
    return {"root_width_max": max(widths), "root_width_mean": statistics.fmean(widths), "prefixes": prefixes}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default=str(reckon.model_path()))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(options.model).eval(),
        AutoTokenizer.from_pretrained(options.model),
    )
    rows = reckon.Reckon().rows("test", options.prompts, 0)
    prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
    verifiers = [on_text(reckon.verify, tokenizer, row) for row in rows]
    ends = {"eos_token_id": tokenizer.eos_token_id, "max_new_tokens": reckon.MAX_NEW_TOKENS, "eps": EPS}
    grow_forest(model, prompts[:1], verifiers[:1], **ends)

    together, trees = timed(lambda: grow_forest(model, prompts, verifiers, **ends), len(prompts), options.runs)
    alone, _ = timed(
        lambda: [grow_forest(model, [p], v, **ends) for p, v in zip(prompts, verifiers)], len(prompts), options.runs
    )
    finer, finer_trees = timed(
        lambda: grow_forest(model, prompts, verifiers, **ends | {"eps": FINER_EPS}), len(prompts), options.runs
    )
    drawn = [sample(model, tokenizer, prompt, SAMPLES) for prompt in prompts]
    groups = [[ids for ids, _ in some[:GROUP]] for some in drawn]
    scored, _ = timed(lambda: exact_value(model, prompts, groups, verifiers, **ends), len(prompts), options.runs)
    rates = [[verify(ids, cut) for ids, cut in some] for verify, some in zip(verifiers, drawn)]
    result = {
        **together,
        **shape(trees),
        "grown_one_by_one": alone,
        "scoring_8_completions": scored,
        "finer": {"eps": FINER_EPS, **finer, **shape(finer_trees)},
        "sampling_check": {"inside": sum(map(inside, trees, rates)), "of": len(prompts), "samples_per_prompt": SAMPLES},
        "eps": EPS,
        "runs": options.runs,
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
    }
    line = json.dumps(result)
    out = Path(__file__).parent / "results" / "tree_speed.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
