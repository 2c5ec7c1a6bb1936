"""Every token's gradient norm of SmolLM2-135M at once, against a backward pass per token: processor seconds and ranks.

    python benchmarks/pretrained_importance.py [--threads 1]

speedup_256, speedup_1024: seconds of a forward and backward pass of the prefix that ends with each of T tokens of the
Apache licence, timed at a few tokens spread evenly over the row and scaled to T, over the seconds of `importance` with
K = 8 directions on the row. `whole_row`: the same against one forward pass and a backward pass through the row for each
token. spearman: sketched against exact norms over the tokens of sampled completions.
"""

import argparse
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr

from _pretrained import chat, model_path, problems
from _result import finish, peak_gib
from tokencredit.lm.completions import sample
from tokencredit.lm.load import load_model, load_tokenizer
from tokencredit.lm.packing import pack
from tokencredit.lm.proxies import importance

DIRECTIONS = 8
SAMPLE = {256: 6, 1024: 4}
PROMPT = 16


def backward(model, logits: torch.Tensor, target: torch.Tensor, keep: bool = False) -> float:
    log_p = torch.log_softmax(logits.float(), -1)[target]
    grads = torch.autograd.grad(log_p, list(model.parameters()), retain_graph=keep)
    return float(sum(g.square().sum() for g in grads).sqrt())


def prefix_loop(model, ids: torch.Tensor, places: list[int]) -> float:
    """Seconds per token: forward and backward of its prefix."""
    began = time.process_time()
    for at in places:
        backward(model, model(input_ids=ids[:, :at], logits_to_keep=1).logits[0, -1], ids[0, at])
    return (time.process_time() - began) / len(places)


def whole_row(model, ids: torch.Tensor, places: list[int]) -> float:
    """Seconds per token: a backward pass through the row; its one forward pass is left out."""
    hidden = model.model(input_ids=ids)[0]
    began = time.process_time()
    for at in places:
        backward(model, model.lm_head(hidden[0, at - 1]), ids[0, at], keep=True)
    return (time.process_time() - began) / len(places)


def speed(model, text: list[int]) -> dict[str, float]:
    figures = {}
    for length, num in SAMPLE.items():
        ids = torch.tensor([text[: PROMPT + length]])
        wanted = torch.zeros_like(ids)
        wanted[:, PROMPT:] = 1
        places = torch.linspace(PROMPT, PROMPT + length - 1, num).long().tolist()
        began = time.process_time()
        importance(model, ids, torch.ones_like(ids), wanted, ("gradient_norm",), DIRECTIONS, "sketch")
        ours = time.process_time() - began
        loops = {"prefix": prefix_loop(model, ids, places), "whole_row": whole_row(model, ids, places)}
        figures |= {f"seconds_{length}": ours, f"speedup_{length}": loops["prefix"] * length / ours}
        figures |= {f"speedup_{length}_whole_row": loops["whole_row"] * length / ours}
        figures |= {f"{name}_seconds_per_token_{length}": each for name, each in loops.items()}
    return figures


def ranks(model, tokenizer) -> dict[str, float]:
    prompts = [chat(tokenizer, text) for text in problems(6)]
    drawn = sample(model, tokenizer, prompts, 1, max_new_tokens=24, temperature=0.6)
    completions = [list(group[0].ids) for group in drawn]
    ids, there, wanted = pack(prompts, completions)
    options = {"kinds": ("gradient_norm",), "temperature": 0.6}
    sketched = importance(model, ids, there, wanted, num_directions=DIRECTIONS, method="sketch", **options)
    exact = importance(model, ids, there, wanted, method="exact", **options)
    found, truth = (x["gradient_norm"].value[wanted.bool()] for x in (sketched, exact))
    error = ((found - truth).abs() / truth).median()
    return {
        "spearman": float(spearmanr(found, truth).statistic),
        "median_relative_error": float(error),
        "tokens": len(truth),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = model_path()
    model, tokenizer = load_model(path), load_tokenizer(path)
    licence = (Path(__file__).parents[1] / "LICENSE").read_text()
    figures = speed(model, tokenizer(licence)["input_ids"])
    figures |= ranks(model, tokenizer) | {"peak_gib": peak_gib(), "num_directions": DIRECTIONS}
    finish("pretrained_importance", figures)


if __name__ == "__main__":
    main()
