"""What per-token credit costs on a GPU: bf16 training beside stock TRL, the sketch of gradient norms, and the LM head
against TRL's fused one. Random weights in the shape of Qwen2.5-0.5B: no download, and time and memory are the same.

    python benchmarks/gpu.py                        # one GPU; benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --small   # the script itself, on a tiny model: prints, keeps nothing

training > NAME    stock (GRPOTrainer), grpo, gtpo, ptw_gradient_norm: seconds per step (median without the first),
                   tokens per second, peak GiB; `ratio` is seconds over those of stock TRL
sketch > T         seconds and peak GiB of gradient norms of all tokens of one row of T tokens, K = 8 directions
head > NAME        seconds and peak GiB above the weights, of log-prob and entropy with a backward pass: ours, fused;
                   `gap` is the largest difference of the log-probs, in nats
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from _result import finish, peak_gib
from _trainers import StepTimes
from tokencredit.engines.trl import CreditTrainer
from tokencredit.lm.head import head_statistics
from tokencredit.lm.proxies import importance
from tokencredit.lm.readout import find_readout
from tokencredit.tasks.reckon import model_path

FULL = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
FULL |= {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 8192}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
METHODS = ("grpo", "gtpo", "ptw_gradient_norm")


class Meter:
    """Seconds of a call, and the peak of memory that torch allocated for it on a GPU (of the process, on a CPU)."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def __call__(self, run, repeats):
        run()
        seconds, before = [], torch.cuda.memory_allocated() if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            self._wait()
            began = time.perf_counter()
            run()
            self._wait()
            seconds.append(time.perf_counter() - began)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if self.cuda else peak_gib()
        return {"seconds": statistics.median(seconds), "peak_gib": peak}

    def _wait(self):
        if self.cuda:
            torch.cuda.synchronize()


def make_model(shape, device):
    torch.manual_seed(0)
    config = Qwen2Config(**shape, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    return Qwen2ForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def train(name, shape, device, rows, length, steps):
    """Seconds per step, tokens per second and peak GiB of a method, or of stock TRL, on completions of full length."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        num_generations=8,
        max_completion_length=length,
        max_steps=steps,
        loss_type="dapo",
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        gradient_checkpointing=device == "cuda",
        generation_kwargs={
            "suppress_tokens": [*tokenizer.all_special_ids, *range(len(tokenizer), shape["vocab_size"])]
        },
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    times = StepTimes()
    trainer = (GRPOTrainer if name == "stock" else CreditTrainer)(
        model=make_model(shape, "cpu").float(),
        args=args,
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 2) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": f"<bos> {i % 10} + {i // 10 % 10} ="} for i in range(64)]),
        processing_class=tokenizer,
        callbacks=[times],
        **({} if name == "stock" else {"method": name}),
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = statistics.median(times.seconds[1:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_gib()
    return {"seconds": seconds, "tokens_per_second": rows * length / seconds, "peak_gib": peak}


def sketched(model, length, meter, repeats):
    ids = torch.randint(3, model.config.vocab_size, (1, length + 1), device=model.device)
    there, wanted = torch.ones_like(ids), torch.ones_like(ids)
    wanted[:, 0] = 0
    return meter(
        lambda: importance(model, ids, there, wanted, ("gradient_norm",), num_directions=8, method="sketch"), repeats
    )


def heads(model, rows, length, meter, repeats):
    """Ours against TRL's: log-probs and entropies of all tokens and the gradient of their sum."""
    ids = torch.randint(3, model.config.vocab_size, (rows, length), device=model.device)
    readout = find_readout(model, ids[0])
    kept = {}

    def ours():
        hidden = readout.hidden(ids, torch.ones_like(ids))[:, :-1]
        found = head_statistics(hidden.flatten(0, 1), readout.head, ids[:, 1:].flatten())
        (found.logprob.sum() + found.entropy.detach().sum()).backward()
        kept["ours"] = found.logprob.detach()
        model.zero_grad()

    def fused():
        found = model(input_ids=ids, labels=ids, fused_lm_head=True)
        (found.log_probs.sum() + found.entropy.detach().sum()).backward()
        kept["fused"] = found.log_probs.detach().flatten()
        model.zero_grad()

    figures = {"ours": meter(ours, repeats)}
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    figures["fused"] = meter(fused, repeats)
    return figures | {"gap": float((kept["ours"].float() - kept["fused"].float()).abs().max()), "tokens": ids.numel()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens: shows that the script runs")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"this benchmark needs a GPU, and torch {torch.__version__} sees none: its figures mean nothing on a CPU."
            " --device cpu --small shows that the script runs"
        )
    if options.device == "cpu" and not options.small:
        raise SystemExit("0.5B parameters on a CPU would take days: --device cpu goes with --small")
    shape = TINY if options.small else FULL
    rows, length, steps, repeats = (8, 8, 2, 1) if options.small else (32, 512, 6, 5)
    lengths, meter = (16, 32) if options.small else (1024, 4096), Meter(options.device)
    figures = {"shape": shape, "rows": rows, "length": length, "steps": steps}
    figures["training"] = {}
    for name in ("stock", *METHODS):
        found = train(name, shape, options.device, rows, length, steps)
        usual = figures["training"].get("stock", found)["seconds"]
        figures["training"][name] = found | {"ratio": found["seconds"] / usual}
    model = make_model(shape, options.device)
    figures["sketch"] = {str(size): sketched(model, size, meter, repeats) for size in lengths}
    figures["head"] = heads(model, 2 if options.small else 8, lengths[0], meter, repeats)
    if options.device == "cpu":
        print(json.dumps(figures | {"device": "cpu"}))
    else:
        finish("gpu", figures | {"gpu": torch.cuda.get_device_name()})


if __name__ == "__main__":
    main()
