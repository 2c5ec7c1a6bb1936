"""The sketch at K directions against exact per-token gradients: the shipped model, a model of 10M parameters, and LoRA
adapters on it.

For each: Spearman and median relative error of ‖∇ log p(t)‖ at K = 8 (means over seeds), beside 1/√(2K), the relative
error of a norm that is sketched whole; for the shipped model the Fisher trace at K = 16 against brute force over the
vocabulary as well.
"""

import argparse
import time

import torch
from scipy.stats import spearmanr

from _importance_models import make_model, text_ids, train, windows
from _result import finish
from tokencredit.lm import importance
from tokencredit.lm.completions import sample
from tokencredit.lm.load import load_model, load_tokenizer, resolve_model
from tokencredit.lm.prompts import encode_prompt
from tokencredit.lm.scoring import pad
from tokencredit.tasks import load

SEEDS = 5


def reckon_batch(num: int = 24) -> tuple:
    path, task = resolve_model("reckon"), load("reckon")
    model, tokenizer = load_model(path).eval(), load_tokenizer(path)
    prompts = [encode_prompt(tokenizer, row["prompt"], chat=None) for row in task.rows("test", num, 0)]
    completions = [
        found[0].ids for found in sample(model, tokenizer, prompts, 1, max_new_tokens=task.max_new_tokens, seed=0)
    ]
    batch = pad(prompts, completions)
    return model, (batch.ids, batch.attention, batch.scatter(torch.ones(len(batch))))


def text_batch(text: torch.Tensor, rows: int, length: int) -> tuple:
    ids = windows(text, rows, length, torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    return ids, torch.ones_like(ids), mask


def compare(model, batch: tuple, kind: str, num_directions: int, parameters: str = "all") -> dict:
    """Spearman and median relative error of a sketched kind against the exact one, means over seeds."""
    on = batch[2].bool()
    began = time.perf_counter()
    truth = importance(model, *batch, kinds=(kind,), method="exact", parameters=parameters)[kind].value[on]
    rank, error = [], []
    for seed in range(SEEDS):
        options = {
            "num_directions": num_directions,
            "method": "finite_difference",
            "parameters": parameters,
            "seed": seed,
        }
        found = importance(model, *batch, kinds=(kind,), **options)[kind].value[on]
        rank.append(spearmanr(found, truth)[0])
        error.append((found / truth - 1).abs().median().item())
    print(kind, parameters, len(truth), [round(r, 4) for r in rank], f"{time.perf_counter() - began:.0f} s", flush=True)
    return {
        "spearman": sum(rank) / SEEDS,
        "spearman_lowest": min(rank),
        "median_error": sum(error) / SEEDS,
        "tokens": int(on.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="training steps of the larger model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict = {"K": 8, "theory_error": 16**-0.5, "fisher_K": 16, "seeds": SEEDS}
    model, batch = reckon_batch()
    figures["reckon"] = compare(model, batch, "gradient_norm", 8)
    figures["reckon_fisher"] = compare(model, batch, "fisher_trace", 16)
    text, model = text_ids(), make_model("10M")
    figures |= {
        "text_parameters": sum(p.numel() for p in model.parameters()),
        "text_loss": train(model, text, args.steps),
    }
    batch = text_batch(text, 4, 64)
    figures["text"] = compare(model, batch, "gradient_norm", 8)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    figures["lora"] = compare(adapted, batch, "gradient_norm", 8, "lora")
    figures |= {f"{name}_spearman": figures[name]["spearman"] for name in ("reckon", "text", "lora", "reckon_fisher")}
    finish("importance_accuracy", figures)


if __name__ == "__main__":
    main()
