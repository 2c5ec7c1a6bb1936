"""Builds the base model of the embedded world: a small transformer taught by a demonstrator of mixed quality.

    loss = - (1 / N) Σ log π(token | before)        over the N completion tokens of 128 fresh demonstrations

The result is the starting point of reinforcement learning: it writes the grammar well and chooses badly. Every prompt
it was taught with belongs to the train split. One command, about a minute on two idle cores: `tokencredit world build
--seed N --out DIR`.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokencredit.tasks.reckon import BOS, EOS, MAX_NEW_TOKENS, PAD, VOCABULARY, Demonstrator, Reckon

Progress = Callable[[int, int, dict], None]

BATCH = 128
BATCHES_AT_ONCE = 8
LEARNING_RATE = 6e-3
WARMUP = 20
FLOOR = 0.05
CONTEXT = 256


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; adds nothing by itself, pads on the left, decodes to words with single spaces."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=PAD))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> LlamaForCausalLM:
    """108 544 parameters in float32, freshly drawn from torch's generator.

    Llama rather than Qwen2, which it otherwise equals but for three biases: `AutoTokenizer` replaces the tokenizer of
    any qwen2 folder.
    """
    pad, bos, eos = (VOCABULARY.index(word) for word in (PAD, BOS, EOS))
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    return model


def demonstrations(task: Reckon, seed: int, demonstrator: Demonstrator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of fresh train-split demonstrations: ids [B,T], padded on the right, and labels [B,T], -100 off
    the completion.

    Eight batches are drawn at a time and divided by length, so that little is padding; their order is shuffled.
    """
    prompts, rng = task.prompts("train", seed), random.Random(f"demonstrations {seed}")
    while True:
        rows = islice(prompts, BATCHES_AT_ONCE * BATCH)
        pairs = [(row["prompt"].split(), task.demonstrate(row, rng, demonstrator).split()) for row in rows]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        starts = list(range(0, len(pairs), BATCH))
        rng.shuffle(starts)
        for start in starts:
            yield collate(pairs[start : start + BATCH])


def collate(pairs: list[tuple[list[str], list[str]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and completions in words -> ids and labels, both [B,T]."""
    ids_of = {word: i for i, word in enumerate(VOCABULARY)}
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.full((len(pairs), width), ids_of[PAD])
    labels = torch.full((len(pairs), width), -100)
    for i, (prompt, completion) in enumerate(pairs):
        tokens = torch.tensor([ids_of[word] for word in (*prompt, *completion)])
        ids[i, : len(tokens)] = tokens
        labels[i, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return ids, labels


def learning_rate(step: int, steps: int) -> float:
    """Factor on the peak: linear over the first 20 steps, then a cosine from 1 to 0.05."""
    rising = min(1.0, (step + 1) / WARMUP)
    return rising * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def train(
    model: LlamaForCausalLM,
    task: Reckon,
    seed: int,
    steps: int,
    demonstrator: Demonstrator,
    progress: Progress | None = None,
) -> float:
    """Supervised training in place, AdamW; returns the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    losses: list[float] = []
    model.train()
    for step, (ids, labels) in zip(range(steps), demonstrations(task, seed, demonstrator)):
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, steps, {"loss": losses[-1]})
    model.eval()
    recent = losses[-max(1, steps // 10) :]
    return sum(recent) / len(recent)


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict],
    *,
    greedy: bool = False,
    batch: int = 256,
) -> list[tuple[str, bool]]:
    """One completion per row at temperature 1 (or greedy), and whether it was cut off at `MAX_NEW_TOKENS`."""
    completions = []
    for start in range(0, len(rows), batch):
        prompts = [row["prompt"] for row in rows[start : start + batch]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        out = model.generate(**inputs, do_sample=not greedy)[:, inputs["input_ids"].shape[1] :]
        ended = (out == tokenizer.eos_token_id).any(dim=1).tolist()
        completions += [
            (text, not end) for text, end in zip(tokenizer.batch_decode(out, skip_special_tokens=True), ended)
        ]
    return completions


def pass_rate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Reckon,
    num: int = 512,
    *,
    seed: int = 0,
    greedy: bool = False,
) -> float:
    """Share of correct completions, one per prompt, on the first `num` held-out prompts of a stream."""
    rows = task.rows("test", num, seed)
    completions = sample(model, tokenizer, rows, greedy=greedy)
    return sum(task.verify(text, row, truncated=cut).correct for (text, cut), row in zip(completions, rows)) / num


def build(
    out_dir: str | Path,
    *,
    seed: int = 0,
    operands: tuple[int, ...] = (3, 4),
    wording: bool = True,
    steps: int = 1400,
    demonstrator: Demonstrator | None = None,
    num_eval: int = 2048,
    progress: Progress | None = None,
) -> dict:
    """Trains a base model from nothing, measures it and saves it to `out_dir`, which appears complete or not at all.

    Returns `loss`, `pass_rate` (sampled) and `greedy_pass_rate` on `num_eval` held-out prompts, `num_eval`, `seconds`,
    `steps`, `seed`. An existing `out_dir` is refused: nothing is overwritten. `progress(step, steps, {"loss": ...})` is
    called after every step.
    """
    out, began = Path(out_dir), time.perf_counter()
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder or remove it first")
    task = Reckon(tuple(operands), wording)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, model = make_tokenizer(), make_model()
        loss = train(model, task, seed, steps, demonstrator or Demonstrator(), progress)
        sampled, greedy = (pass_rate(model, tokenizer, task, num_eval, greedy=greedy) for greedy in (False, True))
    save(model, tokenizer, out)
    return {
        "loss": loss,
        "pass_rate": sampled,
        "greedy_pass_rate": greedy,
        "num_eval": num_eval,
        "seconds": time.perf_counter() - began,
        "steps": steps,
        "seed": seed,
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes model and tokenizer to a temporary folder beside `out` and renames it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        portable(partial)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def portable(folder: Path) -> None:
    """Makes a saved folder readable by every user and by transformers 4 and 5, whose names for a plain tokenizer
    differ.
    """
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings, indent=2) + "\n")
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
