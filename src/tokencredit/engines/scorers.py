"""Scores beyond a forward pass: importance proxies with their seconds, random draws, and what the task itself knows of
its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PROXIES = (
    "gradient_norm",
    "fisher_trace",
    "perturbation_variance",
    "attention",
    "head_norm",
    "last_block_norm",
    "varentropy",
    "margin",
    "sum_p2",
)
GIVEN = frozenset({*PROXIES, "uniform"})
SECONDS = "seconds_importance"


def importance_scorers(
    *, num_directions: int = 8, method: str = "sketch", parameters: str = "all", max_tokens: int = 8192
) -> dict[str, Callable]:
    """{kind: scorer} for every importance proxy, as `CreditTrainer(scorers=...)` takes them; computed only for methods
    that need them.

    Directions are drawn anew for every rollout batch, from the trainer's seed and its step. The seconds of a batch are
    logged as `seconds_importance`; they are part of `seconds_scoring`.
    """
    options = {"num_directions": num_directions, "method": method, "parameters": parameters, "max_tokens": max_tokens}
    return {kind: _Scorer(kind, options) for kind in PROXIES}


def uniform(trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
    """[B, T] uniform in [0, 1): what a method draws with. A function of the trainer's seed, its step and the row among
    all processes.
    """
    size, width = batch["completion_ids"].shape
    first = size * trainer.accelerator.process_index
    return uniform_draws(trainer.args.seed, trainer.state.global_step, first + torch.arange(size), width).to(
        batch["completion_ids"].device
    )


def uniform_draws(seed: int, step: int, row: Tensor, width: int) -> Tensor:
    """[B, width] uniform in [0, 1), a function of seed, step, row [B] and position."""
    from tokencredit.lm.distribution import seed_of, uniforms

    seeds = seed_of("uniform", seed, step) + row
    return uniforms(seeds[:, None], torch.arange(width)).float()


def exact_value(
    model: Any,
    tokenizer: Any,
    task: Any,
    rows: Sequence[dict],
    ids: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    eps: float = 1e-4,
) -> Tensor:
    """Q − V of every token [B, T] from the model's own prefix trees, one per prompt; `rows` are the task's, one per
    completion.
    """
    from tokencredit.lm.prompts import encode_prompt
    from tokencredit.pivotality.tree import exact_value_scores, on_text

    names: dict[str, int] = {}
    group = torch.tensor([names.setdefault(str(row["prompt"]), len(names)) for row in rows])
    scores = exact_value_scores(
        model,
        [encode_prompt(tokenizer, row["prompt"]) for row in rows],
        ids.cpu(),
        mask.cpu(),
        group,
        [on_text(task.verify, tokenizer, row) for row in rows],
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=max_new_tokens,
        eps=eps,
        temperature=temperature,
    )
    return scores.to(ids.device)


def oracle_positions(tokenizer: Any, task: Any, rows: Sequence[dict], ids: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: 1 at the positions that the task's `deciding(row, tokens)` names, from the tokens before them alone; 0
    elsewhere.
    """
    marks = torch.zeros(ids.shape)
    for i, row in enumerate(rows):
        words = tokenizer.convert_ids_to_tokens(ids[i][mask[i]].tolist())
        marks[i, : len(words)] = torch.tensor(task.deciding(row, words), dtype=marks.dtype)
    return marks.to(ids.device)


class _Scorer:
    def __init__(self, kind: str, options: dict):
        self.kind, self.options = kind, options

    def __call__(self, trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
        from tokencredit.lm.proxies import importance

        began = time.perf_counter()
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["completion_ids"].shape[1]
        wanted = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
        found = importance(
            trainer.accelerator.unwrap_model(trainer.model),
            ids,
            attention,
            wanted,
            kinds=(self.kind,),
            temperature=trainer.temperature,
            seed=trainer.args.seed + 1_000_003 * trainer.state.global_step,
            **self.options,
        )[self.kind].value[:, -width:]
        if found.is_cuda:
            torch.cuda.synchronize()
        trainer._metrics["train" if trainer.model.training else "eval"][SECONDS].append(time.perf_counter() - began)
        return found.detach()
