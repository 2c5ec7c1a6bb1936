"""Scores that the engine computes at rollout time with the policy that sampled: importance proxies, their seconds logged."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

PROXIES = ("gradient_norm", "fisher_trace", "perturbation_variance", "attention", "head_norm", "last_block_norm", "varentropy", "margin",
           "sum_p2")  # fmt: skip
GIVEN = frozenset({*PROXIES, "uniform"})
SECONDS = "seconds_importance"


def importance_scorers(*, num_directions: int = 8, method: str = "finite_difference", parameters: str = "all",
                       max_tokens: int = 8192) -> dict[str, Callable]:  # fmt: skip
    """{kind: scorer} for every importance proxy, as `CreditTrainer(scorers=...)` takes them; computed only for methods that need them.

    Directions are drawn anew for every rollout batch, from the trainer's seed and its step. The seconds of a batch are logged as
    `seconds_importance`; they are part of `seconds_scoring`.
    """
    options = {"num_directions": num_directions, "method": method, "parameters": parameters, "max_tokens": max_tokens}
    return {kind: _Scorer(kind, options) for kind in PROXIES}


def uniform(trainer, inputs: list[dict], batch: dict[str, Tensor]) -> Tensor:
    """[B, T] uniform in [0, 1): what a method draws with. A function of the trainer's seed, its step and the row among all processes."""
    from tokencredit.lm.distribution import seed_of, uniforms

    size, width = batch["completion_ids"].shape
    row = torch.arange(size) + size * trainer.accelerator.process_index
    seeds = seed_of("uniform", trainer.args.seed, trainer.state.global_step) + row
    return uniforms(seeds[:, None], torch.arange(width)).float().to(batch["completion_ids"].device)


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
            trainer.accelerator.unwrap_model(trainer.model), ids, attention, wanted, kinds=(self.kind,), temperature=trainer.temperature,
            seed=trainer.args.seed + 1_000_003 * trainer.state.global_step, **self.options,
        )[self.kind].value[:, -width:]  # fmt: skip
        if found.is_cuda:
            torch.cuda.synchronize()
        trainer._metrics["train" if trainer.model.training else "eval"][SECONDS].append(time.perf_counter() - began)
        return found.detach()
