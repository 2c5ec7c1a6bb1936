"""What the base model of the embedded world can do, and what its tokens are: pass@1, confident pivots, entropy and
credit per role.

    python benchmarks/world.py [--model FOLDER] [--prompts 160] [--samples 4] [--threads 1] [--out FILE]

Sampled pass@1 is of one completion at temperature 1 for each of 2,048 held-out prompts, with a 95 % Wilson interval.
The share of confident pivots is of the tokens of `samples` completions of each of `prompts` prompts; its 95 % interval
resamples prompts. The last line printed, also written to benchmarks/results/world.json, is one JSON object.
"""

import argparse
import json
import math
import random
import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokencredit.pivotality import anatomy
from tokencredit.tasks import reckon, world

NUM_EVAL, BLOCK, RESAMPLES = 2048, 8, 2000


def wilson(rate, num, z=1.96):
    """95 % interval of a share of `num` independent draws."""
    centre, half = rate + z * z / (2 * num), z * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    return [(centre + sign * half) / (1 + z * z / num) for sign in (-1, 1)]


def resampled(parts):
    """95 % percentile interval of Σ found / Σ tokens over resampled blocks of prompts."""
    rng, shares = random.Random(0), []
    for _ in range(RESAMPLES):
        drawn = rng.choices(parts, k=len(parts))
        shares.append(
            sum(part["confident_pivots"] * part["tokens"] for part in drawn) / sum(part["tokens"] for part in drawn)
        )
    return [statistics.quantiles(shares, n=40)[i] for i in (0, -1)]


def pooled(parts):
    """The anatomy of all blocks together: shares of all tokens, means over all tokens of a role."""
    tokens = sum(part["tokens"] for part in parts)
    roles = {}
    for role in sorted({role for part in parts for role in part["roles"]}):
        here = [
            (part["roles"][role], part["roles"][role]["share"] * part["tokens"])
            for part in parts
            if role in part["roles"]
        ]
        num = sum(count for _, count in here)
        roles[role] = {"share": num / tokens} | {
            key: sum(row[key] * count for row, count in here) / num for key in ("entropy", "credit")
        }
    return {
        "tokens": tokens,
        "confident_pivots": sum(part["confident_pivots"] * part["tokens"] for part in parts) / tokens,
        "prompts_with_one": statistics.fmean(part["prompts_with_one"] for part in parts),
        "roles": dict(sorted(roles.items(), key=lambda item: -item[1]["share"])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(reckon.model_path()))
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "world.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(options.model).eval(),
        AutoTokenizer.from_pretrained(options.model),
    )
    task = reckon.Reckon()
    sampled, greedy = (world.pass_rate(model, tokenizer, task, NUM_EVAL, greedy=greedy) for greedy in (False, True))
    blocks = range(options.prompts // BLOCK)
    parts = [
        anatomy.anatomy(model, tokenizer, task, prompts=BLOCK, samples=options.samples, seed=1000 + block)
        for block in blocks
    ]
    result = {
        "pass_rate": sampled,
        "pass_rate_interval": wilson(sampled, NUM_EVAL),
        "greedy_pass_rate": greedy,
        "num_eval": NUM_EVAL,
        "confident_pivots_interval": resampled(parts),
        "prompts": BLOCK * len(blocks),
        "samples": options.samples,
        **pooled(parts),
    }
    line = json.dumps(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
